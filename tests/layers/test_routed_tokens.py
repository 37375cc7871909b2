"""Laws of routing: which tokens are chosen, and that gathering and combining lose nothing."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_gradients_of_combining_are_those_of_the_masked_sum():
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 2, 4, -1, -1], [1, -1, -1, -1, -1]])

    def run(hidden, weights):
        some = gather_tokens(hidden, tokens)
        return combine_tokens(hidden.clone(), some.sin(), tokens, weights)

    assert torch.autograd.gradcheck(run, (hidden, weights))
