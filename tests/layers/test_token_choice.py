"""Which tokens stay, by the laws of a choice: exact, of equal ones the first, rows on their own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.layers.token_choice import (
    best_tokens,
    class_attention,
    fused,
    gathered,
    redundancy,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_the_best_stay_and_of_equal_ones_the_first(tokens, protect, kinds, ragged, seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, kinds, (3, tokens), generator=rng).float()
    real = [tokens] * 3
    if ragged:
        real = torch.randint(0, tokens + 1, (3,), generator=rng).tolist()
    least = [min(length, max(protect, 1)) for length in real]
    kept = [
        int(torch.randint(low, most + 1, (), generator=rng))
        for low, most in zip(least, real, strict=True)
    ]
    if not ragged:
        kept = [kept[0]] * 3
    lengths = torch.tensor(real, dtype=torch.int32) if ragged else None
    listed, slots = best_tokens(scores, protect, kept, lengths)
    assert listed.shape == (3, max(kept))
    for row in range(3):
        free = range(min(protect, real[row]), real[row])
        order = sorted(free, key=lambda i: (-scores[row, i], i))
        wanted = sorted([*range(min(protect, real[row])), *order][: kept[row]])
        assert listed[row].tolist() == wanted + [-1] * (max(kept) - len(wanted))
        for place in range(tokens):
            assert slots[row, place] == (wanted.index(place) if place in wanted else -1)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_class_token_s_attention(learns, head_dim, ragged):
    query, key = drawn(3, 4, 50, head_dim), drawn(3, 4, 50, head_dim, seed=1)
    query.requires_grad_(learns)
    lengths = torch.tensor([50, 0, 7], dtype=torch.int32) if ragged else None
    made = class_attention(query, key, lengths, 0.3)
    weights = (0.3 * query.detach() @ key.transpose(2, 3)).double()
    for row in range(3):
        length = 50 if lengths is None else int(lengths[row])
        right = weights[row, :, 0, :length].softmax(-1).mean(0)
        assert torch.allclose(made[row, :length].double(), right, atol=1e-6)
        assert not made[row, length:].any()
    assert made.requires_grad == learns


def test_redundancy_is_the_highest_cosine_with_an_earlier_token():
    key = drawn(2, 3, 9, 8)
    key[0, :, 6] = 2 * key[0, :, 4]
    made = redundancy(key, 2)
    unit = torch.nn.functional.normalize(key.mean(1), dim=-1)
    for row in range(2):
        for place in range(9):
            alike = [float(unit[row, place] @ unit[row, i]) for i in range(2, place)]
            assert made[row, place] == pytest.approx(max([-1.0, *alike]), abs=1e-6)
    assert made[0, 6] == pytest.approx(1)
    assert made[0, 4] < 0.999
    assert redundancy(key[:, :, :0], 1).shape == (2, 0)


@pytest.mark.parametrize("mean", [False, True])
def test_what_is_fused_is_looked_at_and_nothing_else(mean):
    states, weights = drawn(2, 6, 8), drawn(2, 6, seed=1).abs()
    gone = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    weights[1, gone[1]] = 0.0
    states[~gone] = math.nan
    made = fused(states, weights, gone, mean)
    right = (weights[0, gone[0], None] * states[0, gone[0]]).sum(0)
    torch.testing.assert_close(made[0], right / weights[0, gone[0]].sum() if mean else right)
    torch.testing.assert_close(made[1], states[1, gone[1]].mean(0) if mean else torch.zeros(8))


def test_rows_are_copied_bit_for_bit_whatever_their_layout():
    states = drawn(2, 7, 5).transpose(1, 2)  # as patch embeddings lie
    listed = torch.tensor([[0, 3, -1], [1, 2, 4]], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        made = gathered(states.to(dtype), listed)
        assert torch.equal(made[1], states[1, [1, 2, 4]].to(dtype))
        assert torch.equal(made[0, :2], states[0, [0, 3]].to(dtype))
        assert not made[0, 2].any()
