"""The cache of a layer that runs for some tokens alone, and holds keys and values of all."""

from typing import Any

from torch import Tensor

from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_row_cache import RowCacheLayer
from adaptive.layers.routed_tokens import rows_in_use


class KeptCacheLayer(RowCacheLayer):
    """Keys and values of all tokens, which those that run may read without adding theirs again.

    Attributes:
        reading: Rows whose keys the next update returns instead of appending; None: it appends.
    """

    def __init__(self, inner: AdaptiveCacheLayer) -> None:
        """Stand in for an empty layer."""
        super().__init__(inner, drops=False)
        self.reading: Tensor | None = None
        self._all: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of all tokens, or return those of the rows that read."""
        if self.reading is None:
            self._all = self.inner.update(key_states, value_states, *args, **kwargs)
            return self._all
        assert self._all is not None  # all keys came first
        (keys, values), rows = self._all, self.reading
        self.done()
        used = keys.shape[2]
        return rows_in_use(keys, rows, used), rows_in_use(values, rows, used)

    def advance(self, tokens: int) -> None:
        """Count tokens that went through the layer or past it."""
        super().advance(tokens)
        self.done()

    def undo(self) -> None:
        """As `RowCacheLayer.undo`."""
        self.done()
        super().undo()

    def done(self) -> None:
        """Let the next update append."""
        self.reading = self._all = None

    def length(self) -> int:
        """Keys that reading would return."""
        assert self._all is not None
        return self._all[0].shape[2]
