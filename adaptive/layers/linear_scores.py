"""Scores of a linear router, a row's depending on that row alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.layers.autocast import in_own_dtype
from adaptive.layers.torch_guard import why_not_plain
from adaptive.ops.skinny_linear import MAX_ROWS, skinny_linear, supports


def linear_scores(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Scores of the experts, ``[rows, experts]``, float32 also under autocast; no gradients.

    Args:
        rows: ``[rows, width]``.
        weight: ``[experts, width]``, float32.
        bias: ``[experts]``, float32.
    """
    states = rows.detach().float()
    native = states.is_cpu and supports(weight.shape[1], states.dtype)
    if native and why_not_plain((states, weight)) is None:
        # A product of all rows could round a row otherwise than one of it alone, and a near tie
        # would be decided otherwise in decoding than in the prompt.
        parts = [skinny_linear(part, weight) for part in states.split(MAX_ROWS)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]) + bias
    with in_own_dtype(states.device):
        return F.linear(states, weight) + bias
