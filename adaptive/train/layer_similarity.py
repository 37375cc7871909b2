"""layer_similarity(model, batches): how little each layer changes the states that it gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.policy.mixture_of_depths import UNITS
from adaptive.train._batch import read_batches
from adaptive.train._checks import causal_lm
from adaptive.train._routers import Gates, gated


def layer_similarity(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    unit: str = "attention",
) -> tuple[float, ...]:
    """Measure how little each layer, or its attention or MLP, changes the states it gets.

    Layers with the highest cosine between states before and after are those to leave out first:
    ``adaptive.MixtureOfDepths.drop(adaptive.train.least_changing(similarity, 4), unit=unit)``.

    Args:
        model: As for `tune_router`.
        batches: Token ids ``[batch, tokens]``, or mappings as for `tune_router`; each runs once.
        unit: "attention", "mlp" or "block".

    Returns:
        The mean cosine of each layer, over all tokens that are not padding.

    Raises:
        UnknownFamily, UnsupportedModel, PatchConflict, TypeError, ValueError: As `tune_router`.
    """
    given = list(batches) if isinstance(batches, Iterable) else batches
    if unit not in UNITS:
        raise ValueError(f"adaptive: unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if isinstance(given, list) and not given:
        raise ValueError("adaptive: batches must hold a batch, got none")
    root, family, total = causal_lm(model, 0.0)
    device = next(root.parameters()).device
    gates = Gates(tuple(range(total)), unit, "token", torch.zeros(total, 1), similarity={})
    with gated(root, family, gates), torch.no_grad():
        for batch in read_batches(given, len(given), device):
            gates.mask = batch.inputs.get("attention_mask")
            root(**batch.inputs, use_cache=False)
    assert gates.similarity is not None
    return tuple(float(torch.cat(gates.similarity[i]).mean()) for i in range(total))


def least_changing(
    similarity: Sequence[float], count: int, spared: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """Return the ``count`` layers of highest similarity, ascending, none of the ``spared`` ones.

    Raises:
        ValueError: There are not so many.
    """
    free = [layer for layer in range(len(similarity)) if layer not in spared]
    if type(count) is not int or not 1 <= count <= len(free):
        raise ValueError(f"adaptive: count must be from 1 to {len(free)}, got {count!r}")
    best = sorted(free, key=lambda layer: (-similarity[layer], layer))[:count]
    return tuple(sorted(best))
