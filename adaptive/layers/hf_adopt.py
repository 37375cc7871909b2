"""Puts this project's cache layers into caches of transformers, and locks them between passes."""

from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from adaptive.layers.head_split import HeadSplit
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_sliding import AdaptiveSlidingLayer


def adopt(cache: Cache) -> int:
    """Give an empty DynamicCache this project's layers, in place.

    Swapped are layers whose class is exactly DynamicLayer or DynamicSlidingWindowLayer: full or
    windowed attention, dynamic, unquantised; the cache also makes ours for layers that it adds
    later. Linear, shared and quantised layers stay, and so does any cache that holds tokens,
    offloads, or is not a DynamicCache. Calling it again changes nothing.

    Args:
        cache: As made by the user, by `generate` or by a model's forward.

    Returns:
        The number of layers swapped; 0 for a cache that adds its layers later, so look at
        ``cache.layers`` after a forward.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        return 0
    held = (x.get_seq_length() for x in cache.layers if isinstance(x, CacheLayerMixin))
    if any(length > 0 for length in held):
        return 0
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = AdaptiveCacheLayer
    swapped = 0
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = AdaptiveCacheLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            ours = cache.layers[i] = AdaptiveSlidingLayer(layer.sliding_window)
            ours.record_past = getattr(layer, "record_past", False)
        else:
            continue
        swapped += 1
    return swapped


def lock(cache: object, locked: bool) -> None:
    """Lock the layers of a cache some of which have dropped tokens, or unlock them for a pass."""
    layers = [x for x in getattr(cache, "layers", ()) if isinstance(x, AdaptiveCacheLayer)]
    if any(isinstance(layer.store, HeadSplit) for layer in layers):
        for layer in layers:
            layer.locked = locked


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache for a model, as ``DynamicCache(config=config)``, with this project's layers.

    Args:
        config: The model's; tells which layers are full attention.

    Returns:
        A DynamicCache to hand over as ``past_key_values``, for several turns if wanted.
    """
    cache = DynamicCache(config=config)
    adopt(cache)
    return cache
