"""Laws of balanced clusters: equal sizes, the same every time, near points together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.layers.balanced_clusters import balanced_clusters


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_sizes_are_equal_and_results_repeat(clusters, size, width, seed):
    rng = torch.Generator().manual_seed(seed)
    points = torch.randint(-2, 3, (clusters * size, width), generator=rng).float()  # many ties
    order = balanced_clusters(points, clusters)
    assert sorted(order.tolist()) == list(range(clusters * size))
    assert all(sorted(part.tolist()) == part.tolist() for part in order.split(size))
    assert torch.equal(balanced_clusters(points.clone(), clusters), order)


def test_clusters_that_are_there_are_found():
    rng = torch.Generator().manual_seed(0)
    of = torch.arange(60) % 5
    centres = torch.eye(5, 16) * 4
    points = centres[of] + 0.3 * torch.randn(60, 16, generator=rng)
    found = balanced_clusters(points.bfloat16(), 5).split(12)
    assert all(len(of[part].unique()) == 1 for part in found)


@pytest.mark.parametrize("clusters", [2, 8])
def test_points_lie_nearer_to_their_own_kind_than_by_chance(clusters):
    rng = torch.Generator().manual_seed(1)
    points = torch.randn(64, 4, generator=rng)

    def spread(order):
        parts = points[order].view(clusters, -1, 4)
        return float((parts - parts.mean(1, keepdim=True)).square().sum())

    shuffled = torch.randperm(64, generator=rng)
    assert spread(balanced_clusters(points, clusters)) < 0.9 * spread(shuffled)
