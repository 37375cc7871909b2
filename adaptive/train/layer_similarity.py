"""layer_similarity(model, batches): how little each layer changes the states that it gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.policy.mixture_of_depths import UNITS
from adaptive.train._checks import causal_lm
from adaptive.train._layer_changes import watch_layers


def layer_similarity(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    unit: str = "attention",
) -> tuple[float, ...]:
    """Measure how little each layer, or its attention or MLP, changes the states it gets.

    Of a block the cosine is between the states that it gets and those that it puts out (Men et al.
    2024, arXiv:2403.03853); of its attention or MLP between what the layer puts out with and
    without it. Those with the highest are to be left out first:
    ``adaptive.MixtureOfDepths.drop(adaptive.train.least_changing(similarity, 4), unit=unit)``.

    Args:
        model: As for `tune_router`.
        batches: Token ids ``[batch, tokens]``, or mappings as for `tune_router`; each runs once.
        unit: "attention", "mlp" or "block".

    Returns:
        The mean cosine of each layer, over all tokens that are not padding.

    Raises:
        UnknownFamily, UnsupportedModel, PatchConflict, TypeError, ValueError: As `tune_router`.
        FloatingPointError: What a layer puts out is not finite; the first is named.
    """
    if unit not in UNITS:
        raise ValueError(f"adaptive: unit must be one of {', '.join(UNITS)}, got {unit!r}")
    root, family, total = causal_lm(model, 0.0)
    found: list[list[Tensor]] = [[] for _ in range(total)]

    def see(index: int, reads: Tensor, cosines: Tensor, weights: Tensor) -> None:
        known = cosines[weights > 0]
        if not known.isfinite().all():
            raise FloatingPointError(
                f"adaptive: what layer {index} puts out must be finite, got NaN or infinity"
            )
        found[index].append(known)

    watch_layers(root, family, batches, unit=unit, layers=range(total), see=see)
    return tuple(float(torch.cat(cosines).mean()) for cosines in found)


def least_changing(
    similarity: Sequence[float], count: int, spared: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """Return the ``count`` layers of highest similarity, ascending, none of the ``spared`` ones.

    Raises:
        ValueError: There are not so many, or a similarity is NaN.
    """
    free = [layer for layer in range(len(similarity)) if layer not in spared]
    if type(count) is not int or not 1 <= count <= len(free):
        raise ValueError(f"adaptive: count must be from 1 to {len(free)}, got {count!r}")
    for layer in free:
        if math.isnan(similarity[layer]):
            raise ValueError(f"adaptive: similarity must hold numbers, got NaN of layer {layer}")
    best = sorted(free, key=lambda layer: (-similarity[layer], layer))[:count]
    return tuple(sorted(best))
