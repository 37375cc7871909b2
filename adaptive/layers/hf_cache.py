"""The key-value store behind transformers' Cache API; every difference between versions is here.

Supported: transformers >= 4.57, < 6. What changed in between, and how one class serves all:

=====================  =========================  ===========================  ===================
method                 4.57                       since                        here
=====================  =========================  ===========================  ===================
lazy_initialization    keys                       5.0: keys and values         values are optional
get_mask_sizes         ``cache_position`` tensor  5.4: ``query_length`` int    takes either
update                 ``cache_kwargs``           5.4: nothing more            ignores the rest
get_max_cache_shape    this name                  5.13: ``get_max_length``     has both names
crop(n), n >= 0        keeps n; 0 empties         5.16: 0 changes nothing,     asks the DynamicLayer
                                                  5.21: n > 0 is refused       that is installed
=====================  =========================  ===========================  ===================

``crop(-n)`` removes the last n tokens in all of them.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from adaptive.layers.head_split import REDUCED, HeadSplit
from adaptive.layers.kv_shift import packed, shifted
from adaptive.layers.kv_store import KVStore

_OP = "adaptive::kv_cache"


class AdaptiveCacheLayer(CacheLayerMixin):
    """Full attention's cache of one layer, in place of `transformers.DynamicLayer`.

    It answers as a DynamicLayer does and holds the same bits; appending costs O(new tokens). What
    it returns are views of a `KVStore`, strided along the heads.

    With grad mode on it concatenates as stock does, since what is written in place cannot be part
    of a graph: training and a forward outside `torch.no_grad` behave as before and cost as much.
    The next update without gradients moves the content into the store.

    Under `torch.compile`, `update` traces into the graph; like a DynamicCache it has a new length
    at each step, so the first calls recompile until the length is a symbol, and a call that grows
    the store is a graph of its own.

    Attributes:
        store: The storage; empty while tensors with a graph are held. A HeadSplit once heads were
            told to drop tokens.
        locked: Whether some layer of the cache has dropped tokens and no pass is running that knows
            it: the new tokens alone would be taken for the whole cache.
        is_initialized: Whether it has seen keys since it was made or reset.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, **_: Any) -> None:
        """Make an empty layer; the keywords that transformers hands to any layer are not needed."""
        self.store: KVStore | HeadSplit = KVStore()
        self.locked = False
        self._graph: tuple[Tensor, Tensor] | None = None
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """All keys, ``[batch, kv_heads, length, head_dim]``; None before the first update.

        A view: it shows these tokens until the next reorder, or update after a crop.
        """
        return self.store.keys if self._graph is None else self._graph[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._refuse_assignment("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """All values, as `keys`."""
        return self.store.values if self._graph is None else self._graph[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._refuse_assignment("values", values)

    def _refuse_assignment(self, name: str, new: Tensor | None) -> None:
        """Let pass what the base class does while nothing is held: setting None."""
        if new is not None or self.get_seq_length() > 0:
            raise NotImplementedError(
                f"{_OP}: {name} must not be assigned, got {'None' if new is None else 'a tensor'}; "
                "positions and masks count every token, so dropping some here makes both wrong. "
                "Use crop, reorder_cache, batch_select_indices or reset"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Note dtype and device; storage is allocated when there are tokens for it."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens.

        Args:
            key_states: ``[batch, kv_heads, tokens, head_dim]``.
            value_states: ``[batch, kv_heads, tokens, value_dim]``.
            args: What some versions hand over and full attention does not need.
            kwargs: The same.

        Returns:
            All keys and all values, ``[batch, kv_heads, length, ...]``.

        Raises:
            ValueError, TypeError, MemoryError: As `KVStore.append`; nothing is lost.
            NotImplementedError: It is `locked`.
        """
        if self.locked:
            raise NotImplementedError(REDUCED)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            assert isinstance(self.store, KVStore)  # a reduced cache is locked here
            self._graph = joined(self.keys, key_states), joined(self.values, value_states)
            self.store.reset()
            return self._graph
        if self._graph is not None:
            self.store.append(*self._graph)
            self._graph = None
        keys, values = self.store.append(key_states, value_states)
        if not torch.compiler.is_compiling():
            keys.adaptive_layer = self  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Tokens seen, which are the tokens held."""
        return self.store.length if self._graph is None else self._graph[0].shape[-2]

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Length and offset of the keys that the next update will return.

        Args:
            query: Number of new tokens, or their positions.
        """
        tokens = query.shape[0] if isinstance(query, Tensor) else query
        return self.get_seq_length() + tokens, 0

    def get_max_length(self) -> int:
        """-1: it grows without a limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return -1

    def crop(self, tokens: int) -> None:
        """Remove the last ``-tokens`` tokens, all if there are fewer.

        Zero and positive numbers mean what the installed transformers takes them for; see the table
        at the head of this file.
        """
        held = self.get_seq_length()
        kept = max(held + tokens, 0) if tokens < 0 else _stock_crop(held, tokens)
        if self._graph is None:
            self.store.crop(kept)
        else:
            self._graph = self._graph[0][..., :kept, :], self._graph[1][..., :kept, :]

    def drop_last(self, tokens: int) -> None:
        """Remove the last ``tokens`` tokens, whatever `crop` means in this version."""
        if tokens:
            self.crop(-tokens)

    def copy_last(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of the last ``tokens`` tokens."""
        keys, values = self.keys, self.values
        assert keys is not None  # so many are held
        assert values is not None
        start = keys.shape[2] - tokens
        return keys.narrow(2, start, tokens).clone(), values.narrow(2, start, tokens).clone()

    def keep(self, index: Tensor, tokens: int) -> None:
        """Of the last ``tokens`` tokens keep those at ``index``, as `KVStore.keep`."""
        assert isinstance(self.store, KVStore)  # no policy that reduces caches drafts trees
        self.store.keep(index, tokens)

    def shift(self, tokens: int) -> None:
        """Put so many empty tokens in front of all rows; drop the first ones if negative."""
        assert isinstance(self.store, KVStore)  # rows come and go with no policy that reduces
        self.store = shifted(self.store, tokens)

    def pack(self, index: Tensor) -> None:
        """Of each row keep the tokens at ``index``, ``[batch, kept]``."""
        assert isinstance(self.store, KVStore)  # as in `shift`
        assert not self.is_sliding  # windows have rows go together, so that they have no gaps
        self.store = packed(self.store, index)

    def put(self, row: int, other: "AdaptiveCacheLayer", place: int) -> None:
        """Overwrite the last tokens of a row of the batch with those of row ``place`` of another.

        As many as both have.
        """
        made = (self.store.keys, other.store.keys), (self.store.values, other.store.values)
        for held, new in made:
            assert held is not None  # both hold tokens
            assert new is not None
            tokens = min(held.shape[2], new.shape[2])
            there = held[row].narrow(1, held.shape[2] - tokens, tokens)
            there.copy_(new[place].narrow(1, new.shape[2] - tokens, tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row b of the batch by row ``beam_idx[b]``, as beam search does."""
        if self._graph is None:
            self.store.reorder(beam_idx)
        else:
            self._index_graph(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` picks: numbers, also negative, or one boolean per row."""
        batch = self.store.batch if self._graph is None else self._graph[0].shape[0]
        rows = torch.arange(batch, device=self.device)[indices] if batch else indices
        if self._graph is None:
            self.store.select(rows)
        else:
            self._index_graph(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make each row of the batch ``repeats`` adjacent rows."""
        if self._graph is None:
            self.store.repeat(repeats)
        else:
            rows = torch.arange(self._graph[0].shape[0], device=self._graph[0].device)
            self._index_graph(rows.repeat_interleave(repeats))

    def _index_graph(self, rows: Tensor) -> None:
        """Pick rows of the tensors with a graph."""
        assert self._graph is not None
        keys, values = self._graph
        rows = rows.to(keys.device)
        self._graph = keys.index_select(0, rows), values.index_select(0, rows)

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self.store = KVStore()
        self.locked = False
        self._graph = None
        self.is_initialized = False

    def offload(self) -> None:
        """Refuse: the storage stays where it is."""
        raise NotImplementedError(
            f"{_OP}: offloading must be off, got a call of offload or prefetch; use "
            "DynamicCache(offloading=True), which is left as it is"
        )

    prefetch = offload

    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        if self._graph is None:
            return self.store.used_bytes
        return sum(tensor.nbytes for tensor in self._graph)

    def held_bytes(self) -> int:
        """Bytes resident for them."""
        return self.store.held_bytes if self._graph is None else self.used_bytes()

    def __copy__(self) -> "AdaptiveCacheLayer":
        """A copy with storage of its own, since both will append in place."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, store=copy.copy(self.store))
        return other


def joined(held: Tensor | None, new: Tensor) -> Tensor:
    """What is held and what is new, in fresh memory, with the graphs of both."""
    return torch.cat([new] if held is None else [held, new], dim=-2)


def _stock_crop(held: int, tokens: int) -> int:
    """How many of ``held`` tokens the installed DynamicLayer keeps after ``crop(tokens)``."""
    probe = DynamicLayer()
    probe.is_initialized = True
    probe.keys = probe.values = torch.empty(1, 1, 1, 1).expand(1, 1, held, 1)
    probe.crop(tokens)
    return int(probe.keys.shape[-2])
