"""Ridge regression whose strength, and whose worth, are told by leaving each sample out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRENGTHS = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""Of the penalty, in mean squares of the singular values."""


@dataclass(frozen=True)
class Ridge:
    """A linear prediction, ``weight . x + bias``.

    Attributes:
        weight: ``[width]``, float64.
        bias: Of all.
        left_out: ``[samples]``, float64: of each sample what a fit to the others predicts for it.
        explained: Share of the variance that these predict; 0 or less: they tell nothing.
    """

    weight: Tensor
    bias: float
    left_out: Tensor
    explained: float


def fit_ridge(x: Tensor, y: Tensor) -> Ridge:
    """Fit ``y`` by ``x`` with a penalty on the squared weights (Hoerl and Kennard 1970).

    Of a few strengths the one whose predictions of samples left out are nearest; they follow from
    one fit, by the diagonal of its hat matrix (Allen 1974, PRESS).

    Args:
        x: ``[samples, width]``, two samples or more.
        y: ``[samples]``.
    """
    x, y = x.double(), y.double()
    mean, middle = x.mean(0), y.mean()
    x, away = x - mean, y - middle
    axes, turned, squares = _turn(x)
    along, spread = turned.T @ away, turned.square()
    best: tuple[float, Tensor, Tensor] | None = None
    for strength in _STRENGTHS:
        penalty = (strength * squares.mean()).clamp(min=torch.finfo(x.dtype).tiny)
        shrunk = 1 / (squares + penalty)
        hat = spread @ shrunk + 1 / len(y)
        missed = (away - turned @ (shrunk * along)) / (1 - hat)
        error = float(missed.square().sum())
        if best is None or error < best[0]:
            best = error, missed, axes @ (shrunk * along)
    assert best is not None
    error, missed, weight = best
    total = float(away.square().sum())
    return Ridge(
        weight=weight,
        bias=float(middle - mean @ weight),
        left_out=y - missed,
        explained=1 - error / total if total else 0.0,
    )


def _turn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the axes of ``x``, ``x`` along them, and the squares of its singular values.

    Of many samples they are found from the moments, which takes far less time; what that loses of
    the least values is nothing beside the penalty.
    """
    if len(x) <= x.shape[1]:
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        return right.T, left * values, values.square()
    squares, axes = torch.linalg.eigh(x.T @ x)
    return axes, x @ axes, squares.clamp(min=0)
