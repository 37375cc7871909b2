"""Lists of key blocks for block_sparse_attention, chosen by score for each block of queries.

Plain PyTorch around `select_tokens`, which does the ranking.
"""

import math

import torch
from torch import Tensor

from adaptive.ops.score_blocks import Ranges
from adaptive.ops.select_tokens import select_tokens


def choose_blocks(
    scores: Tensor,
    ranges: Ranges,
    budget: int | float | None = None,
    mass: float | None = None,
    sinks: int = 1,
    diagonal: int = 1,
    dense: int = 1,
) -> tuple[Tensor, Tensor]:
    """Choose the key blocks with the highest scores, for every block of queries on its own.

    Exact and deterministic: of equal scores the earlier block wins.

    Args:
        scores: ``[batch, lists, query_blocks, blocks]``, float32; -inf for blocks that are not
            seen. With ``mass`` none may be negative or infinite otherwise. See `score_blocks`.
        ranges: The blocks that are seen; see `block_ranges`.
        budget: Most blocks to choose, forced ones included: a count, or as a float a share, above 0
            and at most 1, of the blocks that are seen, rounded up. Forced ones are chosen anyway.
        mass: Instead of ``budget``: choose as few blocks as have this share of the sum of all
            scores of the row, forced ones included and counted; above 0 and at most 1.
        sinks: Always choose this many of the first blocks seen.
        diagonal: Always choose this many of the last blocks seen: those of the queries themselves.
            Where query blocks do not start where key blocks do, that is two.
        dense: Choose every block that is seen for this many of a row's last blocks of queries,
            those of padding not counted.

    Returns:
        ``(indices, counts)`` as `block_sparse_attention` takes them: ``[batch, lists, query_blocks,
        blocks]``, int32, ascending, -1 after the last; and how many there are, ``[batch, lists,
        query_blocks]``, int32.

    Raises:
        ValueError: Not exactly one of ``budget`` and ``mass`` is given, or a number is out of its
            range, or a score is NaN, or negative or infinite where ``mass`` is given.
    """
    _check(budget, mass, sinks, diagonal, dense)
    batch, lists, query_blocks, blocks = scores.shape
    flat = scores.reshape(-1, 1, blocks)
    lengths = (ranges.last + 1).int().expand(batch, -1)[:, None].expand(-1, lists, -1)
    lengths = lengths.reshape(-1).contiguous()
    seen = (ranges.last - ranges.first + 1).expand(batch, -1)
    forced = sinks + diagonal
    if budget is None:
        share = 1.0 if mass is None else mass
        indices, counts = select_tokens(flat, max(blocks, forced), lengths, sinks, diagonal, share)
    else:
        most = _budgets(seen, budget, forced)[:, None].expand(-1, lists, -1).reshape(-1)
        indices, counts = _by_budget(flat, most, lengths, sinks, diagonal)
    indices, counts = indices.view(scores.shape), counts.view(scores.shape[:3])
    if dense == 0:
        return indices, counts
    number = torch.arange(query_blocks, device=scores.device)
    last = torch.where(seen > 0, number, -1).amax(1, keepdim=True) if query_blocks else seen
    every = ((number > last - dense) & (seen > 0))[:, None]
    place = torch.arange(blocks, device=scores.device)
    whole = (ranges.first[..., None] + place).masked_fill(place >= seen[..., None], -1)
    indices = torch.where(every[..., None], whole[:, None].int(), indices)
    return indices, torch.where(every, seen[:, None].int(), counts)


def _budgets(seen: Tensor, budget: int | float, forced: int) -> Tensor:
    """Blocks to choose of the ``seen`` ones, int64."""
    if isinstance(budget, int):
        return torch.full_like(seen, max(budget, forced))
    return (seen.double() * budget).ceil().long().clamp(min=forced)


def _by_budget(
    flat: Tensor, budgets: Tensor, lengths: Tensor, sinks: int, recent: int
) -> tuple[Tensor, Tensor]:
    """`select_tokens` with a budget for each row."""
    indices = torch.full((len(flat), flat.shape[2]), -1, dtype=torch.int32, device=flat.device)
    counts = torch.zeros(len(flat), dtype=torch.int32, device=flat.device)
    for budget in budgets.unique().tolist():
        rows = (budgets == budget).nonzero()[:, 0]
        found, number = select_tokens(flat[rows], budget, lengths[rows], sinks, recent)
        indices[rows, : found.shape[2]] = found[:, 0]
        counts[rows] = number[:, 0]
    return indices, counts


def _check(
    budget: int | float | None, mass: float | None, sinks: int, diagonal: int, dense: int
) -> None:
    if (budget is None) == (mass is None):
        raise ValueError(
            "adaptive::choose_blocks: exactly one of budget and mass must be given, got "
            f"{budget} and {mass}"
        )
    for name, value, least in (("sinks", sinks, 0), ("diagonal", diagonal, 1), ("dense", dense, 0)):
        if value < least:
            raise ValueError(
                f"adaptive::choose_blocks: {name} must be at least {least}, got {value}"
            )
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"adaptive::choose_blocks: budget must be at least 1, got {budget}")
    for name, share in (("budget", budget), ("mass", mass)):
        wrong = isinstance(share, float) and not (math.isfinite(share) and 0 < share <= 1)
        if wrong:
            raise ValueError(
                f"adaptive::choose_blocks: {name} must be above 0 and at most 1, got {share}"
            )
