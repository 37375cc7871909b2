"""Rotary embedding of one layer: turns queries back to positions counted within what is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rotation:
    """How a layer rotates queries and keys by their positions (Su et al. 2021, arXiv:2104.09864).

    Attributes:
        frequencies: Angle per position of each pair of features, ``[pairs]``; they are the first
            ``2 * pairs`` of a head, the others are not rotated.
        interleaved: Whether a pair is two neighbours; else pair ``i`` is features ``i`` and
            ``pairs + i``.
    """

    frequencies: Tensor
    interleaved: bool

    def turn(self, states: Tensor, positions: Tensor) -> Tensor:
        """Rotate by ``positions`` more than they are.

        Args:
            states: ``[batch, heads, tokens, head_dim]``.
            positions: ``[batch or 1, tokens]``, of any sign.

        Returns:
            A copy in float32. Angles are taken in float64: a text may be long.
        """
        if self.frequencies.device != states.device:
            self.frequencies = self.frequencies.to(states.device)
        angles = positions[:, None, :, None] * self.frequencies.double()
        cos, sin = angles.cos().float(), angles.sin().float()
        out = states.to(torch.float32, copy=True)
        pairs = len(self.frequencies)
        if self.interleaved:
            one, two = out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2]
        else:
            one, two = out[..., :pairs], out[..., pairs : 2 * pairs]
        turned = one * cos - two * sin
        two.mul_(cos).addcmul_(one, sin)
        one.copy_(turned)
        return out
