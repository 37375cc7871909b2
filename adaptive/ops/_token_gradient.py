"""The gradients of gather_tokens and combine_tokens: each is the other's transpose."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import OPS

Gradients = tuple[Tensor | None, ...]


def setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass of gather_tokens needs."""
    hidden, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.length = hidden.shape[1]


def gather_backward(ctx: Any, grad: Tensor) -> Gradients:
    """Gradients of ``hidden``: rows go back to where they came from."""
    (tokens,) = ctx.saved_tensors
    nothing = grad.new_zeros((grad.shape[0], ctx.length, grad.shape[2]))
    return OPS["combine_tokens"](nothing, grad.contiguous(), tokens), None


def setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass of combine_tokens needs."""
    _, update, tokens, weights = inputs
    ctx.weighted = weights is not None
    # Without weights the gradients are those of a sum, which need no operand.
    ctx.save_for_backward(tokens, *((update, weights) if ctx.weighted else ()))


def combine_backward(ctx: Any, grad: Tensor) -> Gradients:
    """Gradients of ``hidden``, ``update`` and ``weights``."""
    tokens, *operands = ctx.saved_tensors
    grad = grad.contiguous()
    rows = OPS["gather_tokens"](grad, tokens)
    if not ctx.weighted:
        return grad, rows, None, None
    update, weights = operands
    wide = rows.float()
    grad_update = (wide * weights[..., None]).to(update.dtype)
    # What stands beside an entry of -1 is never read, and may be anything.
    grad_weights = torch.linalg.vecdot(wide, update.float()).masked_fill(tokens < 0, 0)
    return grad, grad_update, None, grad_weights
