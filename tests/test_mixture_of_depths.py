"""Mixture-of-Depths per sequence: what runs, that nothing else does, and what the cache holds."""

import math

import pytest
import torch
from models import greedy, padded, token_ids
from routed_models import CASES, LAYERS, ROUTED, UNITS, MaskedDense, close, deep, forward, router

import adaptive


def mindskip(model, unit, seed=0, **fields):
    given = {"unit": unit, "decide": "sequence", **fields}
    return adaptive.MixtureOfDepths(router=router(model, seed=seed), **given)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_a_threshold_that_all_reach_is_the_model_bit_for_bit(case, unit):
    model, given = deep(case), padded(3)
    with adaptive.patch(model):
        exact = forward(model, given)
        tokens = greedy(model, given)
    with adaptive.patch(model, mindskip(model, unit, threshold=-math.inf)) as patched:
        assert torch.equal(forward(model, given), exact)
        assert torch.equal(greedy(model, given), tokens)
        assert patched.report().routing.share == 1.0


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_skip_are_those_of_the_masked_model(case, unit):
    """With some rows that run and some that skip, in one layer at least."""
    model, given = deep(case), padded(4)
    mixed = 0
    for seed in range(4):
        policy = mindskip(model, unit, seed)
        masked = MaskedDense(model, policy)
        wanted = masked(given)
        with adaptive.patch(model, policy) as patched:
            close(forward(model, given), wanted, given)
            log = patched.report().routing
        for layer in ROUTED:
            runs = masked.chosen[layer][:, 0]
            assert (log.layers[layer].offered, log.layers[layer].ran) == (4, int(runs.sum()))
            mixed += 0 < int(runs.sum()) < 4
    assert mixed
