"""The cache layer answers as a DynamicLayer does, and takes its place in empty caches alone."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from adaptive.layers.hf_adopt import adopt
from adaptive.layers.hf_cache import AdaptiveCacheLayer

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2)


def same(stock, ours):
    return len(stock) == len(ours) and all(map(torch.equal, stock, ours))


def fill(cache, batch=2, tokens=5, layers=2, seed=0):
    """Append random tokens to each layer, and return them."""
    rng = torch.Generator().manual_seed(seed)
    pairs = [[torch.randn(batch, 2, tokens, 4, generator=rng) for _ in "kv"] for _ in range(layers)]
    with torch.no_grad():
        for layer, pair in enumerate(pairs):
            cache.update(*pair, layer)
    return pairs


def content(cache):
    """All keys and values, in the order of the layers."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("tokens", [-1, -5, -9, 0, 3, 7])
def test_crop_means_what_the_installed_version_means(tokens):
    """Zero empties the cache in older versions; positive lengths are refused in newer ones."""

    def outcome(layer):
        cache = DynamicCache()
        cache.layer_class_to_replicate = layer
        fill(cache)
        try:
            cache.crop(tokens)
        except ValueError as error:
            return str(error)
        return [x.shape for x in content(cache)]

    if tokens == -9:  # more than there are: older versions count from the end again
        assert outcome(AdaptiveCacheLayer) == [(2, 2, 0, 4)] * 4
    else:
        assert outcome(AdaptiveCacheLayer) == outcome(DynamicLayer)


@pytest.mark.parametrize("grad", [False, True])
def test_the_batch_is_changed_as_stock_changes_it(grad):
    changes = [
        lambda x: x.batch_repeat_interleave(2),
        lambda x: x.reorder_cache(torch.tensor([3, 3, 0, 1])),
        lambda x: x.batch_select_indices(torch.tensor([True, False, True, True])),
        lambda x: x.batch_select_indices(torch.tensor([-1, 0])),
        lambda x: x.crop(-2),
    ]
    stock, ours = DynamicCache(), DynamicCache()
    assert adopt(ours) == 0
    with torch.set_grad_enabled(grad):
        for cache in (stock, ours):
            for layer, pair in enumerate(fill(DynamicCache())):
                cache.update(*pair, layer)
        assert {type(x) for x in ours.layers} == {AdaptiveCacheLayer}
        for change in changes:
            change(stock)
            change(ours)
            assert same(content(stock), content(ours))


def test_an_uninitialised_or_reset_layer_answers_as_an_empty_one():
    cache = DynamicCache()
    adopt(cache)
    cache.reset()
    fill(cache)
    assert cache.layers[0].is_initialized
    cache.reset()
    layer = cache.layers[0]
    assert not layer.is_initialized
    for change in (
        lambda: layer.crop(-1),
        lambda: layer.reorder_cache(torch.tensor([0])),
        lambda: layer.batch_select_indices(torch.tensor([0])),
        lambda: layer.batch_repeat_interleave(2),
    ):
        change()
    assert (layer.keys, layer.values) == (None, None)
    assert layer.get_seq_length() == layer.held_bytes() == 0
    pairs = fill(cache, batch=3)
    assert same(content(cache), [x for pair in pairs for x in pair])


def test_mask_sizes_take_positions_or_a_number():
    layer = AdaptiveCacheLayer()
    assert layer.get_mask_sizes(4) == (4, 0)
    with torch.no_grad():
        layer.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), {"cache_position": None})
    assert layer.get_mask_sizes(4) == layer.get_mask_sizes(torch.arange(3, 7)) == (7, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    assert layer.used_bytes() == 2 * 3 * 2 * 4


@pytest.mark.parametrize("name", ["keys", "values"])
def test_assigning_keys_or_values_is_refused_and_changes_nothing(name):
    cache = DynamicCache()
    adopt(cache)
    pairs = fill(cache)
    for new in (None, pairs[0][0]):
        with pytest.raises(NotImplementedError, match=f"adaptive::kv_cache: {name} must not be"):
            setattr(cache.layers[0], name, new)
    assert same(content(cache), [x for pair in pairs for x in pair])


def test_offloading_is_refused():
    layer = AdaptiveCacheLayer()
    for call in (layer.offload, layer.prefetch):
        with pytest.raises(NotImplementedError, match="adaptive::kv_cache: offloading must be off"):
            call()


def test_accesses_that_a_dynamic_cache_supports_go_on_working():
    stock, ours = DynamicCache(), DynamicCache()
    adopt(ours)
    for cache in (stock, ours):
        fill(cache)
    assert len(ours) == 2
    for a, b in zip(stock, ours, strict=True):
        assert same(a[:2], b[:2])
    if hasattr(stock, "to_legacy_cache"):  # up to 4.57
        for a, b in zip(stock.to_legacy_cache(), ours.to_legacy_cache(), strict=True):
            assert same(a, b)
        assert same(stock[1], ours[1])
    for name in ("is_sliding", "is_compileable", "is_initialized", "is_croppable"):
        assert getattr(stock, name, None) == getattr(ours, name, None)


def test_adopting_twice_changes_nothing_more():
    cache = DynamicCache(config=CONFIG)
    assert adopt(cache) == 2
    layers = list(cache.layers)
    assert adopt(cache) == 0
    assert cache.layers == layers


def test_what_is_not_an_empty_dynamic_cache_is_left_alone():
    full, offloaded = DynamicCache(), DynamicCache()
    fill(full)
    offloaded.offloading = True
    lazy = DynamicCache()
    for cache in (full, offloaded, StaticCache(config=CONFIG, max_cache_len=8)):
        before = [type(x) for x in cache.layers], cache.layer_class_to_replicate
        assert adopt(cache) == 0
        assert ([type(x) for x in cache.layers], cache.layer_class_to_replicate) == before
    assert adopt(lazy) == 0
    fill(lazy)
    assert [type(x) for x in lazy.layers] == [AdaptiveCacheLayer] * 2


def test_a_class_derived_from_the_stock_layer_is_left_alone():
    class Other(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [Other(), DynamicLayer()]
    cache.layer_class_to_replicate = Other
    assert adopt(cache) == 1
    assert [type(x) for x in cache.layers] == [Other, AdaptiveCacheLayer]
    assert cache.layer_class_to_replicate is Other


def test_a_shallow_copy_of_a_layer_does_not_share_storage():
    cache = DynamicCache()
    adopt(cache)
    pairs = fill(cache)
    layer, other = cache.layers[0], copy.copy(cache.layers[0])
    with torch.no_grad():
        other.update(*pairs[1])
        layer.update(*pairs[0])
    assert torch.equal(other.keys, torch.cat([pairs[0][0], pairs[1][0]], 2))
    assert torch.equal(layer.keys, torch.cat([pairs[0][0]] * 2, 2))
