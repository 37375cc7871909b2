"""The cache of layers with a window of their own: stock's bits, in place, in bounded memory."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from adaptive.layers.hf_adopt import adopt
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_sliding import AdaptiveSlidingLayer
from adaptive.layers.window_store import slack

WINDOW = 8
RECORDS = hasattr(DynamicSlidingWindowLayer(2), "record_past")


def pair(tokens, batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed + 100 * tokens)
    return [torch.randn(batch, 2, tokens, 4, generator=rng) for _ in "kv"]


def layers(window=WINDOW):
    return DynamicSlidingWindowLayer(window), AdaptiveSlidingLayer(window)


def alike(stock, ours):
    if stock.keys is not None and stock.keys.numel():
        assert torch.equal(stock.keys, ours.keys)
        assert torch.equal(stock.values, ours.values)
    else:
        assert not ours.get_seq_length() or ours.keys.shape[2] == 0
    assert stock.get_seq_length() == ours.get_seq_length()
    for queries in (1, 5, 30):
        sizes = [queries, torch.arange(queries)]
        taken = sizes[0]
        try:
            wanted = stock.get_mask_sizes(taken)
        except AttributeError:  # positions, before 5.4
            wanted = stock.get_mask_sizes(sizes[1])
        assert ours.get_mask_sizes(sizes[0]) == ours.get_mask_sizes(sizes[1]) == wanted


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        (1,) * 40,
        (3, 1, 200, 1, 2, 1),
        (5, 2, 1, 1, 1),
        (7, 1, 1),
        (8, 1, 1),
        (300, 1, 300, 64, 65, 1),
        (60, 60, 60, 1),
    ],
)
def test_updates_return_what_stock_returns(chunks, grad):
    stock, ours = layers()
    with torch.set_grad_enabled(grad):
        for step, tokens in enumerate(chunks):
            new = pair(tokens, seed=step)
            for a, b in zip(stock.update(*new), ours.update(*new), strict=True):
                assert torch.equal(a, b)
            alike(stock, ours)


def test_grad_mode_may_change_on_the_way():
    stock, ours = layers()
    for step in range(30):
        with torch.set_grad_enabled(step % 3 == 0):
            new = pair(1 + step % 4, seed=step)
            for a, b in zip(stock.update(*new), ours.update(*new), strict=True):
                assert torch.equal(a, b)
        alike(stock, ours)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [5, 100])
def test_rows_are_picked_as_stock_picks_them(tokens, grad):
    stock, ours = layers()
    changes = [
        lambda x: x.reorder_cache(torch.tensor([1, 1])),
        lambda x: x.batch_repeat_interleave(2),
        lambda x: x.batch_select_indices(torch.tensor([True, False, True, True])),
        lambda x: x.batch_select_indices(torch.tensor([-1, 0])),
    ]
    with torch.set_grad_enabled(grad):
        for layer in (stock, ours):
            layer.update(*pair(tokens))
            layer.update(*pair(1))
        for change in changes:
            change(stock)
            change(ours)
            alike(stock, ours)
        for a, b in zip(stock.update(*pair(2)), ours.update(*pair(2)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [-1, -3, 0, 2])
@pytest.mark.parametrize("held", [0, 5, 7, 8, 30])
@pytest.mark.parametrize("record", [False, True])
def test_crop_does_and_refuses_what_stock_does_and_refuses(tokens, held, record):
    if record and not RECORDS:
        pytest.skip("this version cannot record the past")
    stock, ours = layers()
    with torch.no_grad():
        for layer in (stock, ours):
            if record:
                layer.activate_past_recording()
            if held:
                layer.update(*pair(held))
                layer.update(*pair(4, seed=1))
        refused = None
        try:
            stock.crop(tokens)
        except Exception as error:  # whatever it is, ours must be the same
            refused = error
        if held == 0:  # stock stumbles over what it has not made yet
            ours.crop(tokens)
            return
        if refused is None:
            ours.crop(tokens)
        else:
            with pytest.raises(type(refused), match="crop"):
                ours.crop(tokens)
        assert stock.get_seq_length() == ours.get_seq_length()
        for a, b in zip(stock.update(*pair(2)), ours.update(*pair(2)), strict=True):
            assert torch.equal(a, b)


def test_appending_writes_in_place_and_memory_stays_bounded():
    window = 64
    ours = AdaptiveSlidingLayer(window)
    token_bytes = 2 * 2 * 2 * 4 * 4
    places = set()
    with torch.no_grad():
        ours.update(*pair(1000))
        assert ours.used_bytes() == (window - 1) * token_bytes  # the prompt itself is not kept
        for step in range(300):
            keys, _ = ours.update(*pair(1, seed=step))
            assert keys.shape[2] == window
            places.add(ours.store._keys.data_ptr())
            assert ours.used_bytes() <= (window + slack(window)) * token_bytes
    assert len(places) <= 2 + 300 // slack(window)  # stock makes a copy for every token


def test_a_long_prompt_is_handed_on_without_a_copy():
    ours = AdaptiveSlidingLayer(WINDOW)
    key, value = pair(500)
    with torch.no_grad():
        keys, values = ours.update(key, value)
    assert keys is key
    assert values is value
    key.zero_()
    assert ours.keys.abs().sum() > 0


def test_reset_frees_and_takes_any_shape_again():
    stock, ours = layers()
    with torch.no_grad():
        for layer in (stock, ours):
            layer.update(*pair(30))
        ours.reset()
        assert (ours.keys, ours.get_seq_length(), ours.held_bytes()) == (None, 0, 0)
        assert ours.get_mask_sizes(3) == (3, 0)
        fresh = DynamicSlidingWindowLayer(WINDOW)
        new = pair(9, batch=3)
        for a, b in zip(fresh.update(*new), ours.update(*new), strict=True):
            assert torch.equal(a, b)


def test_copies_do_not_share_storage():
    ours = AdaptiveSlidingLayer(WINDOW)
    with torch.no_grad():
        ours.update(*pair(20))
        other = copy.copy(ours)
        other.update(*pair(1, seed=5))
        before = other.keys.clone()
        ours.update(*pair(1, seed=6))
    assert torch.equal(other.keys, before)
    assert ours.get_seq_length() == other.get_seq_length() == 21


def test_a_locked_layer_and_an_assignment_are_refused():
    ours = AdaptiveSlidingLayer(WINDOW)
    with torch.no_grad():
        ours.update(*pair(3))
        ours.locked = True
        with pytest.raises(NotImplementedError, match="reduced by a policy"):
            ours.update(*pair(1))
    with pytest.raises(NotImplementedError, match="keys must not be assigned"):
        ours.keys = None


def test_adopting_takes_windows_and_leaves_what_is_derived_from_them():
    class Other(DynamicSlidingWindowLayer):
        pass

    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(4), Other(4)]
    assert adopt(cache) == 1
    assert [type(x) for x in cache.layers] == [AdaptiveSlidingLayer, Other]
    assert isinstance(cache.layers[0], AdaptiveCacheLayer)
    assert cache.layers[0].sliding_window == 4
    assert cache.is_sliding == [True, True]
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == 4
