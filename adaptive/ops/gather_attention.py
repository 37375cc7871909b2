"""gather_attention: a few query tokens attend to chosen keys of a KV cache, read in place."""

import math
from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.decode_attention import decode_attention
from adaptive.ops.decode_attention import make_inputs as make_decode_inputs
from adaptive.ops.decode_attention import outputs as decode_outputs


def make_inputs(
    chosen: int,
    extra: int = 0,
    page_size: int = 1,
    **sizes: Any,
) -> tuple[Any, ...]:
    """Random arguments; ``chosen`` pages at most for each row and KV head, ``extra`` tokens."""
    query, key, value, lengths, mask = make_decode_inputs(**sizes)
    batch, kv_heads, capacity, head_dim = key.shape
    rng = torch.Generator().manual_seed(sizes.get("seed", 0) + 1)
    pages = -(-capacity // page_size)
    chosen = min(chosen, pages)
    noise = torch.rand(batch, kv_heads, pages, generator=rng)
    indices = noise.argsort(-1)[..., :chosen].sort(-1).values.to(torch.int32)
    counts = torch.randint(chosen // 2, chosen + 1, (batch, kv_heads), generator=rng)
    found = [query, key, value, indices.to(key.device), counts.to(key.device, torch.int32)]
    found += [lengths, mask]
    if extra:
        shape = (batch, kv_heads, extra, head_dim)
        found += [torch.randn(shape, generator=rng).to(key.device, key.dtype) for _ in range(2)]
        found += [torch.randn(shape[:3], generator=rng).to(key.device)]
    else:
        found += [None, None, None]
    return *found, None, 0.0, True, page_size


def outputs(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    page_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` and ``lse`` for these arguments."""
    return decode_outputs(query, key, value)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        # an empty batch, no query token, an empty cache, nothing chosen
        {"batch": 0, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64, "chosen": 2},
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "capacity": 8,
            "head_dim": 64,
            "query_tokens": 0,
            "chosen": 2,
        },
        {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 0, "head_dim": 64, "chosen": 2},
        {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64, "chosen": 0},
        # one key; about a block of 64; more than an item of 1024; group ratios 3 and 7
        {"batch": 1, "heads": 1, "kv_heads": 1, "capacity": 1, "head_dim": 128, "chosen": 1},
        {"batch": 2, "heads": 4, "kv_heads": 4, "capacity": 99, "head_dim": 96, "chosen": 65},
        {"batch": 2, "heads": 6, "kv_heads": 2, "capacity": 2500, "head_dim": 40, "chosen": 1300},
        {
            "batch": 1,
            "heads": 7,
            "kv_heads": 1,
            "capacity": 300,
            "head_dim": 256,
            "chosen": 70,
            "extra": 1,
        },
        # pages, ragged, masked, several query tokens, extra tokens
        {
            "batch": 2,
            "heads": 8,
            "kv_heads": 2,
            "capacity": 130,
            "head_dim": 128,
            "query_tokens": 16,
            "ragged": True,
            "mask": "bool",
            "chosen": 5,
            "page_size": 16,
        },
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "capacity": 200,
            "head_dim": 80,
            "query_tokens": 3,
            "mask": "add",
            "chosen": 40,
            "extra": 3,
        },
        {
            "batch": 3,
            "heads": 13,
            "kv_heads": 1,
            "capacity": 70,
            "head_dim": 72,
            "ragged": True,
            "chosen": 20,
            "page_size": 2,
            "extra": 1,
        },
    ],
    models=[
        {
            "batch": 1,
            "heads": 32,
            "kv_heads": 8,
            "capacity": capacity,
            "head_dim": 128,
            "chosen": 2048,
        }
        for capacity in (16384, 32768, 131072)
    ],
)
def gather_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    page_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attend from 1..16 query tokens to the chosen keys alone; no other key is read.

    As ``decode_attention`` with a mask that excludes what was not chosen, at the cost of what was.

    Args:
        query: As for ``decode_attention``.
        key: As for ``decode_attention``.
        value: As for ``decode_attention``.
        indices: Chosen tokens or pages, ``[batch, kv_heads, chosen]``, int32; the first ``counts``
            of each row and head strictly ascending, the rest ignored.
        counts: How many, ``[batch, kv_heads]``, int32, each in 0..chosen.
        lengths: As for ``decode_attention``; chosen keys beyond the length are left out.
        mask: As for ``decode_attention``, by position in the cache.
        extra_key: Tokens besides the cache that every query sees, whatever lengths, mask and
            causality say: ``[batch, kv_heads, extra, head_dim]``, dtype of ``key``, the last
            dimension contiguous; at most 64. All three or none.
        extra_value: As ``extra_key``.
        extra_bias: Added to their scores after scaling and capping; ``[batch, kv_heads, extra]``,
            float32; ``log(n)`` counts a token n times, -inf leaves it out.
        scale: As for ``decode_attention``.
        softcap: As for ``decode_attention``.
        causal: As for ``decode_attention``, by position in the cache.
        page_size: Tokens of a page, a power of two of at most 64; page p is the keys from
            ``p * page_size`` on. 1: ``indices`` are tokens.

    Returns:
        ``(out, lse)`` as from ``decode_attention``, over the chosen and the extra tokens.

    Raises:
        ValueError, TypeError, NotImplementedError: As ``decode_attention``.
        IndexError: A length, count or index is out of range, or indices do not ascend. On CUDA,
            that row's results are NaN instead.
    """
    batch, heads, tokens, _ = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    device = query.device
    # Which keys were chosen, [batch, kv_heads, capacity].
    listed = torch.arange(indices.shape[2], device=device) < counts[..., None]
    pages = -(-capacity // page_size)
    page = indices.long().masked_fill(~listed, pages)
    taken = torch.zeros(batch, kv_heads, pages + 1, dtype=torch.bool, device=device)
    taken = taken.scatter(2, page, True)[..., :pages]
    taken = taken.repeat_interleave(page_size, dim=2)[..., :capacity]
    taken = taken.repeat_interleave(heads // max(kv_heads, 1), dim=1)[:, :, None]

    rows = torch.full((batch,), capacity, device=device) if lengths is None else lengths
    last = rows[:, None].expand(batch, tokens) - 1
    if causal:
        last = last - tokens + 1 + torch.arange(tokens, device=device)
    seen = taken & (torch.arange(capacity, device=device) <= last[:, None, :, None])
    bias = torch.zeros(seen.shape, device=device)
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
    bias = bias.masked_fill(~seen, -math.inf)
    if extra_key is not None and extra_value is not None and extra_bias is not None:
        extra = extra_bias.repeat_interleave(heads // kv_heads, dim=1)[:, :, None]
        bias = torch.cat([bias, extra.expand(batch, heads, tokens, -1)], dim=3)
        key, value = torch.cat([key, extra_key], dim=2), torch.cat([value, extra_value], dim=2)
    return decode_attention.reference(
        query, key, value, mask=bias, scale=scale, softcap=softcap, causal=False
    )
