"""Attention of a few queries to a long memory, without projecting the memory.

The plain form projects every memory token to a key and a value, and that is nearly all of its time.
But the projections are linear, so they can change sides (the absorption of DeepSeek-V2, 2024,
arXiv:2405.04434, section 2.1.2). For one head with query q and memory tokens m_s::

    <q, W_k m_s + b_k>         =  <W_k^T q, m_s> + <q, b_k>
    sum_s p_s (W_v m_s + b_v)  =  W_v (sum_s p_s m_s) + b_v

The term <q, b_k> is the same for every s, so softmax drops it. What is left projects the queries
and attends to the raw memory: one KV head, as wide as the memory, that all query heads share.
Nothing is remembered between calls.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.ops.decode_attention import decode_attention, supports

MAX_NATIVE_ROWS = 16
"""Query rows (heads x tokens) up to which reading the memory, not multiplying, takes the time. The
kernel reads it once; beyond, PyTorch's matrix product is as fast or faster."""


class Projections(NamedTuple):
    """Weights ``[width, *_width]`` and biases ``[width]`` of the three input projections.

    The bias of the keys is not among them: it does not change the result.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor | None
    value_bias: Tensor | None


class Answer(NamedTuple):
    """``context``, ``[batch, query_tokens, width]``, and how it came about."""

    context: Tensor
    weights: Tensor | None
    native: bool


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projections: Projections,
    heads: int,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> Answer:
    """Project the queries, attend to the unprojected memory, project what was found.

    Multiplies ``query_tokens / head_dim`` times as often as the plain form. Everything runs in
    float32; a memory of 16 bits is widened for the duration of the call.

    Args:
        query: ``[batch, query_tokens, width]``.
        key: What the keys are projected from, ``[batch, tokens, key_width]``, any strides.
        value: What the values are projected from, ``[batch, tokens, value_width]``.
        projections: The input projections.
        heads: Divides ``width``.
        mask: Broadcastable to ``[batch, heads, query_tokens, tokens]``. bool: True takes part.
            float32: added to the scores.
        need_weights: Also return the weights, ``[batch, heads, query_tokens, tokens]``. A query
            that sees no key then gives NaN, as PyTorch does; without weights it finds zeros.

    Returns:
        The context in float32, the weights or None, and whether the native kernel ran. It does for
        few rows on a memory that `decode_attention` takes, when no weights are wanted.
    """
    batch, tokens, width = query.shape
    head_dim = width // heads
    memory = key.float()
    values = memory if value is key else value.float()

    rows = F.linear(query.float(), projections.query.float(), _float(projections.query_bias))
    rows = rows.view(batch, tokens, heads, head_dim) / math.sqrt(head_dim)
    key_weight = projections.key.float().view(heads, head_dim, -1)
    absorbed = torch.einsum("bthd,hde->bhte", rows, key_weight)

    weights = blind = None
    native = not need_weights and heads * tokens <= MAX_NATIVE_ROWS and _readable(memory, values)
    if native:
        found, lse = decode_attention(
            absorbed, memory.unsqueeze(1), values.unsqueeze(1), mask=mask, scale=1.0, causal=False
        )
        blind = lse == -math.inf
    else:
        found, weights, blind = _attend(absorbed, memory, values, mask, need_weights)

    value_weight = projections.value.float().view(heads, head_dim, -1)
    context = torch.einsum("bhte,hde->bthd", found, value_weight)
    if projections.value_bias is not None:
        bias = projections.value_bias.float().view(heads, head_dim)
        context = context + (bias if blind is None else bias * ~blind.transpose(1, 2)[..., None])
    return Answer(context.reshape(batch, tokens, width), weights if need_weights else None, native)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _readable(memory: Tensor, values: Tensor) -> bool:
    """Whether the kernel reads this memory in place, each token as one head."""
    same = memory.shape == values.shape and memory.stride(-1) == values.stride(-1) == 1
    return same and supports(memory.shape[-1], torch.float32)


def _attend(
    absorbed: Tensor, memory: Tensor, values: Tensor, mask: Tensor | None, keep_nan: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in PyTorch, for any width: what was found, the weights, and who saw no key."""
    heads, tokens = absorbed.shape[1:3]
    # Memory times queries, not queries times memory: faster by up to a third for few queries.
    scores = memory @ absorbed.flatten(1, 2).transpose(1, 2)
    scores = scores.transpose(1, 2).unflatten(1, (heads, tokens))
    if mask is not None:
        excluded = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if excluded else scores + mask
    weights = scores.softmax(-1)
    blind = None
    if mask is not None and not keep_nan:
        blind = scores.amax(-1) == -math.inf
        weights = weights.masked_fill(blind[..., None], 0)
    found = weights.flatten(1, 2) @ values
    return found.unflatten(1, (heads, tokens)), weights, blind
