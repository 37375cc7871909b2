"""A Gaussian process over sets: what a number measured on some sets says about others.

Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1: a squared
exponential kernel of the number of members in which two sets differ, one noise for each value, and
the length scale of the largest marginal likelihood.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALES = (0.1, 0.3, 1.0, 3.0)
"""Squared length scales that are compared, as multiples of the number of possible members."""

LEAST_VARIANCE = 1e-3
"""Of the values, so that a few equal ones do not make all others certain."""


class GaussianProcess:
    """The posterior after values measured on sets.

    Args:
        sets: Their members, 0 or 1, ``[sets, members]``, float64.
        values: What was measured, ``[sets]``, float64.
        noise: Variance of each measurement, ``[sets]``, float64.
    """

    def __init__(self, sets: Tensor, values: Tensor, noise: Tensor) -> None:
        """Fit the process."""
        self._sets = sets
        weights = 1.0 / (noise + LEAST_VARIANCE)
        self.mean = float((values * weights).sum() / weights.sum())
        centred = (values - self.mean)[:, None]
        spread = float((weights * (centred[:, 0] ** 2 - noise)).sum() / weights.sum())
        self.variance = max(spread, LEAST_VARIANCE)
        fits = [self._fit(scale * sets.shape[1], centred, noise) for scale in SCALES]
        _, self._scale, self._factor, self._weights = max(fits, key=lambda fit: fit[0])

    def _fit(
        self, scale: float, centred: Tensor, noise: Tensor
    ) -> tuple[float, float, Tensor, Tensor]:
        """The log marginal likelihood of a squared length scale, and what predicts with it."""
        factor = torch.linalg.cholesky(self._kernel(self._sets, scale) + torch.diag(noise + 1e-9))
        weights = torch.cholesky_solve(centred, factor)
        fit = float((centred * weights).sum()) / 2 + float(factor.diagonal().log().sum())
        return -fit, scale, factor, weights

    def _kernel(self, others: Tensor, scale: float) -> Tensor:
        differing = torch.cdist(self._sets, others, p=1.0)  # members in which two sets differ
        return self.variance * torch.exp(differing * (-0.5 / scale))

    def at(self, others: Tensor) -> tuple[list[float], list[float]]:
        """Expected values of other sets, ``[others, members]``, and their standard deviations."""
        kernel = self._kernel(others, self._scale)
        means = (kernel.T @ self._weights)[:, 0] + self.mean
        known = torch.linalg.solve_triangular(self._factor, kernel, upper=False)
        left = (self.variance - (known**2).sum(0)).clamp(min=0.0)
        return means.tolist(), [math.sqrt(v) for v in left.tolist()]
