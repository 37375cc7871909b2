"""Where the keys and values of one attention layer live: preallocated, appended to in place."""

import copy
from typing import Any

import torch
from torch import Tensor

from adaptive.layers.derived import Derived
from adaptive.layers.kv_checks import OP, check_append, check_index, check_kept
from adaptive.layers.kv_memory import allocate, is_lazy, move_kept


class KVStore:
    """Keys and values of one layer, ``[batch, kv_heads, capacity, head_dim]`` each.

    Appending writes behind the live part in place, so it costs O(new tokens); concatenating, as
    caches commonly do, copies everything for every token. The live part comes back as views.

    *Growth.* Storage is allocated by the first append and grows when it is full; `kv_memory` says
    by how much. Keys grow before values and each old tensor is freed before the next is allocated,
    so the peak is one tensor above what is kept.

    *Failure.* Every method changes all or nothing: after any error the content is what it was.

    *Views* that a method or property returned show the same tokens until the next `reorder`, or
    `append` after `crop`. They keep alive the storage they came from: do not hold them for long.

    *Different lengths.* Each layer has its own store, so layers may differ in length. Heads that
    keep different numbers of tokens belong into one store per group of heads of the same length:
    a head's tokens are one contiguous stripe, which is what the kernels read, and a single store
    with a tensor of lengths would reserve the longest for every head. The rows of a batch share
    their length, padding included, as in the models that fill it.

    Not for training: see `append`. Not thread-safe, like the model that owns it.

    Attributes:
        max_tokens: The most tokens it may hold, from 1 on; None for no limit.
        derived: What is computed from the content and kept up to date with it, by name.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        """Make an empty store; nothing is allocated yet."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"{OP}: max_tokens must be at least 1, got {max_tokens}")
        self.max_tokens = max_tokens
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._length = 0
        self.derived: dict[str, Derived] = {}
        self._touched = 0  # tokens whose memory is resident, as far as can be known

    def __repr__(self) -> str:
        shape = "empty" if self._keys is None else f"{list(self._keys.shape)}, {self._keys.dtype}"
        return f"KVStore({shape}, length={self._length})"

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens there is storage for."""
        if self._keys is None or self._values is None:
            return 0
        return min(self._keys.shape[2], self._values.shape[2])

    @property
    def batch(self) -> int:
        """Rows; 0 before an append."""
        return 0 if self._keys is None else self._keys.shape[0]

    @property
    def keys(self) -> Tensor | None:
        """The live keys, ``[batch, kv_heads, length, head_dim]``, a view; None before an append."""
        return None if self._keys is None else self._keys.narrow(2, 0, self._length)

    @property
    def values(self) -> Tensor | None:
        """The live values, as `keys`."""
        return None if self._values is None else self._values.narrow(2, 0, self._length)

    @property
    def used_bytes(self) -> int:
        """Bytes of the live tokens."""
        return self._length * self._token_bytes()

    @property
    def held_bytes(self) -> int:
        """Bytes resident: on CPU of the most tokens this storage ever held, else all reserved."""
        return self._touched * self._token_bytes()

    @property
    def reserved_bytes(self) -> int:
        """Bytes of address space, touched or not."""
        return sum(t.nbytes for t in (self._keys, self._values) if t is not None)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens behind the live part and return views of the whole.

        The first append fixes batch, heads, both head dims, both dtypes and the device.

        Args:
            key: ``[batch, kv_heads, tokens, head_dim]``, any strides; there may be no tokens.
            value: ``[batch, kv_heads, tokens, value_dim]``, on the same device; its dtype may
                differ from the key's.

        Returns:
            All keys and all values, ``[batch, kv_heads, length, ...]``, views of the storage.

        Raises:
            ValueError: A shape or device does not fit, ``max_tokens`` would be exceeded, or grad
                mode is on and a tensor requires grad: written in place it would lose its graph.
            TypeError: A dtype is not that of the storage.
            MemoryError: Storage could not be allocated on the CPU.
            torch.OutOfMemoryError: The same on another device.
        """
        check_append("key", key, key, self._keys)
        check_append("value", value, key, self._values)
        tokens = key.shape[2]
        needed = self._length + tokens
        if self._keys is None or needed > self.capacity:
            self._grow(key, value, needed)
        keys, values = self._tensors()
        keys.narrow(2, self._length, tokens).copy_(key)
        values.narrow(2, self._length, tokens).copy_(value)
        self._length = needed
        if needed > self._touched:
            self._touched = needed
        return keys.narrow(2, 0, needed), values.narrow(2, 0, needed)

    def crop(self, length: int) -> None:
        """Forget all tokens from position ``length`` on; their storage stays for the next ones.

        Raises:
            ValueError: ``length`` is negative or more than is held.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"{OP}: length must be in [0, {self._length}], got {length}")
        if self.derived and length < self._length:
            keys, values = self._tensors()
            live = keys.narrow(2, 0, self._length), values.narrow(2, 0, self._length)
            for each in self.derived.values():
                each.crop(*live, length)
        self._length = length

    def keep(self, index: Tensor, tokens: int) -> None:
        """Of the last ``tokens`` tokens keep those at ``index``, ``[batch, kept]`` from 0 on.

        Raises:
            ValueError, IndexError: Another shape, or out of range (checked on CPU).
        """
        start = self._length - tokens
        check_kept(index, self.batch, tokens)
        self.crop(start)  # what derives from the content forgets the old order
        for tensor in self._tensors():
            move_kept(tensor.narrow(2, start, tokens), index.to(tensor.device))
        self._length = start + index.shape[1]

    def restore(self, length: int) -> None:
        """Undo a crop: the tokens up to ``length`` are held again, those not written since as old.

        Raises:
            ValueError: So many were never held by this storage.
        """
        if not self._length <= length <= self._touched:
            held = f"[{self._length}, {self._touched}]"
            raise ValueError(f"{OP}: length must be in {held}, got {length}")
        self._length = length

    def reorder(self, index: Tensor) -> None:
        """Replace row b of the batch by row ``index[b]``, as beam search does.

        Args:
            index: ``[batch]``, int32 or int64, on any device.

        Raises:
            ValueError: It does not have one entry for each row.
            TypeError, IndexError, MemoryError: As `select`.
        """
        if self._keys is not None and index.shape != self._keys.shape[:1]:
            rows = self._keys.shape[0]
            raise ValueError(f"{OP}: index must have shape [{rows}], got {list(index.shape)}")
        self.select(index)

    def select(self, index: Tensor) -> None:
        """Make a batch of the rows ``index``; rows may repeat, be dropped and change places.

        As many rows as before are written in place, on CPU those alone that moved; another number
        gets storage of its own. A store that holds nothing stays as it is.

        Args:
            index: ``[rows]``, int32 or int64, on any device.

        Raises:
            ValueError: It is not one-dimensional.
            TypeError: Its dtype is neither int32 nor int64.
            IndexError: An entry is not a row of the batch (checked on CPU).
            MemoryError, torch.OutOfMemoryError: There is no memory for the copy.
        """
        if self._keys is None:
            return
        keys, values = self._tensors()
        check_index(index, keys.shape[0])
        index = index.to(keys.device)
        live = keys.narrow(2, 0, self._length), values.narrow(2, 0, self._length)
        if len(index) != keys.shape[0]:
            chosen = [allocate(t, len(index), self._length, self.max_tokens) for t in live]
            for new, old in zip(chosen, live, strict=True):
                torch.index_select(old, 0, index, out=new.narrow(2, 0, self._length))
            self._adopt(chosen[0], chosen[1])
            self._select_derived(index)
            return
        rows = torch.arange(len(index), device=index.device)
        rows = (index != rows).nonzero().flatten() if index.device.type == "cpu" else rows
        moved = [t.index_select(0, index[rows]) for t in live]  # both, before either is overwritten
        for old, new in zip(live, moved, strict=True):
            old.index_copy_(0, rows, new)
        self._select_derived(index)

    def repeat(self, times: int) -> None:
        """Make each row of the batch ``times`` adjacent rows.

        Raises:
            ValueError: ``times`` is below 1.
            MemoryError, torch.OutOfMemoryError: There is no memory for the copy.
        """
        if times < 1:
            raise ValueError(f"{OP}: times must be at least 1, got {times}")
        if self._keys is not None:
            rows = torch.arange(self._keys.shape[0], device=self._keys.device)
            self.select(rows.repeat_interleave(times))

    def reset(self) -> None:
        """Forget everything and free the storage; the next append may have any shape.

        ``crop(0)`` keeps the storage instead.
        """
        self._keys = self._values = None
        self._length = self._touched = 0
        self.derived = {}

    def __copy__(self) -> "KVStore":
        """A deep copy: two stores must never write into one storage."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVStore":
        """Copy the live tokens alone; the room behind them stays untouched in the copy."""
        other = memo[id(self)] = type(self)(self.max_tokens)
        other._length = self._length
        if self._keys is not None:
            new = [self._enlarged(t, self._length) for t in self._tensors()]
            other._adopt(new[0], new[1])
        other.derived = copy.deepcopy(self.derived, memo)
        return other

    def _select_derived(self, index: Tensor) -> None:
        for each in self.derived.values():
            each.select(index)

    def _grow(self, key: Tensor, value: Tensor, needed: int) -> None:
        """Make room for ``needed`` tokens."""
        if self.max_tokens is not None and needed > self.max_tokens:
            raise ValueError(
                f"{OP}: tokens must fit into max_tokens={self.max_tokens}, got {self._length} "
                f"held and {needed - self._length} new"
            )
        if self._keys is None:
            keys = allocate(key, len(key), needed, self.max_tokens)
            self._adopt(keys, allocate(value, len(key), needed, self.max_tokens))
            return
        # Each assignment frees the old tensor before the next is allocated. After a failure between
        # the two, keys are just roomier than values.
        if self._tensors()[0].shape[2] < needed:
            self._keys = self._enlarged(self._tensors()[0], needed)
        if self._tensors()[1].shape[2] < needed:
            self._values = self._enlarged(self._tensors()[1], needed)
        self._adopt(*self._tensors())

    def _enlarged(self, old: Tensor, needed: int) -> Tensor:
        """A copy of the live part with room for ``needed`` tokens."""
        new = allocate(old, old.shape[0], needed, self.max_tokens)
        new.narrow(2, 0, self._length).copy_(old.narrow(2, 0, self._length))
        return new

    def _adopt(self, keys: Tensor, values: Tensor) -> None:
        """Hold fresh storage, filled up to `length`."""
        self._keys, self._values = keys, values
        self._touched = self._length if is_lazy(keys.device) else self.capacity

    def _tensors(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values

    def _token_bytes(self) -> int:
        tensors = (t for t in (self._keys, self._values) if t is not None)
        return sum(t.nbytes // max(t.shape[2], 1) for t in tensors)
