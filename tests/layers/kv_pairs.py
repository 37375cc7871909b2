"""Random keys and values, and stores filled with them."""

import torch

from adaptive.layers.kv_store import KVStore


def random_pair(batch, heads, tokens, seed, device, dtypes=(torch.float32, torch.float32)):
    """Keys of head dim 3 and values of head dim 5, as views with the layout models hand over."""
    rng = torch.Generator().manual_seed(seed)
    pair = (torch.randn(batch, tokens, heads, dim, generator=rng) for dim in (3, 5))
    return [x.to(device, dtype).transpose(1, 2) for x, dtype in zip(pair, dtypes, strict=True)]


def filled(tokens, batch=2, heads=2, device="cpu", **limits):
    """A store and the pair it was filled with."""
    store = KVStore(**limits)
    pair = random_pair(batch, heads, tokens, 0, device)
    store.append(*pair)
    return store, pair


def holds(store, pair):
    """Whether the store has these very bits."""
    return torch.equal(store.keys, pair[0]) and torch.equal(store.values, pair[1])
