"""A copy of an LM head in 8 bits, which follows the weights that it was made of."""

from typing import Any

from torch import Tensor

from adaptive.layers.fingerprint import source_of
from adaptive.ops.quantize_weight import GROUPS, quantize_weight

_GROUP = 64
"""Columns that share a factor: 1/16 of a byte per weight for the factors."""


class HeadCopy:
    """Int8 weights and their factors, made when first asked for.

    They are made again when the weights are others: other memory, sizes or dtype, written to by
    PyTorch's operators (which count that), or other values in a sample, for those who write past
    PyTorch. What slips through makes drafts wrong more often, and no token.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._source: Any = None
        self._held: tuple[Tensor, Tensor] | None = None

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight, ``[vocab, width]``, as `quantize_weight` makes it."""
        source = source_of(weight)
        if self._held is None or source != self._source:
            self._held = None  # before there are two
            self._held = quantize_weight(weight.detach(), _group(weight.shape[1]))
            self._source = source
        return self._held

    @property
    def held_bytes(self) -> int:
        """Bytes of the copy."""
        return sum(part.nbytes for part in self._held or ())

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copy out of copies and pickles of the model, which make their own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def can_copy(width: int) -> bool:
    """Whether rows of this many weights can be cut into groups."""
    return width % min(GROUPS) == 0


def _group(width: int) -> int:
    return _GROUP if width % _GROUP == 0 else min(GROUPS)
