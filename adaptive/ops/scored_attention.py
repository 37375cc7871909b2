"""scored_attention: decode_attention that also says what weight each key had."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.decode_attention import decode_attention
from adaptive.ops.decode_attention import make_inputs as make_decode_inputs
from adaptive.ops.decode_attention import outputs as decode_outputs
from adaptive.ops.score_tokens import EDGES, logits, reduce_logits


def make_inputs(reduce: str = "sum", **sizes: Any) -> tuple[Any, ...]:
    """Random arguments; see ``decode_attention``."""
    return *make_decode_inputs(**sizes), None, 0.0, True, reduce


def outputs(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    reduce: str = "sum",
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``out``, ``lse`` and ``scores`` for these arguments."""
    out, lse = decode_outputs(query, key, value)
    batch, kv_heads, capacity, _ = key.shape
    scores = torch.empty((batch, kv_heads, capacity), dtype=torch.float32, device=query.device)
    return out, lse, scores


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=EDGES,
    models=decode_attention.models,
)
def scored_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    reduce: str = "sum",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend as ``decode_attention``, and score every key as ``score_tokens``, in one pass.

    What a layer that selects for others runs: the dense result and the weights of the keys cost one
    read of the cache together.

    Args:
        query: As for ``decode_attention``.
        key: As for ``decode_attention``.
        value: As for ``decode_attention``.
        lengths: As for ``decode_attention``.
        mask: As for ``decode_attention``.
        scale: As for ``decode_attention``.
        softcap: As for ``decode_attention``.
        causal: As for ``decode_attention``.
        reduce: As for ``score_tokens``.

    Returns:
        ``(out, lse, scores)``: bit for bit what ``decode_attention`` returns, and ``scores`` as of
        ``score_tokens``.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: As ``decode_attention``;
            ``reduce`` is unknown.
    """
    arguments = (lengths, mask, scale, softcap, causal)
    out, lse = decode_attention.reference(query, key, value, *arguments)
    score = logits(query, key, *arguments)
    return out, lse, reduce_logits(score, lse, key.shape[1], reduce)
