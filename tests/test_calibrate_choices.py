"""The choices of calibration: layers against trying all, heads, and what similarity means."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.calibrate_heads import choose_heads
from adaptive.calibrate_layers import QUERIES, Similarity, choose_layers
from adaptive.policy import RazorAttention, TidalDecode


@given(st.integers(1, 6), st.integers(0, 999), st.data())
def test_layers_are_chosen_as_by_trying_all(layers, seed, data):
    count = data.draw(st.integers(1, layers))
    rng = torch.Generator().manual_seed(seed)
    similarity = torch.rand(layers, layers, generator=rng)
    importance = torch.rand(layers, generator=rng)

    def worth(chosen):
        total = 0.0
        for layer in range(layers):
            last = max(c for c in chosen if c <= layer)
            share = 1.0 if layer == last else float(similarity[last, layer])
            total += share * float(importance[layer])
        return total

    options = [(0, *rest) for rest in itertools.combinations(range(1, layers), count - 1)]
    chosen = choose_layers(similarity, importance, count)
    assert len(chosen) == count
    assert worth(chosen) == pytest.approx(max(map(worth, options)), abs=1e-6)


@pytest.mark.parametrize("count", [0, 4])
def test_a_count_of_layers_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=f"count must be from 1 to 3 layers, got {count}"):
        choose_layers(torch.rand(3, 3), torch.rand(3), count)


def test_heads_are_the_best_of_all_layers_by_either_score():
    echo = torch.tensor([[0.9, 0.0], [0.0, 0.1], [0.3, 0.2]])
    induction = torch.tensor([[0.9, 0.5], [0.2, 0.6], [0.6, 0.1]])
    places = [(1, 0), (1, 1), (2, 0), (2, 1)]
    one = RazorAttention(induction=0.25, echo=0.0)
    assert choose_heads(echo, induction, one, places) == ((1, 1),)  # of equals the earlier
    two = RazorAttention(induction=0.26, echo=0.1)
    assert choose_heads(echo, induction, two, places) == ((1, 1), (2, 0))
    assert choose_heads(echo, induction, RazorAttention(induction=1, echo=0), places) == (
        tuple(places)
    )
    only_echo = RazorAttention(induction=0, echo=0.5)
    assert choose_heads(echo, induction, only_echo, places) == ((2, 0), (2, 1))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("group", ["sum", "max"])
@pytest.mark.parametrize("seed", [0, 1])
def test_similarity_is_the_share_of_mass_on_the_best_keys(seed, group, shared):
    policy = TidalDecode(group=group, shared=shared, sinks=2, recent=3)
    rng = torch.Generator().manual_seed(seed)
    tokens = 96
    calls = [
        (torch.randn(4, tokens, 8, generator=rng), torch.randn(2, tokens, 8, generator=rng))
        for _ in range(3)
    ]
    measured = Similarity((0, 2), policy, 3)
    measured.begin()
    for layer, (query, key) in enumerate(calls):
        measured.attention(layer, query, key, 1.0, 0.0)
    shares, _ = measured.result()

    def weights(layer):
        query, key = calls[layer]
        scores = query.view(2, 2, tokens, 8) @ key[:, None].mT
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    found, first, last = [], weights(0), weights(2)
    for at in range(tokens - QUERIES, tokens):
        ranked = first[:, :, at]
        ranked = ranked.amax(1) if group == "max" else ranked.sum(1)
        if shared:
            ranked = ranked.sum(0, keepdim=True).expand(2, -1)
        for head in range(2):
            row = ranked[head].clone()
            row[[0, 1, at, at - 1, at - 2]] = torch.inf
            best = row.topk(tokens // 8).indices
            found.append(last[head, :, at, best].sum(-1).mean())
    assert float(shares[0, 2]) == pytest.approx(float(torch.stack(found).mean()), abs=1e-4)
    assert shares[:, 1].sum() == shares[1].sum() == shares[2, 0] == 0
    assert shares[0, 0] > 0
