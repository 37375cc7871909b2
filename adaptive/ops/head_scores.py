"""Scores of attention heads on repeated tokens: which ones look for earlier copies.

Plain PyTorch: nearly all of the time is in matrix products that PyTorch runs at the machine's
speed, so there is no kernel to gain from.
"""

import torch
from torch import Tensor

CHUNK_TOKENS = 64
"""Queries whose weights exist at a time; memory is ``heads * CHUNK_TOKENS * tokens`` floats."""


def causal_weights(
    query: Tensor, key: Tensor, start: int, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """Return the softmax weights of some consecutive queries over all keys up to each.

    Args:
        query: ``[heads, queries, head_dim]``, at positions ``start``, ``start + 1``, ...
        key: ``[kv_heads, tokens, head_dim]``, at positions 0, 1, ...; ``kv_heads`` divides
            ``heads``. Keys after the last query are not read.
        start: Position of the first query.
        scale: Factor on the scores; None: ``1 / sqrt(head_dim)``.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they do not.

    Returns:
        ``[kv_heads, heads / kv_heads, queries, start + queries]``, float32.
    """
    heads, queries, head_dim = query.shape
    kv_heads, end = key.shape[0], start + queries
    packed = query.float().reshape(kv_heads, -1, head_dim)
    scores = packed @ key[:, :end].float().mT
    scores = scores.view(kv_heads, heads // kv_heads, queries, end)
    scores *= head_dim**-0.5 if scale is None else scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    later = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu(1)
    scores[..., start:].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, dim=-1)


def head_scores(
    query: Tensor,
    key: Tensor,
    period: int,
    start: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return how much each head looks at earlier copies of its token, and at what followed them.

    The tokens from ``start`` on repeat every ``period`` tokens. For each token that has earlier
    copies, the echo score is the causal softmax weight of all of them together, the induction score
    that of the tokens right after them (Tang et al. 2024, arXiv:2407.15891, section 3.2; Olsson et
    al. 2022, arXiv:2209.11895). Scores are means over these tokens, in [0, 1], summed in float32;
    the weights of CHUNK_TOKENS queries exist at a time, never those of all.

    Args:
        query: ``[heads, tokens, head_dim]``, as attention gets them.
        key: ``[kv_heads, tokens, head_dim]``; ``kv_heads`` divides ``heads``.
        period: Tokens from one copy to the next, at least 2.
        start: Position of the first token that is repeated.
        scale: Of the scores; None: ``1 / sqrt(head_dim)``.
        softcap: See `causal_weights`.

    Returns:
        Echo and induction scores, ``[heads]`` each, float32.

    Raises:
        ValueError: ``period`` or ``start`` is out of range, no token is repeated, or the shapes do
            not fit together.
    """
    _check(query, key, period, start)
    heads, tokens, _ = query.shape
    echo = torch.zeros(heads, device=query.device)
    induction = torch.zeros(heads, device=query.device)
    key = key.float()
    for first in range(start + period, tokens, CHUNK_TOKENS):
        chunk = query[:, first : first + CHUNK_TOKENS]
        weights = causal_weights(chunk, key, first, scale, softcap).flatten(0, 1)
        rows = torch.arange(chunk.shape[1], device=query.device)
        for back in range(period, first + len(rows) - start, period):
            copies = rows + first - back
            here = copies >= start
            echo += weights[:, rows[here], copies[here]].sum(1)
            induction += weights[:, rows[here], copies[here] + 1].sum(1)
    count = tokens - start - period
    return echo / count, induction / count


def _check(query: Tensor, key: Tensor, period: int, start: int) -> None:
    heads, tokens, _ = query.shape
    if key.shape[1:] != query.shape[1:] or heads % key.shape[0]:
        raise ValueError(
            "adaptive::head_scores: key must be [kv_heads, tokens, head_dim] for a query of "
            f"{tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if period < 2:  # noqa: PLR2004  (at 1 the token after a copy is the token itself)
        raise ValueError(f"adaptive::head_scores: period must be at least 2, got {period}")
    if not 0 <= start < tokens - period:
        raise ValueError(
            f"adaptive::head_scores: start must be from 0 to tokens - period - 1 = "
            f"{tokens - period - 1}, got {start}"
        )
