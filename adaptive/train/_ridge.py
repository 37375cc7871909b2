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
    away = y - middle
    left, values, right = torch.linalg.svd(x - mean, full_matrices=False)
    along = left.T @ away
    best: tuple[float, Tensor, Tensor] | None = None
    for strength in _STRENGTHS:
        penalty = (strength * values.square().mean()).clamp(min=torch.finfo(x.dtype).tiny)
        shrunk = values.square() / (values.square() + penalty)
        hat = left.square() @ shrunk + 1 / len(y)
        missed = (away - left @ (shrunk * along)) / (1 - hat)
        error = float(missed.square().sum())
        if best is None or error < best[0]:
            best = error, missed, right.T @ (values / (values.square() + penalty) * along)
    assert best is not None
    error, missed, weight = best
    total = float(away.square().sum())
    return Ridge(
        weight=weight,
        bias=float(middle - mean @ weight),
        left_out=y - missed,
        explained=1 - error / total if total else 0.0,
    )
