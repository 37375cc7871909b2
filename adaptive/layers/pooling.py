"""One vector for a sequence: the mean of its tokens without padding, or the first of them."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.layers.autocast import in_own_dtype

_PER_TOKEN = 2
"""Axes of a mask that says which tokens are not padding, ``[batch, tokens]``."""


def pool_weights(states: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    """Return what to weigh the tokens of each sequence with, ``[batch, tokens]``, float32.

    Args:
        states: ``[batch, tokens, width]``.
        mask: Which tokens are not padding, ``[batch, tokens]``, not 0; None: all.
        pool: "mean", or "first": the first token that is not padding. A row of padding alone has
            no weights but 0.

    Raises:
        ValueError: The mask has another shape, and does not say what is padding.
    """
    batch, tokens = states.shape[:2]
    if mask is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=states.device)
    elif mask.dim() == _PER_TOKEN and mask.shape == (batch, tokens):
        real = mask.to(states.device) != 0
    else:
        raise ValueError(
            f"adaptive: attention_mask must be [batch, tokens] = [{batch}, {tokens}], to tell "
            f"padding from tokens, got {list(mask.shape)}"
        )
    if pool == "first":
        return functional.one_hot(real.int().argmax(1), tokens).float() * real
    weights = real.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def pooled(states: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of each sequence's states, ``[batch, width]``, float32."""
    with in_own_dtype(states.device):
        return torch.bmm(weights[:, None], states.float())[:, 0]
