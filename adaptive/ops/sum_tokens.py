"""sum_tokens: the sum of chosen keys or values of a KV cache."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.gather_attention import gather_attention
from adaptive.ops.gather_attention import make_inputs as make_gather_inputs

EDGES: list[dict[str, Any]] = [
    {"batch": 0, "heads": 2, "kv_heads": 2, "capacity": 8, "head_dim": 64, "chosen": 2},
    {"batch": 2, "heads": 2, "kv_heads": 2, "capacity": 0, "head_dim": 64, "chosen": 2},
    {"batch": 2, "heads": 2, "kv_heads": 2, "capacity": 8, "head_dim": 64, "chosen": 0},
    {"batch": 1, "heads": 1, "kv_heads": 1, "capacity": 1, "head_dim": 128, "chosen": 1},
    {"batch": 2, "heads": 3, "kv_heads": 3, "capacity": 99, "head_dim": 40, "chosen": 65},
    {"batch": 2, "heads": 2, "kv_heads": 2, "capacity": 2500, "head_dim": 256, "chosen": 1300},
]


def make_inputs(**sizes: Any) -> tuple[Any, ...]:
    """Random arguments; see ``gather_attention``."""
    _, key, _, indices, counts, *_ = make_gather_inputs(**sizes)
    return key, indices, counts


def outputs(source: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Uninitialised result for these arguments."""
    batch, kv_heads, _, head_dim = source.shape
    return torch.empty((batch, kv_heads, head_dim), dtype=torch.float32, device=source.device)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=EDGES,
    models=gather_attention.models,
)
def sum_tokens(source: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Sum the chosen tokens of each row and KV head, read in place.

    Sum of all minus sum of the chosen is the sum of the dropped: what a compensation token is made
    of (Tang et al. 2024, arXiv:2407.15891, for static drops).

    Args:
        source: Keys or values, ``[batch, kv_heads, capacity, head_dim]``, float32, float16 or
            bfloat16, any strides but the last; head_dim as for ``decode_attention``.
        indices: As for ``gather_attention``, of tokens.
        counts: As for ``gather_attention``.

    Returns:
        ``[batch, kv_heads, head_dim]``, float32, summed in float32.

    Raises:
        ValueError, TypeError, NotImplementedError: As ``decode_attention``.
        IndexError: A count or index is out of range, or indices do not ascend. On CUDA, that row's
            results are NaN instead.
    """
    batch, kv_heads, capacity, _ = source.shape
    listed = torch.arange(indices.shape[2], device=source.device) < counts[..., None]
    taken = torch.zeros(batch, kv_heads, capacity + 1, dtype=torch.bool, device=source.device)
    taken = taken.scatter(2, indices.long().masked_fill(~listed, capacity), True)[..., :capacity]
    return source.float().masked_fill(~taken[..., None], 0).sum(2)
