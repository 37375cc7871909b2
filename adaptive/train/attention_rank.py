"""attention_rank(model, batches): how much the attention maps of each layer tell tokens apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.evaluating import evaluating
from adaptive.train._batch import read_all
from adaptive.train._checks import causal_lm
from adaptive.train.layer_similarity import least_changing


def attention_rank(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    tolerance: float | None = None,
) -> tuple[float, ...]:
    """Measure the rank of each layer's attention maps, as a share of the tokens.

    ARank of gamma-MoD (Luo et al. 2024, arXiv:2410.13859): where the map of a layer has a low rank,
    many of its tokens look at the same, and the layer is one to route. The maps are those of
    transformers' eager attention, without padding: memory grows with the square of the tokens.

    Args:
        model: As for `tune_router`.
        batches: Token ids ``[batch, tokens]``, or mappings as for `tune_router`; each runs once.
        tolerance: Singular values above this share of the largest count, in (0, 1); None: those
            above what rounding hides, as `torch.linalg.matrix_rank`.

    Returns:
        For each layer the mean over heads and sequences, above 0 and at most 1.

    Raises:
        UnknownFamily, UnsupportedModel, PatchConflict, TypeError, ValueError: As `tune_router`.
    """
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 < tolerance < 1):
        raise ValueError(f"adaptive: tolerance must be in (0, 1), or None, got {tolerance!r}")
    root, _, layers = causal_lm(model, 0.0)
    device = next(root.parameters()).device
    shares: list[list[Tensor]] = [[] for _ in range(layers)]
    with _eager(root), torch.no_grad():
        for batch in read_all(batches, device):
            out: Any = root(**batch.inputs, use_cache=False, output_attentions=True)
            mask = batch.inputs.get("attention_mask")
            for layer, maps in enumerate(out.attentions):
                shares[layer] += _shares(maps, mask, tolerance)
    return tuple(float(torch.stack(layer).mean()) for layer in shares)


def _shares(maps: Tensor, mask: Tensor | None, tolerance: float | None) -> list[Tensor]:
    """Ranks of ``[batch, heads, tokens, tokens]`` over the tokens, the mean of each sequence."""
    found = []
    for row, each in enumerate(maps.float()):
        real = slice(None) if mask is None else mask[row].nonzero()[:, 0]
        seen = each[:, real][:, :, real]
        if seen.shape[1]:
            ranks = torch.linalg.matrix_rank(seen, rtol=tolerance)
            found.append(ranks.float().mean() / seen.shape[1])
    return found


@contextmanager
def _eager(root: nn.Module) -> Iterator[None]:
    """Let the model run eager attention and nothing drop out; afterwards it is as before."""
    config: Any = root.config
    before = config._attn_implementation
    with evaluating(root):
        try:
            root.set_attn_implementation("eager")  # type: ignore[operator]
            yield
        finally:
            root.set_attn_implementation(before)  # type: ignore[operator]


def lowest_rank(
    ranks: Sequence[float], count: int, spared: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """Return the ``count`` layers of lowest rank, ascending, none of the ``spared`` ones.

    Raises:
        ValueError: There are not so many, or a rank is no number.
    """
    if any(math.isnan(rank) for rank in ranks):
        raise ValueError(f"adaptive: ranks must be numbers, got {list(ranks)}")
    return least_changing([-rank for rank in ranks], count, spared)
