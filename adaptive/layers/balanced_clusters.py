"""Balanced k-means: points in clusters of equal size, the same on every run."""

import torch
from torch import Tensor

ITERATIONS = 10
"""Most rounds of assigning and averaging; assignments settle sooner, or go in circles."""


def balanced_clusters(points: Tensor, clusters: int) -> Tensor:
    """Return the numbers of the points, cluster by cluster, each as large as the others.

    Euclidean k-means whose assignment respects a capacity: every point asks for the nearest centre
    that has room, a centre takes the nearest of those who ask, and who was left out asks again.
    Centres start from points far from each other: the one nearest to the mean, then always that
    which is farthest from all chosen ones. Of equal distances the first counts. Of all rounds the
    one with the least sum of squared distances is returned.

    Args:
        points: ``[points, width]``, any floating dtype.
        clusters: Divides the number of points.

    Returns:
        ``[points]``, int64, on the CPU: ascending inside each cluster.
    """
    points = points.detach().float()
    room = len(points) // clusters
    squares = points.square().sum(1)
    centres = _far_apart(points, squares, clusters)
    best: Tensor | None = None
    least = torch.inf
    for _ in range(ITERATIONS):
        # What all distances of a point share does not change which is the least.
        distances = centres.square().sum(1) - 2 * points @ centres.T
        of = _assign(distances, room)
        cost = float((distances.gather(1, of[:, None])[:, 0] + squares).sum(dtype=torch.float64))
        if not cost < least * (1 - 1e-6) and best is not None:
            break
        best, least = of, cost
        centres = torch.zeros_like(centres).index_add_(0, of, points) / room
    assert best is not None
    return best.argsort(stable=True).cpu()


def _far_apart(points: Tensor, squares: Tensor, clusters: int) -> Tensor:
    """Points to start from, ``[clusters, width]``."""
    mean = points.mean(0)
    at = int((squares - 2 * points @ mean).argmin())
    chosen = [at]
    nearest = torch.full_like(squares, torch.inf)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, squares - 2 * points @ points[at] + squares[at])
        nearest[at] = -torch.inf
        at = int(nearest.argmax())
        chosen.append(at)
    return points[torch.tensor(chosen, device=points.device)]


def _assign(distances: Tensor, room: int) -> Tensor:
    """Cluster of each point, ``[points]``, no cluster above ``room``."""
    count, clusters = distances.shape
    of = torch.full((count,), -1, dtype=torch.long, device=distances.device)
    free = [room] * clusters
    open_distances = distances.clone()
    while bool((of < 0).any()):
        waiting = (of < 0).nonzero()[:, 0]
        distance, wish = open_distances[waiting].min(1)
        for cluster in wish.unique().tolist():
            asking = (wish == cluster).nonzero()[:, 0]
            taken = asking[distance[asking].argsort(stable=True)[: free[cluster]]]
            of[waiting[taken]] = cluster
            free[cluster] -= len(taken)
            if not free[cluster]:
                open_distances[:, cluster] = torch.inf
    return of
