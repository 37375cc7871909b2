"""Laws of routing: which tokens are chosen, and that gathering and combining lose nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers import routed_tokens
from adaptive.layers.routed_tokens import combine_tokens, gather_tokens
from adaptive.ops import route_tokens

# Few different values, so that there are ties.
SCORES = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, -math.inf]), min_size=5, max_size=5),
    min_size=1,
    max_size=3,
)


def by_hand(scores, valid, threshold=None, capacity=None):
    chosen = []
    for row, real in zip(scores, valid, strict=True):
        free = [place for place in range(len(row)) if real[place]]
        if capacity is None:
            chosen.append([place for place in free if row[place] >= threshold])
        else:
            most = max(1, int(capacity * len(free))) if free else 0
            chosen.append(sorted(sorted(free, key=lambda p: (-row[p], p))[:most]))
    return chosen


@given(SCORES, st.integers(0, 31), st.sampled_from([0.2, 0.5, 0.6, 1.0, None]))
def test_chosen_are_the_best_and_the_first_of_equals(scores, bits, capacity):
    valid = [[bool(bits >> place & 1) for place in range(5)] for _ in scores]
    rule = {"capacity": capacity} if capacity else {"threshold": 0.5}
    tokens, counts, slots = route_tokens(torch.tensor(scores), valid=torch.tensor(valid), **rule)
    wanted = by_hand(scores, valid, **rule)
    for row, places in enumerate(wanted):
        assert counts[row] == len(places)
        assert tokens[row].tolist() == places + [-1] * (5 - len(places))
        found = {place: slot for slot, place in enumerate(places)}
        assert slots[row].tolist() == [found.get(place, -1) for place in range(5)]
    assert {tokens.dtype, counts.dtype, slots.dtype} == {torch.int32}


def test_the_ends_of_both_rules():
    scores = torch.tensor([[0.1, 0.9, -math.inf]])
    assert route_tokens(scores, threshold=-math.inf)[1].tolist() == [3]
    assert route_tokens(scores, threshold=2.0)[1].tolist() == [0]
    assert route_tokens(scores, capacity=1.0)[0].tolist() == [[0, 1, 2]]
    assert route_tokens(scores, capacity=0.1)[0].tolist() == [[1, -1, -1]]
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert route_tokens(scores, capacity=0.5, valid=none)[1].tolist() == [0]


def test_combining_what_was_gathered_is_the_masked_sum():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 4, generator=rng)
    scores = torch.rand(3, 6, generator=rng)
    tokens, counts, _ = route_tokens(scores, threshold=0.5)
    some = gather_tokens(hidden, tokens)
    assert (some[tokens < 0] == 0).all()
    weights = gather_tokens(scores[..., None], tokens)[..., 0]
    chosen = scores >= 0.5
    assert 0 < int(counts.sum()) == int(chosen.sum()) < 18
    wanted = torch.where(chosen[..., None], hidden + scores[..., None] * hidden, hidden)
    ours = hidden.clone()
    assert combine_tokens(ours, some, tokens, weights) is ours
    assert torch.allclose(ours, wanted)
    plain = combine_tokens(hidden.clone(), some, tokens)
    assert torch.equal(plain, torch.where(chosen[..., None], 2 * hidden, hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_with_gradients_or_without_it_is_the_same(dtype, turned):
    """The kernels take plain states of the dtypes they know; PyTorch's operators take the rest."""
    rng = torch.Generator().manual_seed(2)
    hidden, made = torch.randn(3, 6, 8, generator=rng), torch.randn(3, 4, 8, generator=rng)
    hidden, made = hidden.to(dtype), made.to(dtype)
    if turned:  # features that are no neighbours
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    tokens = torch.tensor([[0, 2, 5, -1], [1, -1, -1, -1], [3, 4, 5, 0]])
    weights = torch.rand(3, 4, generator=rng)
    assert routed_tokens._native(hidden) == (dtype != torch.float64 and not turned)
    learns = made.clone().requires_grad_()
    assert not routed_tokens._native(hidden, learns)
    for factors in (None, weights):
        plain = combine_tokens(hidden.clone(), made, tokens, factors)
        with_gradient = combine_tokens(hidden.clone(), learns, tokens, factors)
        assert with_gradient.requires_grad
        wanted = hidden.double()
        for row, listed in enumerate(tokens.tolist()):
            for at, place in enumerate(listed):
                if place >= 0:
                    factor = 1.0 if factors is None else weights[row, at].double()
                    wanted[row, place] += factor * made[row, at].double()
        rough = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
        for ours in (plain, with_gradient):
            torch.testing.assert_close(ours.double(), wanted, rtol=rough, atol=rough)
    alone = gather_tokens(hidden, tokens)
    assert torch.equal(alone, gather_tokens(hidden.clone().requires_grad_(), tokens))
    assert torch.equal(alone[2], hidden[2, [3, 4, 5, 0]])
    assert not alone[1, 1:].any()


def test_gradients_of_combining_are_those_of_the_masked_sum():
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 2, 4, -1, -1], [1, -1, -1, -1, -1]])

    def run(hidden, weights):
        some = gather_tokens(hidden, tokens)
        return combine_tokens(hidden.clone(), some.sin(), tokens, weights)

    assert torch.autograd.gradcheck(run, (hidden, weights))
