"""Masks that exist when looked at: what their patterns say, and that they are stock's masks."""

import copy
import inspect
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import masking_utils as stock

from adaptive.layers.hf_mask import LazyMask, make_mask
from adaptive.layers.pattern import Pattern
from adaptive.ops._local_keys import seen_keys

POSITIONS = "cache_position" in inspect.signature(stock.sdpa_mask).parameters  # before 5.4


def request(function, queries, keys=None, past=0, offset=0, padding=None, batch=2, **more):
    """What transformers asks for, in the words of the installed version."""
    where = {"q_length": queries, "q_offset": past, "device": torch.device("cpu")}
    if POSITIONS:
        where = {"cache_position": torch.arange(past, past + queries)}
    return {
        "batch_size": batch,
        "kv_length": past + queries - offset if keys is None else keys,
        "kv_offset": offset,
        "mask_function": function,
        "attention_mask": padding,
        "dtype": torch.float32,
        **where,
        **more,
    }


def agrees(asked, padding=None):
    """Make the mask; check its pattern against stock's at every query that is no padding."""
    mask = make_mask("sdpa", (), asked)
    assert type(mask) is LazyMask
    pattern = mask.pattern
    dense = stock.sdpa_mask(**asked)
    assert mask.shape == dense.shape
    assert mask.dtype == dense.dtype
    batch, _, queries, _ = dense.shape
    keys = torch.arange(pattern.tokens)
    sizes = (pattern.tokens, pattern.window, 0, pattern.offsets, pattern.causal)
    inside = seen_keys(keys[pattern.tokens - queries :], keys, *sizes).expand(batch, -1, -1, -1)
    said = inside
    real = torch.ones(batch, queries, dtype=torch.bool)
    if padding is not None:
        first = asked["kv_offset"] + pattern.tokens - queries
        real = padding[:, first : first + queries]
    said, dense = (t[:, 0][real] for t in (said, dense))
    assert torch.equal(said, dense[:, : pattern.tokens])
    assert not dense[:, pattern.tokens :].any()
    limit = pattern.tokens if pattern.window is None else pattern.window
    inside = inside.sum()
    assert pattern.scores(batch, queries, limit) == int(inside)
    return pattern


def left(padding, batch=2):
    if padding is None:
        return torch.zeros(batch, dtype=torch.int64)
    return (padding.cumsum(1) == 0).sum(1)


def padded(tokens, before, after):
    places = torch.arange(tokens)
    return torch.stack(
        [(places >= b) & (places < tokens - a) for b, a in ((0, 0), (before, after))]
    )


@given(
    kind=st.sampled_from(["window", "chunk", "causal"]),
    size=st.integers(1, 40),
    queries=st.integers(2, 40),
    past=st.integers(0, 30),
    drop=st.integers(0, 30),
    room=st.integers(0, 5),
    before=st.integers(0, 12),
    after=st.integers(0, 12),
)
def test_a_pattern_says_what_the_mask_shows(kind, size, queries, past, drop, room, before, after):
    tokens, offset = queries + past, min(drop, past)
    keys = tokens - offset + room
    padding = padded(tokens, min(before, tokens), min(after, tokens - min(before, tokens)))
    for given_padding in (None, padding):
        function = {
            "window": lambda: stock.sliding_window_causal_mask_function(size),
            "chunk": lambda: stock.chunked_causal_mask_function(size, left(given_padding)),  # noqa: B023
            "causal": lambda: stock.causal_mask_function,
        }[kind]()
        asked = request(function, queries, keys, past, offset, given_padding)
        asked["allow_is_causal_skip"] = False
        pattern = agrees(asked, given_padding)
        assert pattern.window == (size if kind == "window" else None)


@pytest.mark.parametrize("remapped", [False, True])
@pytest.mark.parametrize("kind", ["window", "chunk", "causal"])
def test_packed_sequences_are_cut(kind, remapped):
    positions = torch.tensor(
        [[*range(7), *range(1), *range(12)], [*range(3), *range(9), *range(8)]]
    )
    packed = stock.find_packed_sequence_indices(positions)
    function = {
        "window": stock.sliding_window_causal_mask_function(4),
        "chunk": stock.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.int64)),
        "causal": stock.causal_mask_function,
    }[kind]
    if remapped:
        if not hasattr(stock, "packed_sequence_compatibility_function"):
            pytest.skip("this version does not remap positions")
        function = stock.packed_sequence_compatibility_function(function, positions, packed)
    else:
        function = stock.and_masks(function, stock.packed_sequence_mask_function(packed))
    pattern = agrees(request(function, 20, allow_is_causal_skip=False))
    if kind != "chunk":
        assert pattern.offsets.tolist() == [[0, 7, 8, 20], [0, 3, 12, 20]]


def test_both_directions_are_known_where_stock_knows_them():
    if not hasattr(stock, "sliding_window_bidirectional_mask_function"):
        pytest.skip("this version has no such masks")
    function = stock.sliding_window_bidirectional_mask_function(3)
    pattern = agrees(request(function, 20, allow_is_causal_skip=False))
    assert (pattern.window, pattern.causal) == (4, False)


