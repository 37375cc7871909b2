"""Laws of what a chosen set keeps: its mass, the bound on its error, and its compensation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers.certificate import error_bound, retained_mass
from adaptive.ops import (
    decode_attention,
    gather_attention,
    scored_attention,
    select_tokens,
    sum_tokens,
)

ROUNDING = 3e-6

problems = st.fixed_dictionaries(
    {
        "group": st.integers(1, 4),
        "tokens": st.integers(2, 300),
        "query_tokens": st.integers(1, 3),
        "sharpness": st.sampled_from([0.1, 1.0, 6.0]),
        "seed": st.integers(0, 2**16),
    }
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def draw(problem):
    """Query, key and value of two rows and two KV heads; a sharp softmax has few heavy keys."""
    rng = torch.Generator().manual_seed(problem["seed"])
    tokens, heads = problem["tokens"], 2 * problem["group"]
    query = torch.randn(2, heads, min(problem["query_tokens"], tokens), 32, generator=rng)
    key, value = (torch.randn(2, 2, tokens, 32, generator=rng) for _ in range(2))
    return query * problem["sharpness"], key, value


def chosen(problem, budget, group="sum"):
    query, key, value = draw(problem)
    out, full, scores = scored_attention(query, key, value, reduce=group)
    recent = query.shape[2]
    choice = select_tokens(scores, max(budget, 1 + recent), None, 1, recent)
    return (query, key, value), out, full, choice


@given(problems, st.integers(1, 320), st.sampled_from(["sum", "max"]))
def test_the_error_is_within_the_bound_that_the_mass_gives(problem, budget, group):
    cache, dense, full, choice = chosen(problem, budget, group)
    sparse, kept = gather_attention(*cache, *choice)
    mass = retained_mass(kept, full)
    assert ((mass >= 0) & (mass <= 1)).all()
    allowed = error_bound(mass[..., None], cache[2].abs().max()) + ROUNDING
    assert ((sparse - dense).abs() <= allowed).all()


@given(problems, st.integers(1, 300), st.integers(0, 40))
def test_mass_grows_with_the_budget_and_is_one_for_all_keys(problem, budget, more):
    masses = []
    for count in (budget, budget + more, problem["tokens"] + 10):
        cache, dense, full, choice = chosen(problem, count)
        out, kept = gather_attention(*cache, *choice)
        masses.append(retained_mass(kept, full))
    assert (masses[1] >= masses[0] - 1e-6).all()
    assert (masses[2] >= 1 - 1e-6).all()
    assert torch.equal(out, dense)


def compensated(cache, choice):
    """Attention to the chosen keys and to one token for all others, as a layer builds it."""
    query, key, value = cache
    indices, counts = choice
    dropped = (key.shape[2] - counts).double()[..., None]
    extra = {"extra_bias": torch.log(dropped).float()}
    for name, source in (("extra_key", key), ("extra_value", value)):
        rest = source.double().sum(2) - sum_tokens(source, indices, counts)
        extra[name] = (rest / dropped.clamp(min=1)).float()[:, :, None]
    return gather_attention(query, key, value, indices, counts, causal=False, **extra)


@given(problems, st.integers(1, 100))
def test_compensation_never_counts_more_than_was_dropped(problem, budget):
    problem = {**problem, "query_tokens": 1}
    cache, _, full, choice = chosen(problem, budget)
    _, kept = gather_attention(*cache, *choice)
    _, lse = compensated(cache, choice)
    assert (lse <= full + 1e-5).all()
    assert (lse >= kept - 1e-5).all()


@given(problems, st.integers(2, 100), st.floats(-1, 1))
def test_compensation_is_exact_where_dropped_keys_score_alike(problem, budget, level):
    problem = {**problem, "query_tokens": 1}
    query, key, value = draw(problem)
    choice = select_tokens(torch.rand(2, 2, key.shape[2]), min(budget, key.shape[2]))
    taken = torch.zeros(2, 2, key.shape[2] + 1, dtype=torch.bool)
    taken.scatter_(2, choice[0].long() % (key.shape[2] + 1), True)
    key = torch.where(taken[..., :-1, None], key, torch.full_like(key, level))
    dense, full = decode_attention(query, key, value)
    out, lse = compensated((query, key, value), choice)
    torch.testing.assert_close(lse, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


def test_where_there_is_no_key_nothing_was_lost():
    nothing = torch.full((1, 2, 1), -math.inf)
    assert torch.equal(retained_mass(nothing, nothing), torch.ones(1, 2, 1))
