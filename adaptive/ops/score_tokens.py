"""score_tokens: what weight the softmax gives to each key of a KV cache, for every KV head."""

import math
from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.decode_attention import decode_attention
from adaptive.ops.decode_attention import make_inputs as make_decode_inputs

F32 = torch.float32
REDUCTIONS = ("sum", "max", "logit")
EDGES: list[dict[str, Any]] = [
    # an empty batch, no query token, an empty cache
    {"batch": 0, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64},
    {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64, "query_tokens": 0},
    {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 0, "head_dim": 64},
    # one key; around a block of 64; an item of 1024; group ratios 3, 7; several query tokens
    {"batch": 1, "heads": 1, "kv_heads": 1, "capacity": 1, "head_dim": 128},
    {"batch": 2, "heads": 4, "kv_heads": 4, "capacity": 65, "head_dim": 96, "reduce": "max"},
    {"batch": 2, "heads": 6, "kv_heads": 2, "capacity": 1100, "head_dim": 40, "ragged": True},
    {"batch": 1, "heads": 7, "kv_heads": 1, "capacity": 300, "head_dim": 256, "reduce": "logit"},
    {
        "batch": 2,
        "heads": 8,
        "kv_heads": 2,
        "capacity": 130,
        "head_dim": 128,
        "query_tokens": 16,
        "ragged": True,
        "mask": "bool",
    },
    {
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "capacity": 100,
        "head_dim": 80,
        "query_tokens": 3,
        "mask": "add",
        "reduce": "max",
    },
]


def make_inputs(reduce: str = "sum", **sizes: Any) -> tuple[Any, ...]:
    """Random arguments; see ``decode_attention``."""
    query, key, _, lengths, mask = make_decode_inputs(**sizes)
    return query, key, lengths, mask, None, 0.0, True, reduce


def outputs(
    query: Tensor,
    key: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    reduce: str = "sum",
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``scores`` and ``lse`` for these arguments."""
    batch, heads, tokens, _ = query.shape
    scores = torch.empty((batch, key.shape[1], key.shape[2]), dtype=F32, device=query.device)
    return scores, torch.empty((batch, heads, tokens), dtype=F32, device=query.device)


@op(outputs=outputs, inputs=make_inputs, edges=EDGES, models=decode_attention.models)
def score_tokens(
    query: Tensor,
    key: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    reduce: str = "sum",
) -> tuple[Tensor, Tensor]:
    """Score every key of a cache for the query tokens of each KV head, without reading values.

    Selection ranks keys by it (Tang et al. 2024, arXiv:2406.10774; Yang et al. 2024,
    arXiv:2410.05076; per KV head as in arXiv:2512.16391).

    Args:
        query: As for ``decode_attention``.
        key: As for ``decode_attention``.
        lengths: As for ``decode_attention``.
        mask: As for ``decode_attention``.
        scale: As for ``decode_attention``.
        softcap: As for ``decode_attention``.
        causal: As for ``decode_attention``.
        reduce: What becomes of the query heads of a group and the query tokens: "sum" or "max" of
            their softmax probabilities, or "logit": the maximum of the scores before the softmax.

    Returns:
        ``(scores, lse)``. ``scores``: ``[batch, kv_heads, capacity]``, float32; -inf where no query
        of the row and group sees the key. ``lse``: ``[batch, heads, query_tokens]``, float32, as
        from ``decode_attention``.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: As ``decode_attention``;
            ``reduce`` is unknown.
    """
    values = torch.zeros_like(key[..., :1])
    _, lse = decode_attention.reference(query, key, values, lengths, mask, scale, softcap, causal)
    return reduce_logits(
        logits(query, key, lengths, mask, scale, softcap, causal), lse, key.shape[1], reduce
    ), lse


def logits(
    query: Tensor,
    key: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    causal: bool,
) -> Tensor:
    """Scores before the softmax, ``[batch, heads, query_tokens, capacity]``; unseen keys: -inf."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    position = torch.arange(capacity, device=query.device)
    rows = torch.full((batch,), capacity, device=query.device) if lengths is None else lengths
    last = rows[:, None].expand(batch, tokens) - 1
    if causal:
        last = last - tokens + 1 + torch.arange(tokens, device=query.device)
    seen = (position <= last[:, None, :, None]).expand(batch, heads, tokens, capacity)
    keys = key.float().repeat_interleave(heads // max(kv_heads, 1), dim=1)
    score = (query.float() * scale) @ keys.transpose(2, 3)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        score = score + mask
        seen = seen & (mask != -math.inf)
    return score.masked_fill(~seen, -math.inf)


def reduce_logits(score: Tensor, lse: Tensor, kv_heads: int, reduce: str) -> Tensor:
    """One number per key and KV head from ``[batch, heads, query_tokens, capacity]`` logits."""
    batch, heads, tokens, capacity = score.shape
    unseen = score == -math.inf
    if reduce != "logit":
        score = torch.exp(score - lse.masked_fill(lse == -math.inf, 0)[..., None])
    rows = heads // max(kv_heads, 1) * tokens
    if rows == 0:
        return score.new_full((batch, kv_heads, capacity), -math.inf)
    score = score.reshape(batch, kv_heads, rows, capacity)
    unseen = unseen.reshape(batch, kv_heads, rows, capacity)
    made = score.masked_fill(unseen, 0).sum(2) if reduce == "sum" else score.amax(2)
    return made.masked_fill(unseen.all(2), -math.inf)
