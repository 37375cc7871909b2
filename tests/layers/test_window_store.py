"""WindowStore: which tokens stay, what the compensation token is worth, and what is given back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers.window_store import WindowStore
from adaptive.ops import decode_attention

BATCH, HEADS, GROUP, WIDTH = 2, 2, 3, 32


def tensors(length, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, HEADS, length, WIDTH, generator=rng) for _ in range(2)]


def queries(count=1, seed=9):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS * GROUP, count, WIDTH, generator=rng)


def read(store, query, mask=None, **options):
    keys, values, bias = store.read(mask, **options)
    return decode_attention.reference(query, keys, values, mask=bias, causal=mask is None)


def kept_of(length, sinks, window):
    places = torch.arange(length)
    return (places < sinks) | (places >= length - window)


@pytest.mark.parametrize("compensation", [False, True])
def test_output_is_the_formula_of_the_paper(compensation):
    length, sinks, window = 50, 4, 10
    keys, values = tensors(length)
    query = queries()
    store = WindowStore(keys, values, None, sinks, window, compensation)
    out, _ = read(store, query)

    kept = kept_of(length, sinks, window)
    dropped = length - sinks - window
    for row in range(BATCH):
        for head in range(HEADS * GROUP):
            q = query[row, head, 0] / math.sqrt(WIDTH)
            k, v = keys[row, head // GROUP], values[row, head // GROUP]
            weight = torch.exp(k[kept] @ q)
            above, below = weight @ v[kept], weight.sum()
            if compensation:
                one = dropped * torch.exp(k[~kept].mean(0) @ q)
                above, below = above + one * v[~kept].mean(0), below + one
            torch.testing.assert_close(out[row, head, 0], above / below)


@given(
    length=st.integers(20, 200),
    sinks=st.integers(0, 5),
    window=st.integers(1, 14),
    seed=st.integers(0, 1000),
)
def test_compensation_never_counts_more_than_was_dropped(length, sinks, window, seed):
    """The mean of exp is at least exp of the mean: the denominator is a lower bound."""
    keys, values = tensors(length, seed)
    query = queries(seed=seed)
    _, compensated = read(WindowStore(keys, values, None, sinks, window, True), query)
    _, plain = read(WindowStore(keys, values, None, sinks, window, False), query)
    _, full = decode_attention.reference(query, keys, values)
    assert (compensated <= full + 1e-5).all()
    assert (compensated > plain).all()


def test_compensation_is_exact_when_the_dropped_keys_are_equal():
    keys, values = tensors(60)
    keys[:, :, 4:50] = keys[:, :, 4:5]
    query = queries()
    out, lse = read(WindowStore(keys, values, None, 4, 10, True), query)
    right, right_lse = decode_attention.reference(query, keys, values)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(lse, right_lse)


@pytest.mark.parametrize("compensation", [False, True])
def test_dropping_little_by_little_equals_dropping_at_once(compensation):
    length, sinks, window = 400, 4, 20
    keys, values = tensors(length)
    store = WindowStore(keys[:, :, :60], values[:, :, :60], None, sinks, window, compensation)
    slots = []
    for token in range(60, length):
        store.store.append(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        store.trim(None)
        slots.append(store.store.length)
    assert max(slots) <= window + 64 + sinks + compensation
    assert store.dropped.tolist() == [length - sinks - store.recent] * BATCH

    once = WindowStore(keys, values, None, sinks, store.recent, compensation)
    query = queries(3)
    for made, right in zip(read(store, query), read(once, query), strict=True):
        torch.testing.assert_close(made, right)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.float32, torch.bfloat16])
def test_padding_counts_for_nothing(compensation, mask_type):
    """A row padded on the left gives what it gives alone, its sinks being its own first tokens."""
    length, sinks, window = 50, 4, 10
    keys, values = tensors(length)
    query = queries(2)
    pads = 23
    seen = torch.ones(2, length, dtype=torch.bool).tril(length - 2).expand(BATCH, 1, 2, length)
    seen = seen.clone()
    seen[1, ..., :pads] = False
    visible = seen[:, 0, -1]
    mask = seen
    if mask_type != torch.bool:
        mask = torch.zeros(seen.shape, dtype=mask_type)
        mask = mask.masked_fill(~seen, torch.finfo(mask_type).min)
    spoiled = [t.clone() for t in (keys, values)]
    for tensor in spoiled:
        tensor[1, :, :pads] = 100.0
    store = WindowStore(*spoiled, visible, sinks, window, compensation)
    out, _ = read(store, query, mask)
    for row, start in ((0, 0), (1, pads)):
        alone = [t[row : row + 1, :, start:] for t in (keys, values)]
        right, _ = read(
            WindowStore(*alone, None, sinks, window, compensation), query[row : row + 1]
        )
        torch.testing.assert_close(out[row : row + 1], right)


def test_a_row_shorter_than_the_window_keeps_all_of_itself():
    keys, values = tensors(50)
    visible = torch.ones(BATCH, 50, dtype=torch.bool)
    visible[1, :44] = False
    store = WindowStore(keys, values, visible, 4, 10, True)
    out, _ = read(store, queries(), visible[:, None, None])
    right, _ = decode_attention.reference(queries()[1:], keys[1:, :, 44:], values[1:, :, 44:])
    torch.testing.assert_close(out[1:], right)
    assert store.dropped.tolist() == [36, 0]


def test_rows_can_change_places_and_repeat():
    keys, values = tensors(50)
    store = WindowStore(keys, values, None, 4, 10, True)
    out, _ = read(store, queries())
    store.select(torch.tensor([1, 1, 0]))
    again, _ = read(store, queries()[[1, 1, 0]])
    torch.testing.assert_close(again, out[[1, 1, 0]])


def test_cropping_beyond_the_recent_tokens_is_refused():
    keys, values = tensors(50)
    store = WindowStore(keys, values, None, 4, 10, False)
    store.crop(3)
    assert store.recent == 7
    with pytest.raises(ValueError, match="at most the 7 recent tokens that are still held, got 8"):
        store.crop(8)
    assert store.recent == 7


def test_later_tokens_are_not_seen():
    keys, values = tensors(50)
    out, _ = read(WindowStore(keys, values, None, 4, 10, True), queries(), later=3)
    fewer = WindowStore(keys[:, :, :47], values[:, :, :47], None, 4, 7, True)
    torch.testing.assert_close(out, read(fewer, queries())[0])
