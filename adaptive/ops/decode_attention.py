"""decode_attention: a few query tokens attend to a long, strided KV cache."""

import math
from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op

MAX_QUERY_TOKENS = 16
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 32, 256, 8
F32 = torch.float32
TAKEN_SHARE = 0.7  # of the keys, in the masks that make_inputs draws
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the native kernels take this head size and this dtype."""
    in_range = MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0
    return in_range and dtype in DTYPES


def make_inputs(  # noqa: PLR0913
    batch: int,
    heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    query_tokens: int = 1,
    ragged: bool = False,
    mask: str | None = None,
    cache_batch: int | None = None,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments; ``ragged`` draws lengths, ``mask`` is None, "bool" or "add".

    With ``cache_batch`` the cache has so many rows, and each row of the query draws one.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng).to(device=device, dtype=dtype)

    query = draw(batch, heads, query_tokens, head_dim)
    held = batch if cache_batch is None else cache_batch
    key = draw(held, kv_heads, capacity, head_dim)
    value = draw(held, kv_heads, capacity, head_dim)
    lengths = None
    if ragged:
        lengths = torch.randint(0, capacity + 1, (batch,), generator=rng, dtype=torch.int32)
        lengths = lengths.to(device)
    taken: Tensor | None = None
    if mask is not None:
        taken = torch.rand(batch, 1, query_tokens, capacity, generator=rng) < TAKEN_SHARE
        if mask == "add":
            noise = torch.randn(batch, 1, query_tokens, capacity, generator=rng)
            taken = noise.masked_fill(~taken, -math.inf)
        taken = taken.to(device)
    if cache_batch is None:
        return query, key, value, lengths, taken
    rows = torch.randint(0, cache_batch, (batch,), generator=rng).to(device)
    return query, key, value, lengths, taken, None, 0.0, True, rows


def outputs(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    cache_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` and ``lse`` for these arguments."""
    if query.dim() != 4:  # noqa: PLR2004
        raise ValueError(
            "adaptive::decode_attention: query must have 4 dimensions, "
            f"got shape {list(query.shape)}"
        )
    batch, heads, tokens, width = query.shape
    strides = (tokens * heads * width, width, heads * width, 1)
    device = query.device
    out = torch.empty_strided((batch, heads, tokens, width), strides, dtype=F32, device=device)
    return out, torch.empty((batch, heads, tokens), dtype=F32, device=device)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        # an empty batch, no query token, an empty cache
        {"batch": 0, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64},
        {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64, "query_tokens": 0},
        {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 0, "head_dim": 64},
        # one key; one more than a block of 64; multi-head; group ratios 3, 7 and 13
        {"batch": 1, "heads": 1, "kv_heads": 1, "capacity": 1, "head_dim": 128},
        {"batch": 2, "heads": 4, "kv_heads": 4, "capacity": 65, "head_dim": 96},
        {"batch": 2, "heads": 6, "kv_heads": 2, "capacity": 129, "head_dim": 40, "ragged": True},
        {"batch": 1, "heads": 7, "kv_heads": 1, "capacity": 300, "head_dim": 256},
        {"batch": 3, "heads": 13, "kv_heads": 1, "capacity": 70, "head_dim": 72, "ragged": True},
        # several query tokens, alone, ragged and masked
        {"batch": 1, "heads": 8, "kv_heads": 2, "capacity": 200, "head_dim": 64, "query_tokens": 5},
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
        },
        # rows of a larger cache, and a cache of fewer rows, whose rows are read several times
        {
            "batch": 3,
            "heads": 4,
            "kv_heads": 2,
            "capacity": 100,
            "head_dim": 64,
            "query_tokens": 2,
            "ragged": True,
            "mask": "bool",
            "cache_batch": 5,
        },
        {"batch": 4, "heads": 4, "kv_heads": 2, "capacity": 65, "head_dim": 64, "cache_batch": 2},
    ],
    models=[
        # Llama-3-8B and Llama-3.2-1B, one sequence
        {"batch": 1, "heads": 32, "kv_heads": 8, "capacity": 16384, "head_dim": 128},
        {"batch": 1, "heads": 32, "kv_heads": 8, "capacity": 32768, "head_dim": 128},
        {"batch": 1, "heads": 32, "kv_heads": 8, "capacity": 16384, "head_dim": 64},
        {"batch": 1, "heads": 32, "kv_heads": 8, "capacity": 32768, "head_dim": 64},
    ],
)
def decode_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    cache_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from 1..16 query tokens per row to a KV cache, read in place.

    The step that decoding repeats for every token, layer and sequence. Split over the keys as in
    Flash-Decoding (Dao et al. 2023); grouped heads (Ainslie et al. 2023, arXiv:2305.13245) share
    each read of the cache.

    Args:
        query: ``[batch, heads, query_tokens, head_dim]``, float32, float16 or bfloat16; at most 16
            query tokens; head_dim in 32..256, a multiple of 8, contiguous.
        key: ``[batch, kv_heads, capacity, head_dim]``, or ``[cache_batch, ...]`` with
            ``cache_rows``; dtype of ``query``, any strides but the last; ``heads`` is a multiple of
            ``kv_heads``.
        value: As ``key``.
        lengths: Keys in use per row, ``[batch]``, int32, each in 0..capacity. None: all of them.
        mask: Broadcastable to ``[batch, heads, query_tokens, capacity]``. bool: True takes part.
            float32: added to the scores after scaling and capping; -inf excludes.
        scale: Factor on the scores; None: ``1 / sqrt(head_dim)``.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: off.
        causal: Query ``i`` of ``n`` sees the keys up to and including ``length - n + i``, so the
            last query sees all. (With one query token it makes no difference.)
        cache_rows: The row of ``key`` and ``value`` that each row of ``query`` reads, ``[batch]``,
            int64, each in 0..cache_batch - 1; ``lengths`` and ``mask`` stay those of the query's
            rows. None: the row of the same number.

    Returns:
        ``(out, lse)``. ``out``: ``[batch, heads, query_tokens, head_dim]``, float32, in memory
        ``[batch, query_tokens, heads, head_dim]``. ``lse``: natural logarithm of the sum of the
        exponentiated scores, ``[batch, heads, query_tokens]``, float32. Sums are taken in float32.
        A query that sees no key gives zeros and ``-inf``. Keys that no query of a row may see are
        not read: what unused slots hold has no effect.

    Raises:
        ValueError: A shape, device, memory layout or option is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A length or a row is out of range. On CUDA, that row's results are NaN instead.
        NotImplementedError: An argument requires a gradient; the device has no kernel.
    """
    if cache_rows is not None:
        key, value = key[cache_rows], value[cache_rows]
    batch, heads, query_tokens, head_dim = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    group = heads // max(kv_heads, 1)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale

    position = torch.arange(capacity, device=query.device)
    rows = torch.full((batch,), capacity, device=query.device) if lengths is None else lengths
    last = rows[:, None].expand(batch, query_tokens) - 1
    if causal:
        last = last - query_tokens + 1 + torch.arange(query_tokens, device=query.device)
    seen = (position <= last[:, None, :, None]).expand(batch, heads, query_tokens, capacity)
    bias = torch.zeros((), device=query.device)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen, bias = seen & (mask != -math.inf), mask

    # What no query sees may hold anything, NaN too: blank it before it meets arithmetic.
    unseen = ~seen.reshape(batch, kv_heads, group * query_tokens, capacity).any(2)[..., None]
    keys = key.float().masked_fill(unseen, 0).repeat_interleave(group, dim=1)
    values = value.float().masked_fill(unseen, 0).repeat_interleave(group, dim=1)
    score = (query.float() * scale) @ keys.transpose(2, 3)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    score = (score + bias).masked_fill(~seen, -math.inf)

    lse = torch.logsumexp(score, dim=-1)
    weight = torch.exp(score - lse.masked_fill(lse == -math.inf, 0)[..., None])
    out = weight @ values
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse
