"""A cache as a part of the layers sees it."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache


def cache_from(cache: Cache, begin: int, end: int) -> Cache:
    """The cache as the layers from ``begin`` to ``end - 1`` see it.

    Masks and positions are made from the lengths of the first layer of each kind, which may have
    seen more tokens than those that run. In this view the earlier layers are some that run: those
    of their kind, or any, where the mask of their kind is not used.
    """
    layers: Sequence[Any] = cache.layers
    running = layers[begin:end]
    kinds = {bool(layer.is_sliding): layer for layer in reversed(running)}
    first = [kinds.get(bool(layer.is_sliding), running[0]) for layer in layers[:begin]]
    view = copy.copy(cache)
    view.layers = [*first, *layers[begin:]]
    return view
