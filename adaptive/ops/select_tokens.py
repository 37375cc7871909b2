"""select_tokens: the keys with the highest scores, exactly, in ascending order of position."""

import math
from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op

I32 = torch.int32
MASKED_SHARE = 0.2


def make_inputs(  # noqa: PLR0913
    batch: int,
    kv_heads: int,
    capacity: int,
    budget: int,
    sinks: int = 0,
    recent: int = 0,
    mass: float = 1.0,
    ragged: bool = False,
    ties: bool = False,
    masked: bool = False,
    *,
    dtype: torch.dtype = torch.float32,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random scores, positive as probabilities are; ``ties`` draws few different ones."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, kv_heads, capacity, generator=rng).exp()
    if ties:
        scores = torch.randint(0, 3, scores.shape, generator=rng).float()
    if masked:
        scores[torch.rand(scores.shape, generator=rng) < MASKED_SHARE] = -math.inf
    lengths = None
    if ragged:
        lengths = torch.randint(0, capacity + 1, (batch,), generator=rng, dtype=I32).to(device)
    return scores.to(device), budget, lengths, sinks, recent, mass


def outputs(
    scores: Tensor,
    budget: int,
    lengths: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    mass: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``indices`` and ``counts`` for these arguments."""
    *heads, capacity = scores.shape  # what is wrong with them, the kernel says
    indices = scores.new_empty((*heads, max(0, min(budget, capacity))), dtype=I32)
    return indices, scores.new_empty(heads, dtype=I32)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"batch": 0, "kv_heads": 2, "capacity": 8, "budget": 4},
        {"batch": 2, "kv_heads": 2, "capacity": 0, "budget": 4},
        {"batch": 1, "kv_heads": 1, "capacity": 1, "budget": 1},
        {"batch": 2, "kv_heads": 2, "capacity": 65, "budget": 65},
        {"batch": 2, "kv_heads": 2, "capacity": 65, "budget": 64, "ties": True},
        {"batch": 2, "kv_heads": 3, "capacity": 700, "budget": 100, "sinks": 4, "recent": 16},
        {
            "batch": 3,
            "kv_heads": 2,
            "capacity": 300,
            "budget": 64,
            "sinks": 4,
            "recent": 16,
            "ragged": True,
            "masked": True,
        },
        {"batch": 2, "kv_heads": 2, "capacity": 5000, "budget": 512, "mass": 0.5, "sinks": 4},
        {
            "batch": 2,
            "kv_heads": 2,
            "capacity": 900,
            "budget": 300,
            "mass": 0.3,
            "recent": 8,
            "ties": True,
            "masked": True,
            "ragged": True,
        },
        {"batch": 1, "kv_heads": 2, "capacity": 40000, "budget": 2048, "sinks": 4, "recent": 64},
    ],
    models=[
        {"batch": 1, "kv_heads": 8, "capacity": capacity, "budget": 2048}
        for capacity in (16384, 32768, 131072)
    ],
)
def select_tokens(
    scores: Tensor,
    budget: int,
    lengths: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    mass: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose the keys with the highest scores, for every row and KV head on its own.

    Exact, and deterministic: of equal scores the lower position wins (-0 equals 0). Keys that
    score -inf are never chosen.

    Args:
        scores: ``[batch, kv_heads, capacity]``, float32, the last dimension contiguous. Not NaN.
        budget: The most keys to choose, at least 1 and at least ``sinks + recent``.
        lengths: Keys in use per row, ``[batch]``, int32, each in 0..capacity. None: all of them.
        sinks: Always choose this many from the first key on that does not score -inf.
        recent: Always choose this many of the last keys in use.
        mass: Choose as few keys as have this share of the sum of all scores in use, forced ones
            included and counted; ``budget`` is the limit. In (0, 1]; 1: choose ``budget`` keys.
            Below 1 no score may be negative or infinite, -inf aside. Sums are taken in units of
            2^-32 times the largest score of the row and head, rounded to nearest, so they do not
            depend on the order.

    Returns:
        ``(indices, counts)``, int32: ``[batch, kv_heads, min(budget, capacity)]``, ascending, -1
        after the last; and how many there are, ``[batch, kv_heads]``.

    Raises:
        ValueError: A shape, layout or option is wrong; a score is NaN, or negative or inf
            though ``mass`` is below 1. On CUDA, that row's count is -1 instead.
        TypeError: A dtype is wrong.
        IndexError: A length is out of range. On CUDA, that row's counts are -1 instead.
    """
    batch, kv_heads, capacity = scores.shape
    indices = torch.full((batch, kv_heads, min(budget, capacity)), -1, dtype=I32)
    counts = torch.zeros((batch, kv_heads), dtype=I32)
    for row in range(batch):
        length = capacity if lengths is None else int(lengths[row])
        for head in range(kv_heads):
            line = scores[row, head, :length].cpu()
            chosen = _choose(line, budget, sinks, recent, mass)
            counts[row, head] = len(chosen)
            indices[row, head, : len(chosen)] = chosen
    return indices.to(scores.device), counts.to(scores.device)


def _choose(line: Tensor, budget: int, sinks: int, recent: int, mass: float) -> Tensor:
    """Positions chosen from the scores of one row and head, ascending."""
    seen = line > -math.inf
    if not seen.any():
        return torch.empty(0, dtype=I32)
    position = torch.arange(len(line))
    first = int(seen.int().argmax())
    forced = seen & ((position < first + sinks) | (position >= len(line) - recent))
    ranked = torch.sort(line.masked_fill(~seen, -math.inf) + 0.0, descending=True, stable=True)
    order = [int(i) for i in ranked.indices if seen[i] and not forced[i]]
    chosen = forced.nonzero().flatten().tolist()
    wanted = min(budget - len(chosen), len(order))
    if mass < 1:
        unit = float(line[seen].max()) * 2.0**-32
        parts = (line.double() / unit).round() if unit > 0 else torch.zeros(len(line)).double()
        need = mass * float(parts[seen].sum()) - float(parts[forced].sum())
        held = (
            torch.cumsum(parts[torch.tensor(order, dtype=torch.int64)], 0) if order else parts[:0]
        )
        enough = int((held < need).sum()) + 1 if need > 0 else 0
        wanted = min(wanted, enough)
    return torch.tensor(sorted(chosen + order[:wanted]), dtype=I32)
