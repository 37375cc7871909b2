"""Scores of key blocks for query blocks: what share of the softmax mass each may hold.

Plain PyTorch: the work is one matrix product of block means, which PyTorch runs at the machine's
speed, so there is no kernel to gain from.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Ranges(NamedTuple):
    """Key blocks that each block of queries may see: those from ``first`` to ``last``.

    Attributes:
        first: ``[batch or 1, query_blocks]``, int64.
        last: Likewise; below ``first`` where no query of the block sees any key.
    """

    first: Tensor
    last: Tensor

    def visible(self, blocks: int) -> Tensor:
        """Which of ``blocks`` key blocks are seen, ``[batch or 1, query_blocks, blocks]``, bool."""
        number = torch.arange(blocks, device=self.first.device)
        return (number >= self.first[..., None]) & (number <= self.last[..., None])


def block_ranges(
    query_tokens: int,
    tokens: int,
    block_size: int = 64,
    offsets: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Ranges:
    """Return which key blocks the causal mask leaves to each block of queries.

    A block of queries that two sequences share sees from the first block of the earlier one on.

    Args:
        query_tokens: The last ones of ``tokens``; query block n starts at the n-th multiple of
            ``block_size`` among them, which need not be a multiple among ``tokens``.
        tokens: Keys.
        block_size: Tokens of a block.
        offsets: As for ``local_attention``, ``[batch, sequences + 1]``.
        device: Where to make it.
    """
    start = tokens - query_tokens
    low = torch.arange(start, tokens, block_size, device=device)[None]
    high = (low + block_size).clamp(max=tokens) - 1
    if offsets is None:
        return Ranges(torch.zeros_like(low), high // block_size)
    cuts = offsets.long()
    low, high = low.maximum(cuts[:, :1]), high.minimum(cuts[:, -1:] - 1)
    number = torch.searchsorted(cuts, low, right=True) - 1
    first = cuts.gather(1, number.clamp(0, cuts.shape[1] - 1)) // block_size
    none = low > high
    return Ranges(first.masked_fill(none, 0), (high // block_size).masked_fill(none, -1))


def score_blocks(
    query_means: Tensor,
    key_means: Tensor,
    ranges: Ranges,
    scale: float | None = None,
    softcap: float = 0.0,
    per_head: bool = False,
) -> Tensor:
    """Return the softmax over the key blocks that a query block sees, of what their means score.

    One mean stands for each block, as in the block-sparse pattern of MInference (Jiang et al. 2024,
    arXiv:2407.02490); what it misses is a single key that differs from its block.

    Args:
        query_means: `pool_blocks` of the queries, ``[batch, heads, query_blocks, head_dim]``.
        key_means: Of the keys, ``[batch, kv_heads, blocks, head_dim]``; ``kv_heads`` divides
            ``heads``.
        ranges: See `block_ranges`.
        scale: Factor on the scores; None: ``1 / sqrt(head_dim)``.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they do not.
        per_head: One score for each head, instead of the mean over those that share a KV head.

    Returns:
        ``[batch, kv_heads or heads, query_blocks, blocks]``, float32: at least 0, a row's sum is 1
        to rounding; -inf for blocks that are not seen.

    Raises:
        ValueError: The shapes do not fit together.
    """
    batch, heads, query_blocks, head_dim = query_means.shape
    kv_heads, blocks = key_means.shape[1], key_means.shape[2]
    if key_means.shape != (batch, kv_heads, blocks, head_dim) or heads % max(kv_heads, 1):
        raise ValueError(
            "adaptive::score_blocks: key_means must be [batch, kv_heads, blocks, head_dim] for "
            f"query_means of {tuple(query_means.shape)}, got {tuple(key_means.shape)}"
        )
    unseen = ~ranges.visible(blocks)[:, None]
    if unseen.shape[0] not in (1, batch) or unseen.shape[2] != query_blocks:
        raise ValueError(
            f"adaptive::score_blocks: ranges must be [{batch} or 1, {query_blocks}], got "
            f"{list(ranges.first.shape)}"
        )
    group = heads // max(kv_heads, 1)
    packed = query_means.float().reshape(batch, kv_heads, group * query_blocks, head_dim)
    scores = packed @ key_means.float().mT
    scores *= 1 / math.sqrt(head_dim) if scale is None else scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(batch, heads, query_blocks, blocks).masked_fill_(unseen, -torch.inf)
    scores = torch.softmax(scores, dim=-1)
    if not per_head:
        scores = scores.view(batch, kv_heads, group, query_blocks, blocks).mean(2)
    return scores.masked_fill_(unseen, -torch.inf)


def score_lines(
    query: Tensor,
    key: Tensor,
    block_size: int = 64,
    offsets: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    rows: int = 64,
    per_head: bool = False,
) -> Tensor:
    """Return scores as `score_blocks`, from the columns and diagonals that the last queries use.

    The softmax weights of the last ``rows`` queries are added up by key (a *vertical* line: keys
    that everyone reads) and by distance (a *slash*: keys that everyone reads so far back), after
    the vertical-slash pattern of MInference (Jiang et al. 2024, arXiv:2407.02490), here by blocks:
    a block's score is the weight of its keys plus, for each distance, the weight of that distance
    times the share of the block's queries whose key it puts into the block.

    Args:
        query: ``[batch, heads, query_tokens, head_dim]``, the last of ``key``'s tokens.
        key: ``[batch, kv_heads, tokens, head_dim]``.
        block_size: Tokens of a block.
        offsets: As for ``local_attention``; the last queries are those of a row's last sequence.
        scale: As for `score_blocks`.
        softcap: As for `score_blocks`.
        rows: Queries that are looked at.
        per_head: As for `score_blocks`.

    Returns:
        As `score_blocks`, but a row's sum is not 1.
    """
    batch, heads, query_tokens, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group, start = heads // kv_heads, tokens - query_tokens
    ranges = block_ranges(query_tokens, tokens, block_size, offsets, query.device)
    query_blocks, blocks = ranges.first.shape[1], -(-tokens // block_size)
    cuts = [[0, tokens]] * batch if offsets is None else offsets.tolist()
    scores = query.new_zeros(
        (batch, heads if per_head else kv_heads, query_blocks, blocks), dtype=torch.float32
    )
    # How many blocks query block n starts after key block j, counted from 1: a diagonal of blocks.
    away = torch.arange(query_blocks, device=query.device)[:, None] + start // block_size + 1
    away = (away - torch.arange(blocks, device=query.device)).clamp(min=0)
    for row, row_cuts in enumerate(cuts):
        end = row_cuts[-1]
        first = max((cut for cut in row_cuts if cut < end), default=end)
        number = min(rows, end - max(first, start))
        if number <= 0:
            continue
        for kv_head in range(kv_heads):
            mine = slice(kv_head * group, kv_head * group + group)
            last = query[row, mine, end - number - start : end - start].float()
            logits = last @ key[row, kv_head, first:end].float().mT
            logits *= 1 / math.sqrt(head_dim) if scale is None else scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            later = torch.ones(number, number, dtype=torch.bool, device=query.device).triu(1)
            logits[..., -number:].masked_fill_(later, -torch.inf)
            weights = torch.softmax(logits, dim=-1) / number
            if not per_head:
                weights = weights.mean(0, keepdim=True)
            columns = torch.zeros(*weights.shape[:1], blocks * block_size, device=query.device)
            columns[:, first:end] = weights.sum(1)
            vertical = columns.view(-1, blocks, block_size).sum(2)
            slash = _block_diagonals(weights, blocks, block_size, start % block_size)
            found = vertical[:, None] + slash[:, away]
            to = mine if per_head else slice(kv_head, kv_head + 1)
            scores[row, to] = found
    return scores.masked_fill_(~ranges.visible(blocks)[:, None], -torch.inf)


def _block_diagonals(weights: Tensor, blocks: int, block_size: int, phase: int) -> Tensor:
    """What blocks hold of each distance's weight, by how far queries start after keys.

    Args:
        weights: ``[heads, rows, tokens]``, of the last queries.
        blocks: Key blocks.
        block_size: Their size.
        phase: Position of the first query of a block within its key block.

    Returns:
        ``[heads, blocks + 1]``: entry m is for queries that start ``(m - 1) * block_size + phase``
        tokens after the keys.
    """
    heads, rows, tokens = weights.shape
    # Row i of the padded weights, read from its i-th entry on, has its distances in one column.
    padded = torch.nn.functional.pad(weights, (rows, 0))
    width = rows + tokens
    strides = (padded.stride(0), width + 1, 1)
    by_distance = padded.as_strided((heads, rows, tokens + 1), strides).sum(1).flip(1)
    # Distance d = phase + (m - 1) * block_size + r lies to 1 - r / block_size in entry m, and to
    # the rest in the next one.
    before = block_size - phase
    room = (blocks + 1) * block_size
    by_distance = torch.nn.functional.pad(by_distance, (before, 0))[:, :room]
    by_distance = torch.nn.functional.pad(by_distance, (0, room - by_distance.shape[1]))
    by_distance = by_distance.view(heads, blocks + 1, block_size)
    part = torch.arange(block_size, device=weights.device) / block_size
    near, far = (by_distance * (1 - part)).sum(2), (by_distance * part).sum(2)
    near[:, 1:] += far[:, :-1]
    return near
