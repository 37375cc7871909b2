"""route_tokens: which tokens of each row a layer computes, by threshold or by capacity."""

from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from adaptive.ops._op import op

I32, F64 = torch.int32, torch.float64


def make_inputs(
    batch: int,
    tokens: int,
    threshold: float | None = None,
    capacity: Number | None = None,
    padded: bool = False,
    *,
    dtype: torch.dtype = torch.float32,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random scores in 0..1, of which many are equal; rows padded on the left by random lengths."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 256, (batch, tokens), generator=rng) / 256
    valid = None
    if padded:
        padding = torch.randint(0, tokens + 1, (batch, 1), generator=rng)
        valid = (torch.arange(tokens) >= padding).to(device)
    return scores.to(device), threshold, capacity, valid


def outputs(
    scores: Tensor,
    threshold: float | None = None,
    capacity: Number | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``tokens``, ``counts`` and ``slots`` for these arguments."""
    if scores.dim() != 2:  # noqa: PLR2004
        raise ValueError(
            f"adaptive::route_tokens: scores must have 2 dimensions, got shape {list(scores.shape)}"
        )
    tokens = scores.new_empty(scores.shape, dtype=I32)
    return tokens, scores.new_empty(scores.shape[:1], dtype=I32), torch.empty_like(tokens)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"batch": 0, "tokens": 9, "threshold": 0.5},
        {"batch": 2, "tokens": 0, "capacity": 0.5},
        {"batch": 3, "tokens": 1, "capacity": 0.125},
        {"batch": 3, "tokens": 33, "threshold": 0.5},
        {"batch": 5, "tokens": 40, "threshold": 0.25, "padded": True},
        {"batch": 5, "tokens": 100, "capacity": 0.3, "padded": True},
        # more than there are; ties at the border; more than one step of a warp or of a block
        {"batch": 4, "tokens": 31, "capacity": 40, "padded": True},
        {"batch": 3, "tokens": 700, "capacity": 65},
        {"batch": 2, "tokens": 5000, "capacity": 0.125, "padded": True},
        {"batch": 1, "tokens": 40000, "threshold": 0.875},
    ],
    models=[
        # A prompt of Mixture-of-Depths, one by a trained threshold, a batch of decoding rows
        {"batch": 1, "tokens": 2048, "capacity": 0.125},
        {"batch": 1, "tokens": 2048, "threshold": 0.5},
        {"batch": 64, "tokens": 1, "threshold": 0.5},
    ],
)
def route_tokens(
    scores: Tensor,
    threshold: float | None = None,
    capacity: Number | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the tokens of each row whose score reaches a threshold, or the best of them.

    Expert-choice routing of Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258) by
    ``capacity``; a decision that no other token has part in by ``threshold``.

    Args:
        scores: One for each token, ``[batch, tokens]``, float32, any stride between rows; inf and
            -inf are scores like others.
        threshold: Tokens with ``score >= threshold`` are routed, in float32; -inf routes all valid
            ones, inf those of score inf. Not NaN.
        capacity: The tokens with the highest scores are routed, of equal ones the first. A whole
            number: that many of each row, at least 1, or all valid ones if they are fewer. A
            fraction above 0 and at most 1: ``max(1, int(capacity * n))`` of a row's ``n`` valid
            tokens, in float64; so 1 routes one token and 1.0 all. A row without valid tokens routes
            none. Exactly one of ``threshold`` and ``capacity`` is given.
        valid: True where there is a token, ``[batch, tokens]``, bool, any stride between rows; the
            others are never routed and their scores not looked at. None: all of them.

    Returns:
        ``(tokens, counts, slots)``, int32. ``tokens``: positions of the routed tokens of each row,
        ascending, then -1, ``[batch, tokens]``. ``counts``: how many, ``[batch]``. ``slots``: the
        place of each token in its row of ``tokens``, -1 where it is not routed, ``[batch,
        tokens]``. A row's results depend on that row alone.

    Raises:
        ValueError: A shape, device, memory layout or option is wrong; a valid token's score is NaN.
            On CUDA, NaN makes the row's count -1 and routes none of it.
        TypeError: An argument is no tensor or no number, or its dtype is wrong.
        NotImplementedError: ``scores`` requires a gradient, which a choice does not have: detach
            it, and let it reach the loss through the weights of ``combine_tokens``.
    """
    batch, length = scores.shape
    device = scores.device
    here = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    refused = (scores.isnan() & here).any(1)
    here = here & ~refused[:, None]
    if threshold is not None:
        taken = here & (scores >= torch.tensor(threshold, dtype=F64, device=device).float())
    else:
        present = here.sum(1)
        if isinstance(capacity, float):
            room = (present.to(F64) * capacity).long().clamp(min=1)
        else:
            room = torch.full_like(present, capacity or 0)
        best = scores.masked_fill(~here, 0).argsort(dim=1, descending=True, stable=True)
        best = best.gather(1, (~here).gather(1, best).long().argsort(dim=1, stable=True))
        rank = torch.empty_like(best)
        rank.scatter_(1, best, torch.arange(length, device=device).expand(batch, -1))
        taken = here & (rank < room[:, None])
    counts = taken.sum(1)
    slots = torch.where(taken, taken.long().cumsum(1) - 1, -1)
    tokens = (~taken).long().argsort(dim=1, stable=True)
    tokens = tokens.masked_fill(torch.arange(length, device=device) >= counts[:, None], -1)
    return tokens.to(I32), counts.masked_fill(refused, -1).to(I32), slots.to(I32)
