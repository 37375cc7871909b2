"""One layer of a KV cache as a pass of some rows of its batch sees it; nothing of it is copied."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_sliding import AdaptiveSlidingLayer


class LayerRows(CacheLayerMixin):
    """Stands in a cache for one of this project's layers while some rows run.

    New tokens are written to the rows' slots in place. What comes back is the whole layer, and with
    it, as ``adaptive_rows``, which of its rows are meant: the kernel reads those, and where a stock
    function must answer they are copied (`hf_call.gathered`).

    The slots of rows that do not run are zeros until they are written.

    Attributes:
        whole: The layer.
        rows: Numbers of the rows that run, ``[rows]``, int64; None: all.
        start: Slot of the first new token.
        end: Slot after the last one.
    """

    is_compileable = False
    is_croppable = False

    def __init__(
        self, whole: AdaptiveCacheLayer, rows: Tensor | None, start: int, end: int
    ) -> None:
        """Change nothing yet."""
        self.whole = whole
        self.rows = rows
        self.start = start
        self.end = end
        self.is_sliding = whole.is_sliding
        self.is_initialized = True
        self._past = start
        if isinstance(whole, AdaptiveSlidingLayer):
            self._past = min(start, whole.sliding_window - 1)

    def lazy_initialization(self, *_: Any) -> None:
        """Do nothing: the layer holds a prompt."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the tokens of the rows.

        Args:
            key_states: ``[rows, kv_heads, tokens, head_dim]``.
            value_states: ``[rows, kv_heads, tokens, value_dim]``.

        Returns:
            The keys and values that the layer's update would return, of all its rows.
        """
        whole, tokens, made = self.whole, self.end - self.start, (key_states, value_states)
        missing = self.end - whole.get_seq_length()
        if missing == tokens and self.rows is None:
            return whole.update(key_states, value_states)
        if missing > 0:
            whole.update(*(_zeros(states, whole.store.batch, missing) for states in made))
        seen = []
        for held, states in zip((whole.keys, whole.values), made, strict=True):
            assert held is not None  # of the prompt
            behind = held.shape[2] - self._past - tokens
            seen.append(held.narrow(2, behind, self._past + tokens))
            slots = seen[-1].narrow(2, self._past, tokens)
            if self.rows is None:
                slots.copy_(states)
            else:
                slots.index_copy_(0, self.rows.to(slots.device), states)
        keys, values = seen
        if self.rows is not None:
            keys.adaptive_rows = self.rows  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Tokens before the new ones."""
        return self.start

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Length and offset of the keys that the update will return.

        Args:
            query: Number of new tokens, or their positions.
        """
        tokens = query.shape[0] if isinstance(query, Tensor) else query
        return self._past + tokens, self.start - self._past

    def get_max_length(self) -> int:
        """That of the layer."""
        return self.whole.get_max_length()

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return self.whole.get_max_length()


def _zeros(like: Tensor, batch: int, tokens: int) -> Tensor:
    """``[batch, kv_heads, tokens, width]`` without memory of its own."""
    zero = torch.zeros(1, dtype=like.dtype, device=like.device)
    return zero.expand(batch, like.shape[1], tokens, like.shape[3])
