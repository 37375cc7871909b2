"""head_scores against all weights at once, and what is true of it for every input."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import head_scores
from adaptive.ops.head_scores import CHUNK_TOKENS, causal_weights


def simple(query, key, period, start, scale=None, softcap=0.0):
    """Every weight of every query at once, in float64, and sums in two loops."""
    heads, tokens, head_dim = query.shape
    key = key.double().repeat_interleave(heads // key.shape[0], 0)
    scores = query.double() @ key.mT * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    echo, induction = torch.zeros(heads).double(), torch.zeros(heads).double()
    for token in range(start + period, tokens):
        for copy in range(token - period, start - 1, -period):
            echo += weights[:, token, copy]
            induction += weights[:, token, copy + 1]
    return echo / (tokens - start - period), induction / (tokens - start - period)


def draw(seed, heads=4, kv_heads=2, tokens=40, head_dim=8, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(count, tokens, head_dim, generator=rng) * 2 for count in (heads, kv_heads)
    )
    return query.to(dtype), key.to(dtype)


CASES = st.fixed_dictionaries(
    {
        "period": st.integers(2, 30),
        "start": st.integers(0, 5),
        "scale": st.none() | st.floats(0.01, 2),
        "softcap": st.just(0.0) | st.floats(0.5, 5),
    }
)


@given(st.integers(0, 999), CASES, st.sampled_from([(4, 4), (4, 2), (6, 1)]))
def test_equals_all_weights_at_once(seed, case, heads):
    query, key = draw(seed, *heads)
    for ours, theirs in zip(
        head_scores(query, key, **case), simple(query, key, **case), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [CHUNK_TOKENS + 9, 3 * CHUNK_TOKENS + 5])
def test_chunks_do_not_show(tokens):
    query, key = draw(0, tokens=tokens)
    for ours, theirs in zip(head_scores(query, key, 7), simple(query, key, 7, 1), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 999), CASES)
def test_scores_are_shares(seed, case):
    query, key = draw(seed)
    echo, induction = head_scores(query, key, **case)
    assert (echo >= 0).all()
    assert (induction >= 0).all()
    assert (echo + induction <= 1 + 1e-5).all()  # never the same token twice, from period 2 on


@given(st.integers(0, 999), CASES)
def test_shared_keys_equal_repeated_ones(seed, case):
    query, key = draw(seed)
    shared = head_scores(query, key, **case)
    for a, b in zip(shared, head_scores(query, key.repeat_interleave(2, 0), **case), strict=True):
        torch.testing.assert_close(a, b)


@given(st.integers(2, 9), st.integers(2, 5))
def test_planted_heads_are_told_apart(period, copies):
    """A head that matches the token itself, one that matches the token before, one that does not.

    With n copies behind it a token gives 1 / (n + 1) of its weight to itself in the first case.
    """
    tokens = 1 + period * copies
    token = (torch.arange(tokens) - 1) % period
    one_hot = torch.nn.functional.one_hot(token, 16).float()
    one_hot[0] = 0
    before = one_hot.roll(1, 0)
    before[:2] = 0
    same, after = 60 * one_hot, 60 * before
    query = torch.stack([one_hot, one_hot, torch.zeros_like(one_hot)])
    key = torch.stack([same, after, same])
    echo, induction = head_scores(query, key, period, scale=1.0)
    ranks = torch.arange(1, copies).double()
    assert echo[0] == pytest.approx(float((ranks / (ranks + 1)).mean()), abs=1e-3)
    assert induction[1] > 0.99
    assert echo[1] < 0.01
    assert max(echo[2], induction[2]) < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype):
    query, key = draw(1, dtype=dtype)
    for ours, theirs in zip(head_scores(query, key, 7), simple(query, key, 7, 1), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_never_holds_all_weights(monkeypatch):
    seen = []

    def spy(query, key, start, *rest):
        weights = causal_weights(query, key, start, *rest)
        seen.append(weights.numel())
        return weights

    monkeypatch.setattr(sys.modules["adaptive.ops.head_scores"], "causal_weights", spy)
    query, key = draw(0, tokens=1000)
    head_scores(query, key, 250)
    assert len(seen) > 10
    assert max(seen) <= 4 * CHUNK_TOKENS * 1000


def test_weights_are_those_of_softmax():
    query, key = draw(3)
    weights = causal_weights(query[:, 30:], key, 30)
    assert weights.shape == (2, 2, 10, 40)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 10))
    rows = torch.arange(10)[:, None] + 30
    assert (weights[..., torch.arange(40) > rows] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"period": 1}, "period must be at least 2, got 1"),
        ({"period": 39}, "start must be from 0 to tokens - period - 1 = 0, got 1"),
        ({"period": 7, "start": -1}, "start must be .* got -1"),
    ],
)
def test_bad_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=f"adaptive::head_scores: {message}"):
        head_scores(*draw(0), **change)


@pytest.mark.parametrize("shape", [(3, 40, 8), (2, 39, 8), (2, 40, 4)])
def test_keys_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"adaptive::head_scores: key must be .* got"):
        head_scores(draw(0)[0], torch.zeros(shape), 7)
