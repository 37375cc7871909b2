"""The gradient of router_scores, from the hidden states: nothing but the scores was kept."""

from typing import Any

import torch
from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass needs."""
    hidden, weight, norm_weight, ctx.eps, ctx.function = inputs
    ctx.save_for_backward(hidden, weight, norm_weight, output)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``hidden``, ``weight`` and ``norm_weight``."""
    hidden, weight, norm_weight, scores = ctx.saved_tensors
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x, rows = hidden.to(kind), weight.to(kind)
    router = rows[-1] - rows[0] if ctx.function == "softmax" else rows[0]
    if ctx.function != "identity":
        grad = grad * scores * (1 - scores)
    slope = grad[..., None]
    if norm_weight is None:
        grad_hidden, grad_gain, normed = slope * router, None, x
    else:
        gain = norm_weight.to(kind)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        unit = x * scale
        normed = unit * gain
        grad_unit = slope * (router * gain)
        along = (grad_unit * unit).mean(-1, keepdim=True)
        grad_hidden = scale * (grad_unit - unit * along)
        grad_gain = ((slope * unit).flatten(0, 1).sum(0) * router).to(norm_weight.dtype)
    grad_router = (slope * normed).flatten(0, 1).sum(0)
    both = [-grad_router, grad_router] if ctx.function == "softmax" else [grad_router]
    grad_weight = torch.stack(both).to(weight.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_gain, None, None
