"""The cache of the sequences that run a layer: rows of the batch move as in a cache of all rows."""

import copy

import pytest
import torch

from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_row_cache import RowCacheLayer
from adaptive.layers.hf_sliding import AdaptiveSlidingLayer

RUNS = torch.tensor([True, False, True, True])


def pair(window=None, runs=RUNS, tokens=6):
    """A cache of the rows that run, and one of all rows, with the same tokens."""

    def inner():
        return AdaptiveCacheLayer() if window is None else AdaptiveSlidingLayer(window)

    ours, full = RowCacheLayer(inner(), drops=True), inner()
    ours.decide(runs)
    append(ours, full, tokens)
    return ours, full


def append(ours, full, tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    new = torch.randn(2, len(ours.runs), 2, tokens, 8, generator=rng)
    with torch.no_grad():
        if ours.runs.any():
            ours.update(*new[:, ours.runs])
        ours.advance(tokens)
        full.update(*new)


def check(ours, full):
    assert ours.get_seq_length() == full.get_seq_length()
    assert ours.get_mask_sizes(2) == full.get_mask_sizes(2)
    if ours.runs.any():
        assert torch.equal(ours.keys, full.keys[ours.runs])
        assert torch.equal(ours.values, full.values[ours.runs])


@pytest.mark.parametrize("runs", [RUNS, ~RUNS, torch.zeros(4, dtype=torch.bool)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_rows_move_as_in_a_cache_of_all_rows(window, runs):
    ours, full = pair(window, runs)
    check(ours, full)
    for method, argument, moved in (
        ("reorder_cache", torch.tensor([3, 3, 1, 0]), [3, 3, 1, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("batch_select_indices", torch.tensor([5, 0, 2]), [5, 0, 2]),
    ):
        before = ours.runs
        getattr(ours, method)(argument)
        getattr(full, method)(argument)
        assert torch.equal(ours.runs, before[moved])
        check(ours, full)
        append(ours, full, 1, seed=1)
        check(ours, full)


def test_cropping_and_forgetting():
    ours, full = pair()
    ours.crop(-2)
    full.crop(-2)
    check(ours, full)
    twin = copy.copy(ours)
    append(ours, full, 1)
    assert twin.get_seq_length() == 4
    assert twin.keys.shape[2] == 4
    ours.crop(-9)
    assert (ours.get_seq_length(), ours.runs, ours.keys) == (0, None, None)


def test_rows_that_are_not_those_that_run_are_refused():
    ours, _ = pair()
    with pytest.raises(NotImplementedError, match="belongs to MixtureOfDepths"):
        ours.update(torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8))
    with pytest.raises(NotImplementedError, match="offloading must be off"):
        ours.offload()
