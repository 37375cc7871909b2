"""Moves what a store of keys and values holds, where rows of a batch come and go."""

import torch
from torch import Tensor

from adaptive.layers.kv_store import KVStore


def shifted(store: KVStore, tokens: int) -> KVStore:
    """A store of the same rows, with storage of its own.

    Args:
        store: What is to be moved; nothing may be derived from it.
        tokens: Empty tokens to put in front, zeros: attention that masks them still multiplies
            them by 0. Negative: so many of the first ones are left out.
    """
    assert not store.derived
    keys, values = store.keys, store.values
    assert keys is not None  # it holds tokens
    assert values is not None
    if not tokens:
        return store
    if tokens < 0:
        moved = KVStore(store.max_tokens)
        moved.append(keys[:, :, -tokens:], values[:, :, -tokens:])
        return moved
    moved = _like(store, tokens + store.length)
    for new, old in ((moved.keys, keys), (moved.values, values)):
        assert new is not None  # there is room
        new.narrow(2, tokens, store.length).copy_(old)
    return moved


def packed(store: KVStore, index: Tensor) -> KVStore:
    """A store with some tokens of each row, in storage of its own.

    Args:
        store: What is to be packed; nothing may be derived from it.
        index: Which tokens, ``[rows, kept]``, int64; every row has as many.
    """
    assert not store.derived
    keys, values = store.keys, store.values
    assert keys is not None  # it holds tokens
    assert values is not None
    moved = _like(store, index.shape[1])
    whole = index.to(keys.device)[:, None, :, None]
    for new, old in ((moved.keys, keys), (moved.values, values)):
        assert new is not None  # there is room
        torch.gather(old, 2, whole.expand(new.shape), out=new)
    return moved


def _like(store: KVStore, tokens: int) -> KVStore:
    """A store of zeros for the rows of another: one append, so that memory is allocated once."""
    moved = KVStore(store.max_tokens)
    keys, values = store.keys, store.values
    assert keys is not None  # it holds tokens
    assert values is not None
    room = [
        states.new_zeros(1).expand(*states.shape[:2], tokens, states.shape[3])
        for states in (keys, values)
    ]
    moved.append(room[0], room[1])
    return moved
