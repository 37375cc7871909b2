"""The storage of a layer whose heads keep different tokens: some all of them, some a window."""

import copy
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from adaptive.layers.kv_checks import check_append
from adaptive.layers.kv_store import KVStore
from adaptive.layers.local_store import LocalStore
from adaptive.layers.window_store import WindowStore

REDUCED = (
    "adaptive::kv_cache: this cache was reduced by a policy, some heads have dropped tokens; it "
    "must be read by the patched model, without gradients and not under torch.compile"
)


class HeadSplit:
    """Keys and values of one layer after some of its heads dropped most of theirs for good.

    It takes the place of a `KVStore` and answers as one, but only the attention function of a model
    that is patched with the policy that made it can read it.

    Args:
        store: The layer's storage so far, with every token.
        whole: KV heads that keep every token, ascending.
        windowed: The others, ascending.
        window: Makes the storage of the windowed heads from their keys and values.

    Attributes:
        whole: Storage of the heads that keep every token; None if there are none.
        window: Storage of the others.
        whole_heads: As given, ``[n]``, int64.
        windowed_heads: The same.
    """

    def __init__(
        self,
        store: KVStore,
        whole: Sequence[int],
        windowed: Sequence[int],
        window: Callable[[Tensor, Tensor], WindowStore | LocalStore],
    ) -> None:
        """Copy what is kept; ``store`` is left as it is."""
        keys, values = store.keys, store.values
        assert keys is not None
        assert values is not None
        self.whole_heads = torch.tensor(whole, dtype=torch.int64, device=keys.device)
        self.windowed_heads = torch.tensor(windowed, dtype=torch.int64, device=keys.device)
        self.length = store.length
        self._like = keys.new_empty((*keys.shape[:2], 0, keys.shape[3]))
        self.window = window(keys[:, self.windowed_heads], values[:, self.windowed_heads])
        self.whole: KVStore | None = None
        if whole:
            self.whole = KVStore()
            self.whole.append(keys[:, self.whole_heads], values[:, self.whole_heads])

    @property
    def keys(self) -> NoReturn:
        """Refused: there is no one tensor of all keys."""
        raise NotImplementedError(REDUCED)

    values = keys

    @property
    def batch(self) -> int:
        """Rows."""
        return self._like.shape[0]

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        return sum(store.used_bytes for store in self._stores())

    @property
    def held_bytes(self) -> int:
        """Bytes resident for them."""
        return sum(store.held_bytes for store in self._stores())

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens, ``[batch, kv_heads, tokens, head_dim]``.

        Returns:
            The new keys and values alone.

        Raises:
            ValueError, TypeError, MemoryError: As `KVStore.append`; nothing is lost.
        """
        check_append("key", key, key, self._like)
        check_append("value", value, key, self._like)
        before = None if self.whole is None else self.whole.length
        if self.whole is not None:
            self.whole.append(key[:, self.whole_heads], value[:, self.whole_heads])
        try:
            self.window.store.append(key[:, self.windowed_heads], value[:, self.windowed_heads])
        except BaseException:
            if self.whole is not None and before is not None:
                self.whole.crop(before)
            raise
        self.length += key.shape[2]
        return key.detach(), value.detach()

    def crop(self, length: int) -> None:
        """Forget all tokens from position ``length`` on.

        Raises:
            ValueError: ``length`` is negative, more than is held, or some heads have dropped tokens
                that would have to come back.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"adaptive::kv_cache: length must be in [0, {self.length}], got {length}"
            )
        self.window.crop(self.length - length)
        if self.whole is not None:
            self.whole.crop(length)
        self.length = length

    def reorder(self, index: Tensor) -> None:
        """Replace row b of the batch by row ``index[b]``."""
        self.select(index)

    def select(self, index: Tensor) -> None:
        """Make a batch of the rows ``index``; see `KVStore.select`."""
        index = index.to(self._like.device)
        if self.whole is not None:
            self.whole.select(index)
        self.window.select(index)
        self._like = self._like.index_select(0, index)

    def repeat(self, times: int) -> None:
        """Make each row of the batch ``times`` adjacent rows."""
        rows = torch.arange(self.batch, device=self._like.device)
        self.select(rows.repeat_interleave(times))

    def __copy__(self) -> "HeadSplit":
        """A deep copy: two stores must never write into one storage."""
        return copy.deepcopy(self)

    def _stores(self) -> list[KVStore]:
        return [store for store in (self.whole, self.window.store) if store is not None]
