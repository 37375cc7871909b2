"""The cache of a layer that sees a window of its own, behind transformers' Cache API."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from adaptive.layers.head_split import REDUCED
from adaptive.layers.hf_cache import AdaptiveCacheLayer, joined
from adaptive.layers.kv_store import KVStore
from adaptive.layers.window_store import slack


class AdaptiveSlidingLayer(AdaptiveCacheLayer):
    """A window's cache, in place of `transformers.DynamicSlidingWindowLayer`.

    It answers as that layer does and returns the same bits: the last ``sliding_window - 1`` tokens
    and the new ones. Stock copies all of them for every token. Here new tokens are appended in
    place, and what has left the window is dropped an eighth of the window at a time, so that a step
    costs O(new tokens) on average and the memory stays within a window and that eighth.

    With grad mode on, and under `torch.compile`, it concatenates as stock does.

    Attributes:
        sliding_window: Tokens that a query sees, its own included; of a chunk, for chunks.
        cumulative_length: Tokens seen.
        record_past: Whether nothing is dropped before the next `crop`, which may then remove
            tokens although the window is full.
        margin: Tokens that `drop_last` leaves beyond those that the window needs, so that more can
            be removed later.
        reach: Tokens before the window that `update` gives, too: for new ones that stand beside the
            last tokens held instead of behind them. Those must be held.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, **_: Any) -> None:
        """Make an empty layer; the other keywords of transformers are not needed."""
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False
        self.margin = 0
        self.reach = 0
        self._sliding_window_tensor = torch.tensor(sliding_window)  # for iteration over a cache
        super().__init__()

    @property
    def _past(self) -> int:
        """Tokens held that the next query may see."""
        return min(self._held, self.sliding_window - 1 + self.reach)

    @property
    def _held(self) -> int:
        return self.store.length if self._graph is None else self._graph[0].shape[-2]

    @property
    def keys(self) -> Tensor | None:
        """The keys that stock would hold, a view; None before the first update."""
        return self._shown(self.store.keys if self._graph is None else self._graph[0])

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._refuse_assignment("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """The values, as `keys`."""
        return self._shown(self.store.values if self._graph is None else self._graph[1])

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._refuse_assignment("values", values)

    def _shown(self, held: Tensor | None) -> Tensor | None:
        return held if held is None or self.record_past else _last(held, self._past)

    def activate_past_recording(self) -> None:
        """Drop nothing before the next `crop`."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; arguments and errors are those of `AdaptiveCacheLayer.update`.

        Returns:
            The last ``sliding_window - 1`` keys and values before the new ones, and those.
        """
        if self.locked:
            raise NotImplementedError(REDUCED)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        seen = self._past + new
        assert isinstance(self.store, KVStore)  # no policy reduces a layer with its own window
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            keys, values = joined(self.keys, key_states), joined(self.values, value_states)
            kept = seen if self.record_past else min(seen, self.sliding_window - 1)
            self._graph = _last(keys, kept), _last(values, kept)
            self.store.reset()
            keys, values = _last(keys, seen), _last(values, seen)
        elif self.record_past or new <= slack(self.sliding_window):
            self._compact(self._held if self.record_past else self._past)
            assert isinstance(self.store, KVStore)
            keys, values = self.store.append(key_states, value_states)
            keys, values = _last(keys, seen), _last(values, seen)
        else:
            keys, values = key_states, value_states
            if self._past:
                held, held_values = self.keys, self.values
                keys, values = joined(held, key_states), joined(held_values, value_states)
            self._replace(keys, values, min(seen, self.sliding_window - 1))
        self.cumulative_length += new
        return keys, values

    def _compact(self, kept: int) -> None:
        """Move tensors with a graph into the store; drop old tokens if many have piled up."""
        if self._graph is not None:
            self._replace(*self._graph, self._graph[0].shape[-2])
        elif self._held - kept > slack(self.sliding_window):
            keys, values = self.store.keys, self.store.values
            assert keys is not None
            assert values is not None
            self._replace(keys, values, kept)

    def _replace(self, keys: Tensor, values: Tensor, kept: int) -> None:
        """Hold the last ``kept`` tokens of these, in storage of its own."""
        store = KVStore()
        store.append(_last(keys, kept).detach(), _last(values, kept).detach())
        self.store, self._graph = store, None

    def get_seq_length(self, *_: Any) -> int:
        """Tokens seen, of which the last ones are held."""
        return self.cumulative_length

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Length and offset of the keys that the next update will return.

        Args:
            query: Number of new tokens, or their positions.
        """
        tokens = query.shape[0] if isinstance(query, Tensor) else query
        past = min(self.cumulative_length, self.sliding_window - 1)
        return past + tokens, self.cumulative_length - past

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return self.sliding_window

    def crop(self, tokens: int) -> None:
        """Remove the last ``-tokens`` tokens, or refuse, as the installed transformers does.

        Stock refuses when the window is full, because what left it cannot come back, unless the
        past was recorded.

        Raises:
            ValueError, RuntimeError: As stock.
        """
        if not self.is_initialized:
            return
        probe = DynamicSlidingWindowLayer(self.sliding_window)
        probe.is_initialized = True
        probe.cumulative_length = self.cumulative_length
        probe.record_past = self.record_past
        held = self._held if self.record_past else self._past
        probe.keys = probe.values = torch.empty(1, 1, 1, 1).expand(1, 1, held, 1)
        probe.crop(tokens)
        gone = self.cumulative_length - probe.cumulative_length
        if self._graph is None:
            self.store.crop(self.store.length - gone)
        else:
            length = self._held - gone
            self._graph = self._graph[0][..., :length, :], self._graph[1][..., :length, :]
        self.cumulative_length = probe.cumulative_length
        if self._graph is None:
            self._compact(self._past)

    def drop_last(self, tokens: int) -> None:
        """Remove the last ``tokens`` tokens, at most those seen since the past is recorded.

        What has left the window by then is dropped, as after any update.
        """
        assert self.record_past or tokens == 0
        self.store.crop(self.store.length - tokens)
        self.cumulative_length -= tokens
        self._compact(min(self._past + self.margin, self._held))

    def keep(self, index: Tensor, tokens: int) -> None:
        """As `AdaptiveCacheLayer.keep`; the tokens left out were never seen."""
        super().keep(index, tokens)
        self.cumulative_length += index.shape[1] - tokens

    def shift(self, tokens: int) -> None:
        """As `AdaptiveCacheLayer.shift`, of tokens seen; held are those that the window needs."""
        self.cumulative_length += tokens
        missing = min(self.cumulative_length, self.sliding_window - 1) - self._held
        super().shift(max(missing, 0) or min(self.cumulative_length - self._held, 0))

    def reset(self) -> None:
        """Forget everything and free the storage."""
        super().reset()
        self.cumulative_length = 0


def _last(tensor: Tensor, tokens: int) -> Tensor:
    """A view of the last tokens, ``[batch, kv_heads, tokens, width]``."""
    return tensor.narrow(2, tensor.shape[2] - tokens, tokens)
