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
    _last: tuple[tuple[int, int, torch.device], tuple[Tensor, Tensor]] | None = None

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32, that turn tokens by ``positions``, ``[batch or 1, tokens]``.

        Angles are taken in float64: a text may be long.
        """
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None, :, None] * self.frequencies.double()
        return angles.cos().float(), angles.sin().float()

    def angles_back(self, first: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same for adjacent tokens: the first is turned back by ``first``, none ahead.

        The last answer is kept: the layers of one pass ask for the same.
        """
        key = (first, tokens, device)
        if self._last is None or self._last[0] != key:
            places = torch.arange(first, first + tokens, device=device).clamp(min=0)
            self._last = (key, self.angles(-places[None]))
        return self._last[1]

    def turn(self, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate ``states``, ``[batch, heads, tokens, head_dim]``, by more than they are.

        Returns:
            A copy in float32.
        """
        cos, sin = angles
        out = states.to(torch.float32, copy=True)
        pairs = len(self.frequencies)
        if self.interleaved:
            one, two = out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2]
        else:
            one, two = out[..., :pairs], out[..., pairs : 2 * pairs]
        turned = (one * cos).addcmul_(two, sin, value=-1)
        two.mul_(cos).addcmul_(one, sin)
        one.copy_(turned)
        return out
