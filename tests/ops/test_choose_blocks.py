"""Laws of block scores and of the lists made of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import (
    block_ranges,
    block_sparse_attention,
    choose_blocks,
    local_attention,
    pool_blocks,
    score_blocks,
    score_lines,
)
from adaptive.ops._local_keys import seen_keys
from adaptive.ops.block_sparse_attention import listed_blocks

I32 = torch.int32


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@st.composite
def shapes(draw):
    """(query_tokens, tokens, block_size, offsets): any chunk of any packed row, padded or not."""
    tokens = draw(st.integers(1, 150))
    query_tokens = draw(st.integers(1, tokens))
    cuts = draw(st.sampled_from([None, 2, 4]))
    offsets = None
    if cuts is not None:
        row = st.lists(st.integers(0, tokens), min_size=cuts, max_size=cuts).map(sorted)
        offsets = torch.tensor([draw(row), draw(row)], dtype=I32)
    return query_tokens, tokens, draw(st.sampled_from([16, 32])), offsets


def randn(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def seen_blocks(query_tokens, tokens, block_size, offsets):
    """Which blocks hold a key that a query of the block sees, ``[batch, rows, blocks]``."""
    keys = torch.arange(tokens)
    seen = seen_keys(keys[tokens - query_tokens :], keys, tokens, None, 0, offsets, True)
    seen = seen.expand(2, -1, -1, -1)
    more = (-tokens % block_size, -query_tokens % block_size)
    seen = torch.nn.functional.pad(seen[:, 0], (0, more[0], 0, more[1]))
    return seen.unflatten(2, (-1, block_size)).unflatten(1, (-1, block_size)).any(4).any(2)


@given(shapes())
def test_ranges_hold_every_block_that_is_seen_and_no_more_than_the_sequences_between(shape):
    query_tokens, tokens, block_size, offsets = shape
    ranges = block_ranges(query_tokens, tokens, block_size, offsets)
    right = seen_blocks(*shape)
    made = ranges.visible(right.shape[2]).expand_as(right)
    if offsets is None or offsets.shape[1] == 2:
        assert torch.equal(made, right)
    assert (made | ~right).all()
    place = torch.arange(right.shape[2])
    for which in (right, made):
        low = torch.where(which, place, tokens).amin(2)
        high = torch.where(which, place, -1).amax(2)
        assert torch.equal(low, torch.where(made, place, tokens).amin(2))
        assert torch.equal(high, torch.where(made, place, -1).amax(2))


def scores_of(shape, seed=0, per_head=False, lines=False):
    query_tokens, tokens, block_size, offsets = shape
    query, key = randn(2, 4, query_tokens, 32, seed=seed), randn(2, 2, tokens, 32, seed=seed + 1)
    ranges = block_ranges(query_tokens, tokens, block_size, offsets)
    if lines:
        made = score_lines(query, key, block_size, offsets, rows=9, per_head=per_head)
        return made, ranges, query, key
    mine = None if offsets is None else (offsets - tokens + query_tokens).clamp(min=0)
    means = pool_blocks(query, block_size, mine), pool_blocks(key, block_size, offsets)
    return score_blocks(*means, ranges, per_head=per_head), ranges, query, key


@given(shapes(), st.booleans())
def test_scores_are_shares_of_what_is_seen(shape, per_head):
    scores, ranges, *_ = scores_of(shape, per_head=per_head)
    seen = ranges.visible(scores.shape[3])[:, None].expand_as(scores)
    assert torch.equal(scores > -math.inf, seen)
    total = scores.clamp(min=0).sum(3)
    torch.testing.assert_close(total, seen.any(3).float(), rtol=0, atol=1e-5)


def test_scores_of_blocks_of_one_are_the_softmax():
    query, key = randn(1, 4, 12, 32), randn(1, 2, 12, 32, seed=1)
    ranges = block_ranges(12, 12, 1)
    made = score_blocks(query, key, ranges, softcap=2.0, per_head=True)
    logits = query @ key.repeat_interleave(2, 1).mT / math.sqrt(32)
    logits = 2.0 * torch.tanh(logits / 2.0)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    right = torch.softmax(logits.masked_fill(~causal, -math.inf), -1)
    torch.testing.assert_close(made.clamp(min=0), right)
    shared = score_blocks(query, key, ranges, softcap=2.0)
    torch.testing.assert_close(shared.clamp(min=0), right.unflatten(1, (2, 2)).mean(2))


def test_permuting_heads_permutes_scores():
    query, key = randn(1, 6, 5, 32), randn(1, 3, 7, 32, seed=1)
    ranges = block_ranges(40, 56, 8)
    order = torch.tensor([2, 0, 1])
    heads = (order[:, None] * 2 + torch.arange(2)).flatten()
    made = score_blocks(query, key, ranges)
    assert torch.equal(score_blocks(query[:, heads], key[:, order], ranges), made[:, order])


def lines_by_hand(query, key, block_size, offsets, rows):
    """`score_lines` pair by pair, in float64, for one row and one head."""
    query_tokens, tokens = len(query), len(key)
    cuts = [0, tokens] if offsets is None else offsets.tolist()
    start, end = tokens - query_tokens, cuts[-1]
    first = max((cut for cut in cuts if cut < end), default=end)
    number = min(rows, end - max(first, start))
    query_blocks, blocks = -(-query_tokens // block_size), -(-tokens // block_size)
    made = torch.zeros(query_blocks, blocks, dtype=torch.float64)
    for place in range(end - max(number, 0), end):
        logits = (key[first : place + 1].double() @ query[place - start].double()) / math.sqrt(32)
        for k, weight in enumerate((torch.softmax(logits, 0) / number).tolist(), first):
            made[:, k // block_size] += weight
            for n in range(query_blocks):
                for q in range(block_size):  # where this distance lies for a query of block n
                    there = start + n * block_size + q - (place - k)
                    if 0 <= there // block_size < blocks:
                        made[n, there // block_size] += weight / block_size
    return made


@pytest.mark.parametrize("offsets", [None, [3, 70], [0, 20, 90], [0, 40, 40], [90, 90]])
@pytest.mark.parametrize("query_tokens", [90, 41, 5])
def test_lines_are_columns_and_distances(query_tokens, offsets):
    query, key = randn(1, 4, query_tokens, 32), randn(1, 2, 90, 32, seed=1)
    cuts = None if offsets is None else torch.tensor([offsets], dtype=I32)
    made = score_lines(query, key, 16, cuts, rows=7, per_head=True)
    seen = block_ranges(query_tokens, 90, 16, cuts).visible(6)[0]
    for head in range(4):
        row = None if cuts is None else cuts[0]
        right = lines_by_hand(query[0, head], key[0, head // 2], 16, row, 7)
        right = right.float().masked_fill(~seen, -math.inf)
        torch.testing.assert_close(made[0, head], right, rtol=1e-4, atol=1e-5)
    shared = score_lines(query, key, 16, cuts, rows=7)
    torch.testing.assert_close(shared, made.unflatten(1, (2, 2)).mean(2), rtol=1e-4, atol=1e-5)


@given(
    shapes(),
    st.one_of(st.integers(1, 12), st.floats(0.05, 1.0), st.none()),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(0, 3),
    st.booleans(),
)
def test_choices_hold_what_they_must_and_the_best_of_the_rest(
    shape, budget, sinks, diagonal, dense, lines
):
    scores, ranges, *_ = scores_of(shape, per_head=True, lines=lines)
    mass = 0.6 if budget is None else None
    indices, counts = choose_blocks(scores, ranges, budget, mass, sinks, diagonal, dense)
    batch, lists, query_blocks, blocks = scores.shape
    chosen = listed_blocks(indices, counts, blocks)
    assert torch.equal(chosen.sum(3), counts), "ascending, and none twice"
    for row in range(batch):
        for n in range(query_blocks):
            place = row if len(ranges.first) > 1 else 0
            low, high = int(ranges.first[place, n]), int(ranges.last[place, n])
            later = int((ranges.last[place, n:] >= 0).sum())  # with a query that counts
            seen = max(high - low + 1, 0)
            forced = {*range(low, min(low + sinks, high + 1))}
            forced |= {*range(max(high + 1 - diagonal, low), high + 1)}
            for line in range(lists):
                found = set(chosen[row, line, n].nonzero()[:, 0].tolist())
                values = scores[row, line, n]
                assert forced <= found <= set(range(low, high + 1))
                if later <= dense:
                    assert len(found) == seen
                    continue
                rest = [float(values[i]) for i in found - forced]
                left = [float(values[i]) for i in set(range(low, high + 1)) - found]
                assert not rest or not left or min(rest) >= max(left)
                if budget is None:
                    total = float(values[low : high + 1].sum())
                    held = float(values[sorted(found)].sum())
                    assert held >= 0.6 * total - 1e-5
                    assert not rest or held - min(rest) < 0.6 * total + 1e-5
                else:
                    most = budget if isinstance(budget, int) else math.ceil(budget * seen)
                    assert len(found) == min(seen, max(most, sinks + diagonal))


def test_of_equal_scores_the_earlier_block_wins():
    scores = (
        torch.ones(1, 1, 10, 10)
        .tril()
        .masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), -math.inf)
    )
    indices, counts = choose_blocks(scores, block_ranges(80, 80, 8), budget=4, dense=0)
    assert indices[0, 0, 9, :5].tolist() == [0, 1, 2, 9, -1]
    assert counts[0, 0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]


@given(shapes(), st.booleans())
def test_choosing_every_block_is_attending_to_all(shape, per_head):
    _, tokens, block_size, offsets = shape
    scores, ranges, query, key = scores_of(shape, per_head=per_head)
    value = randn(2, 2, tokens, 32, seed=5)
    indices, counts = choose_blocks(scores, ranges, mass=1.0, dense=0)
    made = block_sparse_attention(query, key, value, indices, counts, block_size, offsets)
    right = local_attention(query, key, value, offsets=offsets)
    for left, other in zip(made, right, strict=True):
        torch.testing.assert_close(left, other, rtol=1e-5, atol=1e-5)


@given(shapes(), st.integers(1, 3))
def test_dense_rows_attend_to_all(shape, dense):
    query_tokens, tokens, block_size, offsets = shape
    scores, ranges, query, key = scores_of(shape)
    indices, counts = choose_blocks(scores, ranges, budget=1, sinks=0, dense=dense)
    made = block_sparse_attention(query, key, key, indices, counts, block_size, offsets)
    right = local_attention(query, key, key, offsets=offsets)
    for row in range(2):
        end = tokens if offsets is None else int(offsets[row, -1])
        last = (end - tokens + query_tokens - 1) // block_size  # the last with a query that counts
        first = max(last - dense + 1, 0) * block_size
        for left, other in zip(made, right, strict=True):
            torch.testing.assert_close(left[row, :, first:], other[row, :, first:])


BAD = {
    "neither": ({}, "exactly one of budget and mass must be given, got None and None"),
    "both": ({"budget": 3, "mass": 0.5}, "exactly one of budget and mass must be given"),
    "no block": ({"budget": 0}, "budget must be at least 1, got 0"),
    "no share": ({"budget": 0.0}, "budget must be above 0 and at most 1, got 0.0"),
    "more than all": ({"budget": 1.5}, "budget must be above 0 and at most 1, got 1.5"),
    "mass of NaN": ({"mass": math.nan}, "mass must be above 0 and at most 1, got nan"),
    "mass above one": ({"mass": 1.01}, "mass must be above 0 and at most 1, got 1.01"),
    "negative sinks": ({"mass": 0.5, "sinks": -1}, "sinks must be at least 0, got -1"),
    "no diagonal": ({"mass": 0.5, "diagonal": 0}, "diagonal must be at least 1, got 0"),
    "negative dense": ({"mass": 0.5, "dense": -1}, "dense must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_choices_are_refused_by_name(name):
    changes, message = BAD[name]
    scores, ranges, *_ = scores_of((40, 40, 16, None))
    with pytest.raises(ValueError, match=f"adaptive::choose_blocks: {message}"):
        choose_blocks(scores, ranges, **changes)


def test_means_that_do_not_fit_are_refused():
    ranges = block_ranges(40, 40, 16)
    with pytest.raises(ValueError, match=r"key_means must be .* got .1, 3, 3, 32"):
        score_blocks(randn(1, 4, 3, 32), randn(1, 3, 3, 32), ranges)
    with pytest.raises(ValueError, match=r"ranges must be \[1 or 1, 4\], got \[1, 3\]"):
        score_blocks(randn(1, 4, 4, 32), randn(1, 2, 3, 32), ranges)
