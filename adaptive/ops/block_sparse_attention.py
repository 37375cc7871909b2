"""block_sparse_attention: many query tokens attend to chosen blocks of keys."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.decode_attention import decode_attention
from adaptive.ops.local_attention import make_inputs as make_local_inputs
from adaptive.ops.local_attention import outputs as local_outputs
from adaptive.ops.local_attention import reference_mask


def make_inputs(
    chosen: int, block_size: int = 64, per_head: bool = False, **sizes: Any
) -> tuple[Any, ...]:
    """Random arguments; ``chosen`` blocks at most for each query block and KV head (or head)."""
    query, key, value, _, _, _, offsets, scale, softcap, causal = make_local_inputs(**sizes)
    rng = torch.Generator().manual_seed(sizes.get("seed", 0) + 1)
    blocks = -(-key.shape[2] // block_size)
    rows = -(-query.shape[2] // block_size)
    lists = (query if per_head else key).shape[1]
    chosen = min(chosen, blocks)
    noise = torch.rand(key.shape[0], lists, rows, blocks, generator=rng)
    indices = noise.argsort(-1)[..., :chosen].sort(-1).values.to(key.device, torch.int32)
    counts = torch.randint(chosen // 2, chosen + 1, indices.shape[:3], generator=rng)
    counts = counts.to(key.device, torch.int32)
    return query, key, value, indices, counts, block_size, offsets, scale, softcap, causal


def outputs(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int = 64,
    offsets: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` and ``lse`` for these arguments."""
    return local_outputs(query, key, value)


def listed_blocks(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """Which blocks the lists name, ``[batch, lists, query_blocks, blocks]``, bool."""
    listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
    taken = indices.new_zeros((*indices.shape[:3], blocks + 1), dtype=torch.bool)
    return taken.scatter(3, indices.long().masked_fill(~listed, blocks), True)[..., :blocks]


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        # an empty batch, no query token, no token at all, nothing chosen
        {"batch": 0, "heads": 4, "kv_heads": 2, "tokens": 8, "head_dim": 64, "chosen": 1},
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "tokens": 8,
            "head_dim": 64,
            "query_tokens": 0,
            "chosen": 1,
        },
        {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 0, "head_dim": 64, "chosen": 1},
        {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 70, "head_dim": 64, "chosen": 0},
        # one token; a sequence that ends inside a block; every block size
        {"batch": 1, "heads": 1, "kv_heads": 1, "tokens": 1, "head_dim": 128, "chosen": 1},
        {"batch": 2, "heads": 6, "kv_heads": 2, "tokens": 330, "head_dim": 40, "chosen": 4},
        {
            "batch": 1,
            "heads": 4,
            "kv_heads": 2,
            "tokens": 200,
            "head_dim": 96,
            "chosen": 6,
            "block_size": 16,
            "per_head": True,
        },
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "tokens": 210,
            "head_dim": 64,
            "chosen": 4,
            "block_size": 32,
            "query_tokens": 75,
            "softcap": 5.0,
        },
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 4,
            "tokens": 500,
            "head_dim": 128,
            "chosen": 3,
            "block_size": 128,
            "sequences": 2,
        },
        {
            "batch": 1,
            "heads": 4,
            "kv_heads": 2,
            "tokens": 200,
            "head_dim": 256,
            "chosen": 3,
            "causal": False,
        },
    ],
    models=[
        # Llama-3.2-1B and Llama-3-8B: an eighth of the blocks
        {
            "batch": 1,
            "heads": 32,
            "kv_heads": 8,
            "tokens": 16384,
            "head_dim": head_dim,
            "chosen": 32,
        }
        for head_dim in (64, 128)
    ],
)
def block_sparse_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int = 64,
    offsets: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend from blocks of query tokens to the blocks of keys that are listed for each.

    As ``local_attention`` without a window, on the listed blocks alone: no other is read.

    Args:
        query: As for ``local_attention``.
        key: As for ``local_attention``.
        value: As for ``local_attention``.
        indices: Blocks of keys for each block of queries, ``[batch, lists, query_blocks, chosen]``,
            int32: lists for each KV head, or for each head. Block n of keys is the tokens from
            ``n * block_size`` on, block n of queries the query tokens from ``n * block_size`` on.
            The first ``counts`` of a list strictly ascending, the rest ignored.
        counts: How many, ``[batch, lists, query_blocks]``, int32, each in 0..chosen.
        block_size: Tokens of a block: 16, 32, 64 or 128.
        offsets: As for ``local_attention``.
        scale: As for ``local_attention``.
        softcap: As for ``local_attention``.
        causal: As for ``local_attention``, by position: listed or not, no query sees a later key.

    Returns:
        ``(out, lse)`` as from ``local_attention``, over the listed blocks; zeros and ``-inf`` where
        the list is empty.

    Raises:
        ValueError, TypeError, NotImplementedError: As ``local_attention``.
        IndexError: A count, block or offset is out of range, or they do not ascend. On CUDA, the
            results that depend on it are NaN instead.
    """
    seen = reference_mask(query, key, None, 0, offsets, causal)
    taken = listed_blocks(indices, counts, -(-key.shape[2] // block_size))
    taken = taken.repeat_interleave(query.shape[1] // max(indices.shape[1], 1), dim=1)
    taken = taken.repeat_interleave(block_size, dim=2)[:, :, : query.shape[2]]
    taken = taken.repeat_interleave(block_size, dim=3)[..., : key.shape[2]]
    out, lse = decode_attention.reference(
        query, key, value, mask=seen & taken, scale=scale, softcap=softcap, causal=False
    )
    return out.to(query.dtype), lse
