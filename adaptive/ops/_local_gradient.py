"""The gradient of local_attention: block after block of queries, by PyTorch's matrix products.

What FlashAttention-2 (Dao 2023, arXiv:2307.08691) does inside a kernel: scores are computed again
from the log-sum-exp that the forward pass kept, so memory grows with the window and not with the
square of the tokens. Five products of matrices are all there is to it, and PyTorch's are at the
floor; so there is no kernel of our own.
"""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._local_keys import KeyRange, ranges

BLOCK = 128
"""Query tokens at a time: large enough for the products, small beside usual windows."""


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    query, key, value, window, windows, sinks, offsets, scale, softcap, causal = inputs
    ctx.save_for_backward(query, key, value, windows, offsets, *output)
    ctx.window, ctx.sinks, ctx.scale = window, sinks, scale
    ctx.softcap, ctx.causal = softcap, causal


def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value; of nothing else."""
    query, key, value, windows, offsets, out, lse = ctx.saved_tensors
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    width = query.shape[3]
    scale = width**-0.5 if ctx.scale is None else ctx.scale
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = (torch.zeros_like(t, dtype=kind) for t in (key, value))
    # The softmax's own gradient takes this from every score of a row.
    rest = (grad_out.to(kind) * out.to(kind)).sum(3) - grad_lse.to(kind)
    near = ctx.window if windows is None else windows
    shape = (*query.shape[:3], key.shape[2])
    for part in ranges(shape, near, ctx.sinks, offsets, ctx.causal, BLOCK, query.device):
        grads = _block(ctx, part, query, key, value, grad_out, lse, rest, scale, kind)
        grad_query[:, :, part.begin : part.end] = grads[0].to(query.dtype)
        for total, grad in zip((grad_key, grad_value), grads[1:], strict=True):
            start = 0
            for low, high in part.pieces:
                total[:, :, low:high] += grad[:, :, start : start + high - low]
                start += high - low
    return (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), *[None] * 7)


def _block(  # noqa: PLR0913
    ctx: Any,
    part: KeyRange,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    rest: Tensor,
    scale: float,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some queries, and of the keys and values that they see."""
    kv_heads, rows = key.shape[1], slice(part.begin, part.end)

    def fold(tensor: Tensor) -> Tensor:
        """Query heads of one KV head as further rows."""
        return torch.unflatten(tensor[:, :, rows].to(kind), 1, (kv_heads, -1)).flatten(2, 3)

    def unfold(tensor: Tensor) -> Tensor:
        """Rows of folded query heads as heads again, to meet masks; a view."""
        return torch.unflatten(tensor, 2, (-1, part.end - part.begin))

    seen = part.seen  # [batch or 1, heads or 1, rows, keys]
    by_head = seen.shape[1] > 1
    seen = seen.unflatten(1, (kv_heads, -1)) if by_head else seen[:, :, None]
    unseen = ~seen.any(2).any(2)[..., None]  # may hold anything, NaN too
    keys, values = (part.take(t).to(kind).masked_fill(unseen, 0) for t in (key, value))
    queries, grads = fold(query) * scale, fold(grad_out)
    weights = queries @ keys.mT
    slope = None
    if ctx.softcap > 0:
        capped = weights.div_(ctx.softcap).tanh_()
        weights, slope = capped * ctx.softcap, capped.square_().neg_().add_(1)
    totals = fold(lse[..., None])
    weights.sub_(totals.masked_fill(totals == -torch.inf, 0))
    unfold(weights).masked_fill_(~seen, -torch.inf)
    weights.exp_()
    grad_values = weights.mT @ grads
    changes = (grads @ values.mT).sub_(fold(rest[..., None])).mul_(weights)
    if slope is not None:
        changes.mul_(slope)
    grad_query = unfold(changes @ keys * scale).flatten(1, 2)
    return grad_query, changes.mT @ queries, grad_values
