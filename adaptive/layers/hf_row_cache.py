"""The cache of a layer that runs for some sequences of a batch alone."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from adaptive.layers.hf_cache import AdaptiveCacheLayer, _stock_crop
from adaptive.layers.hf_sliding import AdaptiveSlidingLayer

FOREIGN = (
    "adaptive: this cache belongs to MixtureOfDepths, which left keys and values of some layers "
    "out of it; start with a new cache"
)


class RowCacheLayer(CacheLayerMixin):
    """Keys and values of the sequences that run a layer; none of those that skip it.

    It counts tokens as if all sequences ran, and reorders, repeats and selects rows of the batch.

    Attributes:
        inner: The cache of the rows that run; of all rows if an MLP is routed.
        drops: Whether rows that do not run have no keys and values.
        runs: Which rows of the batch run, ``[batch]``, bool, on the CPU; None: not decided yet.
        seen: Tokens of each sequence so far.
        is_sliding: Whether the layer has a window.
        form: Of the policy that fills it; see `hf_routing_passes.form_of`.
    """

    form: tuple[object, ...] = ()
    is_compileable = False
    is_croppable = True

    def __init__(self, inner: AdaptiveCacheLayer, drops: bool) -> None:
        """Stand in for an empty layer."""
        self.inner = inner
        self.drops = drops
        self.runs: Tensor | None = None
        self.seen = 0
        self.is_sliding = inner.is_sliding
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """Keys of the rows that run, ``[rows, kv_heads, length, head_dim]``."""
        return self.inner.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.inner.keys = keys

    @property
    def values(self) -> Tensor | None:
        """Values, as `keys`."""
        return self.inner.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.inner.values = values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Note dtype and device."""
        self.inner.lazy_initialization(key_states, value_states)

    def decide(self, runs: Tensor) -> None:
        """Fix which rows run, ``[batch]``, bool."""
        self.runs = runs.cpu()
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """Count tokens that went through the layer or past it."""
        self.seen += tokens

    def undo(self) -> None:
        """Forget what a pass brought that an exception has ended inside this layer.

        Where a window has dropped tokens for it, everything: they cannot come back.
        """
        brought = self.inner.get_seq_length() - self.seen if self._holds() else 0
        if not self.seen or (brought > 0 and isinstance(self.inner, AdaptiveSlidingLayer)):
            self.reset()
        elif brought > 0:
            self.inner.crop(-brought)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens of the rows that run, as `AdaptiveCacheLayer.update`.

        Raises:
            NotImplementedError: There are other rows: the call is not one of the policy's.
        """
        if self.drops and (self.runs is None or len(key_states) != int(self.runs.sum())):
            raise NotImplementedError(FOREIGN)
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, *_: Any) -> int:
        """Tokens seen."""
        return self.seen if self.drops else self.inner.get_seq_length()

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Length and offset of the keys that the next update would return for a row that runs."""
        if not self.drops:
            return self.inner.get_mask_sizes(query)
        tokens = query.shape[0] if isinstance(query, Tensor) else query
        past = self.seen
        if isinstance(self.inner, AdaptiveSlidingLayer):
            past = min(past, self.inner.sliding_window - 1)
        return past + tokens, self.seen - past

    def get_max_length(self) -> int:
        """That of the inner layer."""
        return self.inner.get_max_length()

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return self.inner.get_max_length()

    def activate_past_recording(self) -> None:
        """Drop nothing that leaves the window before the next crop."""
        if isinstance(self.inner, AdaptiveSlidingLayer):
            self.inner.activate_past_recording()

    def crop(self, tokens: int) -> None:
        """Remove the last ``-tokens`` tokens; see `AdaptiveCacheLayer.crop`."""
        seen = self.get_seq_length()
        kept = max(seen + tokens, 0) if tokens < 0 else _stock_crop(seen, tokens)
        if kept < seen and self._holds():
            self.inner.crop(kept - seen)
        self.seen = kept
        if not kept:
            self.reset()

    def _holds(self) -> bool:
        return self.inner.get_seq_length() > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row b of the batch by row ``beam_idx[b]``, with its decision."""
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` picks: numbers, or one boolean per row."""
        if self.runs is not None:
            rows = torch.arange(len(self.runs))
            self._pick(rows[indices.cpu() if isinstance(indices, Tensor) else indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make each row of the batch ``repeats`` adjacent rows."""
        if self.runs is not None:
            self._pick(torch.arange(len(self.runs)).repeat_interleave(repeats))

    def _pick(self, rows: Tensor) -> None:
        if self.runs is None:
            return
        rows = rows.cpu()
        runs = self.runs[rows]
        if self._holds():
            held = rows
            if self.drops:
                places = self.runs.cumsum(0) - 1
                held = places[rows[runs]]
            if len(held):
                self.inner.batch_select_indices(held.to(self.inner.device))
            else:
                self.inner.reset()
        self.runs = runs

    def reset(self) -> None:
        """Forget everything, the decision too."""
        self.inner.reset()
        self.runs = None
        self.seen = 0
        self.is_initialized = False

    def offload(self) -> None:
        """Refuse, as `AdaptiveCacheLayer.offload`."""
        self.inner.offload()

    prefetch = offload

    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        return self.inner.used_bytes()

    def held_bytes(self) -> int:
        """Bytes resident for them."""
        return self.inner.held_bytes()

    def __copy__(self) -> "RowCacheLayer":
        """A copy with storage of its own, since both will append in place."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, inner=copy.copy(self.inner))
        return other
