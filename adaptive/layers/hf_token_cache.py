"""The cache of a layer that runs for some tokens alone, and holds those."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from adaptive.layers.hf_cache import AdaptiveCacheLayer, _stock_crop
from adaptive.layers.hf_row_cache import FOREIGN
from adaptive.layers.kv_store import KVStore
from adaptive.layers.routed_tokens import rows_in_use


class Coming(NamedTuple):
    """Tokens whose keys the next update brings.

    Attributes:
        rows: Rows of the batch that have some, ascending, ``[rows]``, int64.
        counts: How many each has, ``[rows]``, int64.
        positions: Their places in the sequence, padding counted, ``[rows, most]``, int64.
        batch: Rows of the batch.
        whole: Whether they are all tokens of the call, and all before them are held.
    """

    rows: Tensor
    counts: Tensor
    positions: Tensor
    batch: int
    whole: bool = False


class TokenCacheLayer(CacheLayerMixin):
    """Keys and values of the tokens that ran a layer, a list of its own for each sequence.

    The tokens of a row lie at its first slots; rows with fewer have slots without meaning behind.
    It counts tokens as if all ran.

    Attributes:
        store: Keys and values, ``[batch, kv_heads, longest, head_dim]``.
        lengths: Tokens held of each row, ``[batch]``, int64; None: none yet.
        positions: Their places in the sequence, ``[batch, longest]``, int64.
        longest: The most tokens that a row holds.
        seen: Tokens of each sequence so far.
        complete: Whether every row holds all tokens seen.
        window: Of the layer; None: not ``is_sliding``. All tokens that ran are held even so.
        form: Of the policy that fills it; see `hf_routing_passes.form_of`.
    """

    form: tuple[object, ...] = ()
    is_compileable = False
    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        """Make an empty layer."""
        self.window = window
        self.is_sliding = window is not None
        self._clear()
        super().__init__()  # type: ignore[no-untyped-call]

    def _clear(self) -> None:
        self.store = KVStore()
        self.lengths: Tensor | None = None
        self.positions: Tensor | None = None
        self.longest, self.seen, self.complete = 0, 0, True
        self._coming: Coming | None = None

    @property
    def keys(self) -> Tensor | None:
        """Keys of all rows, ``[batch, kv_heads, longest, head_dim]``."""
        return self.store.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        if keys is not None:
            raise NotImplementedError(FOREIGN)

    @property
    def values(self) -> Tensor | None:
        """Values, as `keys`."""
        return self.store.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.keys = values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def held(self, rows: Tensor) -> Tensor:
        """Tokens held of these rows, ``[rows]``."""
        return torch.zeros_like(rows) if self.lengths is None else self.lengths[rows]

    def expect(self, coming: Coming) -> None:
        """Say whose keys the next update brings."""
        self._coming = coming

    def advance(self, tokens: int, every: bool) -> None:
        """Count tokens that went through the layer or past it, and whether all of them ran."""
        self.seen += tokens
        self.complete &= every
        self.is_initialized = True
        self._coming = None

    def visible(self, coming: Coming) -> Tensor | None:
        """Which keys that `update` will return the tokens that come may see.

        Returns:
            ``[rows, most, keys]``, bool; None: those before them and themselves, at the end.
        """
        window = self.window
        held, most = self.held(coming.rows), coming.positions.shape[1]
        fresh = not self.longest
        far = window is not None and int(coming.positions.max()) >= window
        if not far and (fresh or (most == 1 and int(held.min()) == int(held.max()))):
            return None
        keys = int((held + coming.counts).max())
        last = held[:, None] + torch.arange(most, device=held.device)
        slots = torch.arange(keys, device=held.device)
        seen = slots <= last[..., None]
        if window is not None:
            places = self._with(coming)[coming.rows, :keys]
            seen = seen & (places[:, None] > coming.positions[..., None] - window)
            # What stands behind a row's tokens is thrown away, but must not be NaN.
            seen = seen | (slots == last.clamp(max=keys - 1)[..., None])
        return seen

    def _with(self, coming: Coming) -> Tensor:
        """Positions of all rows after the tokens that come."""
        held = self.held(coming.rows)
        needed = max(self.longest, int((held + coming.counts).max()))
        if self.positions is None:
            places = coming.positions.new_zeros(coming.batch, needed)
        else:
            places = functional.pad(self.positions, (0, needed - self.positions.shape[1]))
        row, new = self._new(coming)
        at = (coming.rows[row], held[row] + new)
        return places.index_put(at, coming.positions[row, new])

    def _new(self, coming: Coming) -> tuple[Tensor, Tensor]:
        most = torch.arange(coming.positions.shape[1], device=coming.counts.device)
        row, new = (most < coming.counts[:, None]).nonzero(as_tuple=True)
        return row, new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values that are expected, ``[rows, kv_heads, most, head_dim]``.

        Returns:
            Keys and values of these rows, as many as the longest of them holds.

        Raises:
            NotImplementedError: None are expected: the call is not one of the policy's. Or there
                are gradients, and tokens before them.
        """
        coming, self._coming = self._coming, None
        if coming is None or key_states.shape[0] != len(coming.rows):
            raise NotImplementedError(FOREIGN)
        if torch.is_grad_enabled() and self.longest and key_states.requires_grad:
            raise NotImplementedError(
                "adaptive: MixtureOfDepths with a cache is for inference: use torch.no_grad()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh, held = not self.longest, self.held(coming.rows)
        positions = self._write(coming, held, key_states.detach(), value_states.detach())
        lengths = self.lengths
        if lengths is None:
            lengths = coming.counts.new_zeros(coming.batch)
        self.lengths = lengths.index_add(0, coming.rows, coming.counts)
        self.positions, self.longest = positions, self.store.length
        if fresh:
            return key_states, value_states
        keys, values = self.store.keys, self.store.values
        assert keys is not None
        assert values is not None
        if coming.whole and self.window is not None:  # as many as stock's mask is for
            used = min(self.seen, self.window - 1) + key_states.shape[2]
            return keys[:, :, -used:], values[:, :, -used:]
        used = int((held + coming.counts).max())
        return rows_in_use(keys, coming.rows, used), rows_in_use(values, coming.rows, used)

    def _write(self, coming: Coming, held: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Put new keys and values behind those of their rows, and return all positions."""
        batch, most = coming.batch, keys.shape[2]
        even = len(coming.rows) == batch and bool((coming.counts == most).all())
        if even and bool((held == self.store.length).all()):
            self.store.append(keys, values)
            old, new = self.positions, coming.positions
            return new if old is None else torch.cat([old, new], 1)
        positions = self._with(coming)
        needed = int((held + coming.counts).max()) - self.store.length
        if needed > 0:
            sizes = [(batch, t.shape[1], needed, t.shape[3]) for t in (keys, values)]
            self.store.append(keys.new_zeros(sizes[0]), values.new_zeros(sizes[1]))
        row, new = self._new(coming)
        at = (coming.rows[row], slice(None), held[row] + new)
        for live, fresh in ((self.store.keys, keys), (self.store.values, values)):
            assert live is not None
            live[at] = fresh[row, :, new]
        return positions

    def get_seq_length(self, *_: Any) -> int:
        """Tokens seen, of which those that ran are held."""
        return self.seen

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Length and offset of the keys that would be returned if all tokens ran."""
        tokens = query.shape[0] if isinstance(query, Tensor) else query
        return self.seen + tokens, 0

    def get_max_length(self) -> int:
        """-1: it grows without a limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return -1

    def activate_past_recording(self) -> None:
        """Nothing to do: nothing is dropped."""

    def crop(self, tokens: int) -> None:
        """Remove the last ``-tokens`` tokens of the sequence; see `AdaptiveCacheLayer.crop`."""
        kept = max(self.seen + tokens, 0) if tokens < 0 else _stock_crop(self.seen, tokens)
        self._drop_from(kept)

    def undo(self) -> None:
        """Forget what a pass brought that an exception has ended inside this layer."""
        self._coming = None
        self._drop_from(self.seen)

    def _drop_from(self, kept: int) -> None:
        """Hold no token from position ``kept`` on."""
        if not kept:
            self.reset()
            return
        self.seen = kept
        if self.lengths is None or self.positions is None:
            return
        slots = torch.arange(self.longest, device=self.lengths.device)
        stays = (slots < self.lengths[:, None]) & (self.positions < kept)
        self.lengths = stays.sum(1)
        self.longest = int(self.lengths.max())
        self.positions = self.positions[:, : self.longest]
        self.store.crop(self.longest)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row b of the batch by row ``beam_idx[b]``."""
        if self.lengths is None or self.positions is None:
            return
        rows = beam_idx.to(self.lengths.device)
        self.store.select(rows)
        self.lengths, self.positions = self.lengths[rows], self.positions[rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` picks: numbers, or one boolean per row."""
        if self.lengths is not None:
            rows = torch.arange(len(self.lengths), device=self.lengths.device)
            self.reorder_cache(rows[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make each row of the batch ``repeats`` adjacent rows."""
        if self.lengths is not None:
            self.reorder_cache(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self._clear()
        self.is_initialized = False

    def offload(self) -> None:
        """Refuse, as `AdaptiveCacheLayer.offload`."""
        AdaptiveCacheLayer.offload(self)  # type: ignore[arg-type]

    prefetch = offload

    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        if self.lengths is None or not self.store.length:
            return 0
        per_slot = self.store.used_bytes // (self.store.length * len(self.lengths))
        return int(self.lengths.sum()) * per_slot

    def held_bytes(self) -> int:
        """Bytes resident for them."""
        return self.store.held_bytes

    def __copy__(self) -> "TokenCacheLayer":
        """A copy with storage of its own, since both will append in place."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, store=copy.copy(self.store))
        return other
