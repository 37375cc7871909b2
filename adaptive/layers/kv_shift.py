"""Moves what a store of keys and values holds, where rows of a batch come and go."""

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
    moved = KVStore(store.max_tokens)
    if tokens < 0:
        moved.append(keys[:, :, -tokens:], values[:, :, -tokens:])
        return moved
    # One append of the final length, so that memory is allocated once.
    room = [
        states.new_zeros(1).expand(*states.shape[:2], tokens + store.length, states.shape[3])
        for states in (keys, values)
    ]
    for new, old in zip(moved.append(room[0], room[1]), (keys, values), strict=True):
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
    moved = KVStore(store.max_tokens)
    index = index.to(keys.device)[:, None, :, None]
    shapes = ((*keys.shape[:2], index.shape[2], states.shape[3]) for states in (keys, values))
    moved.append(
        *(s.gather(2, index.expand(to)) for s, to in zip((keys, values), shapes, strict=True))
    )
    return moved