def unknown():
    tokens = 20
    positions = torch.cat([torch.arange(10), torch.arange(10)])[None].expand(2, -1)
    holes = torch.ones(2, tokens, dtype=torch.bool)
    holes[1, 5] = False
    backwards = torch.arange(tokens).flip(0)[None].expand(2, -1)
    yield "a user's function", {"function": lambda b, h, q, k: k <= q}
    yield (
        "a union",
        {"function": stock.or_masks(stock.causal_mask_function, lambda b, h, q, k: k == 0)},
    )
    also = stock.and_masks(stock.causal_mask_function, lambda b, h, q, k: k > 3)
    yield "an intersection", {"function": also}
    yield "padding within", {"function": stock.causal_mask_function, "padding": holes}
    packed = stock.packed_sequence_mask_function(backwards)
    yield "numbers that fall", {"function": stock.and_masks(stock.causal_mask_function, packed)}
    yield "no direction", {"function": stock.sliding_window_overlay(4)}
    yield "tracing", {"function": stock.causal_mask_function, "use_vmap": True}
    if hasattr(stock, "remap_positions_for_packed_sequence"):
        function = stock.remap_positions_for_packed_sequence(stock.causal_mask_function, positions)
        yield "positions alone", {"function": function}


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in unknown()])
def test_what_is_not_known_is_stocks_own_mask(case):
    asked = request(queries=20, allow_is_causal_skip=False, **case)
    mask = make_mask("sdpa", (), asked)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, stock.sdpa_mask(**asked))


def test_no_mask_where_stock_makes_none():
    full = request(stock.causal_mask_function, 20)
    assert make_mask("sdpa", (), full) is None
    assert type(make_mask("eager", (), full)) is LazyMask
    window = stock.sliding_window_causal_mask_function(8)
    assert make_mask("sdpa", (), request(window, 6, local_size=8)) is None
    assert type(make_mask("sdpa", (), request(window, 20, local_size=8))) is LazyMask


LOOKS = {
    "slice": lambda mask: mask[:, :, 2:5, :4],
    "arithmetic": lambda mask: 1.0 * mask + 1,
    "comparison": lambda mask: mask == 0,
    "method": lambda mask: mask.expand(2, 3, -1, -1).contiguous(),
    "where": lambda mask: torch.where(mask.bool(), 1, 2),
    "cat": lambda mask: torch.cat([mask, mask], dim=-1),
    "numpy": lambda mask: torch.from_numpy(mask.numpy().copy()),
    "list": lambda mask: torch.tensor(mask.tolist()),
    "deepcopy": copy.deepcopy,
    "to": lambda mask: mask.to(torch.float64),
    "iteration": lambda mask: torch.stack(list(mask)),
    "strides": lambda mask: torch.tensor(mask.stride()),
    "pointer": lambda mask: torch.tensor(mask.data_ptr() != 0),
    "text": lambda mask: torch.tensor([len(repr(mask))]),
    "saving": lambda mask: torch.tensor([torch.save(mask, io.BytesIO()) is None]),
    "attention": lambda mask: torch.nn.functional.scaled_dot_product_attention(
        *(torch.ones(2, 1, 20, 8) for _ in "qkv"), attn_mask=mask
    ),
}


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whoever_looks_sees_stocks_mask(look, kind):
    asked = request(stock.sliding_window_causal_mask_function(4), 20, local_size=4)
    mask = make_mask(kind, (), asked)
    assert mask.pattern == Pattern(20, 4, None, True)
    assert (mask.dim(), mask.ndim, mask.numel(), mask.size(3)) == (4, 4, 800, 20)
    assert (mask.device.type, mask.requires_grad, mask.is_cuda) == ("cpu", False, False)
    assert mask._dense is None  # so far it does not exist
    seen = look(mask)
    made = {"sdpa": stock.sdpa_mask, "eager": stock.eager_mask}[kind](**asked)
    assert type(seen) is torch.Tensor
    assert torch.equal(seen, look(made))
    assert mask.pattern is None  # it might have been written to


def test_writing_to_it_is_seen_by_the_next_reader():
    asked = request(stock.sliding_window_causal_mask_function(4), 20, local_size=4, batch=1)
    mask = make_mask("sdpa", (), asked)
    mask[:, :, :, 0] = True
    assert mask.pattern is None
    assert mask.dense()[:, :, :, 0].all()
    mask.fill_(False)
    assert not mask.any()


def test_rows_are_those_of_the_whole():
    for kind in ("sdpa", "eager"):
        mask = make_mask(
            kind, (), request(stock.sliding_window_causal_mask_function(4), 20, past=3)
        )
        rows = mask.rows(slice(7, 12))
        assert mask._dense is None
        assert torch.equal(rows, mask.dense()[:, :, 7:12])
