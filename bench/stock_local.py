"""What local and block-sparse attention are measured against: torch loops over blocks, and SDPA."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import block_sparse_attention, local_attention
from bench.stock import Suite

LAYERS = [
    {"batch": 1, "heads": 32, "kv_heads": 8, "tokens": tokens, "head_dim": head_dim}
    for tokens, head_dim in ((16384, 64), (4096, 64), (4096, 128))
]
CUDA_LAYERS = [
    {"batch": batch, "heads": 32, "kv_heads": 8, "tokens": tokens, "head_dim": 128}
    for batch, tokens in ((1, 16384), (1, 131072), (8, 16384))
]
TRUTH_ROWS = 512


def repeat(query: Tensor, *caches: Tensor) -> list[Tensor]:
    """Keys or values, copied to every query head that shares them."""
    group = query.shape[1] // caches[0].shape[1]
    return [cache.repeat_interleave(group, dim=1) for cache in caches]


def near(begin: int, end: int, low: int, window: int, device: torch.device) -> Tensor:
    """Which of the keys from ``low`` to ``end`` the queries from ``begin`` to ``end`` see."""
    away = torch.arange(begin, end, device=device)[:, None] - torch.arange(low, end, device=device)
    return (away >= 0) & (away < window)


def loop(query: Tensor, key: Tensor, value: Tensor, window: int, step: int) -> Tensor:
    """One SDPA for each ``step`` queries, on the keys that they may see."""
    key, value = repeat(query, key, value)
    out = torch.empty_like(query)
    for begin in range(0, query.shape[2], step):
        end = min(begin + step, query.shape[2])
        low = max(0, begin - window + 1)
        out[:, :, begin:end] = functional.scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, low:end],
            value[:, :, low:end],
            attn_mask=near(begin, end, low, window, query.device),
        )
    return out


def block_loop(query: Tensor, key: Tensor, value: Tensor, window: int, *_: object) -> Tensor:
    """A loop over blocks as long as the window."""
    return loop(query, key, value, window, window)


def half_block_loop(query: Tensor, key: Tensor, value: Tensor, window: int, *_: object) -> Tensor:
    """A loop over blocks of half a window: fewer keys in vain, more calls."""
    return loop(query, key, value, window, max(1, window // 2))


def dense_mask(query: Tensor, key: Tensor, value: Tensor, window: int, *_: object) -> Tensor:
    """SDPA with a mask of tokens x tokens: what stock transformers runs in windowed layers."""
    tokens = key.shape[2]
    key, value = repeat(query, key, value)
    mask = near(0, tokens, 0, window, query.device)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """SDPA over every earlier key: what a model without windows runs."""
    key, value = repeat(query, key, value)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def every_key(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """This project's own causal attention to every key."""
    return local_attention(query, key, value)[0]


def windowed_truth(query: Tensor, key: Tensor, value: Tensor, window: int, *_: object) -> Tensor:
    """The same in float64, some rows at a time."""
    key, value = repeat(query, key.double(), value.double())
    parts = []
    for begin in range(0, query.shape[2], TRUTH_ROWS):
        end = min(begin + TRUTH_ROWS, query.shape[2])
        low = max(0, begin - window + 1)
        scores = query[:, :, begin:end].double() @ key[:, :, low:end].mT * query.shape[3] ** -0.5
        scores.masked_fill_(~near(begin, end, low, window, query.device), -torch.inf)
        parts.append(scores.softmax(-1) @ value[:, :, low:end])
    return torch.cat(parts, 2)


def full_lists(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, *others: Any
) -> tuple[Any, ...]:
    """Lists of only earlier blocks, the own one included, as long as they can be."""
    chosen = indices.shape[3]
    rows = torch.arange(indices.shape[2])[:, None]
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(*indices.shape[:3], indices.shape[2], generator=rng)
    noise = noise.masked_fill(torch.arange(indices.shape[2]) > rows, -1.0)
    noise = noise.masked_fill(torch.arange(indices.shape[2]) == rows, 2.0)
    best = noise.topk(chosen, -1)
    taken = torch.where(best.values >= 0, best.indices, 2**30).sort(-1).values
    counts = (best.values >= 0).sum(-1)
    return query, key, value, taken.int().to(key.device), counts.int().to(key.device), *others


def listed_loop(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, size: int, *_: Any
) -> Tensor:
    """For each block of queries, copy its keys out and run one SDPA over all heads of a list."""
    batch, heads, tokens, head_dim = query.shape
    group = heads // indices.shape[1]
    out = torch.empty_like(query)
    offsets = torch.arange(size, device=key.device)
    place = torch.arange(tokens, device=key.device)
    for block in range(indices.shape[2]):
        queries = slice(block * size, (block + 1) * size)
        count = int(counts[:, :, block].max())
        listed = indices[:, :, block, :count].long()
        valid = torch.arange(count, device=key.device) < counts[:, :, block, None]
        where = (listed.masked_fill(~valid, 0)[..., None] * size + offsets).flatten(2)
        valid = valid.repeat_interleave(size, 2)[:, :, None] & (
            where[:, :, None] <= place[queries, None]
        )
        rows = where[..., None].expand(-1, -1, -1, head_dim)
        keys, values = (cache.gather(2, rows) for cache in (key, value))
        folded = query[:, :, queries].reshape(batch, -1, group * size, head_dim)
        made = functional.scaled_dot_product_attention(
            folded, keys, values, attn_mask=valid.repeat(1, 1, group, 1)
        )
        out[:, :, queries] = made.view(batch, heads, size, head_dim)
    return out


def listed_truth(*arguments: Any) -> Tensor:
    """The loop in float64."""
    doubled = (t.double() if t.is_floating_point() else t for t in arguments[:5])
    return listed_loop(*doubled, *arguments[5:])


SUITES: dict[str, Suite] = {
    local_attention.name: Suite(
        forms={
            "block loop": block_loop,
            "half-block loop": half_block_loop,
            "SDPA, dense mask": dense_mask,
        },
        truth=windowed_truth,
        sweep=[{**sizes, "window": 1024} for sizes in LAYERS],
        cuda_sweep=[{**sizes, "window": window} for sizes in CUDA_LAYERS for window in (1024, 128)],
        beside={"SDPA, causal": causal_sdpa, "adaptive, causal": every_key},
    ),
    block_sparse_attention.name: Suite(
        forms={"gather + SDPA loop": listed_loop},
        truth=listed_truth,
        sweep=[{**sizes, "chosen": sizes["tokens"] // 512} for sizes in LAYERS],
        cuda_sweep=[{**sizes, "chosen": sizes["tokens"] // 512} for sizes in CUDA_LAYERS],
        beside={"SDPA, causal": causal_sdpa, "adaptive, causal": every_key},
        place=full_lists,
    ),
}
"""By name of the op."""
