"""One run of generation: prompts in a padded grid, KV stores, the rows that are still alive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.layers.kv_store import KVStore
from adaptive.zoo.decoder import Decoder, Layer

PREFILL_POSITIONS = 8192
"""Positions of a prompt that run at once: enough for full speed, and activations stay small."""

PIECE, MIN_PIECES = 128, 16
"""Scores whose maximum is taken at once, and the pieces from which on this is faster."""


class Rows:
    """A few rows of a store that has room for a prompt already: a layer writes them once."""

    length = 0

    def __init__(self, store: KVStore, start: int, stop: int) -> None:
        """Stand for rows ``start`` to ``stop``."""
        keys, values = store.keys, store.values
        assert keys is not None
        assert values is not None
        self.keys, self.values = keys[start:stop], values[start:stop]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the whole prompt of these rows, and return it as it came, not rounded."""
        self.keys.copy_(key)
        self.values.copy_(value)
        return key, value


class KVCast:
    """A store whose dtype is not the model's."""

    def __init__(self, store: KVStore, dtype: torch.dtype) -> None:
        """Stand for ``store``, which holds ``dtype``."""
        self.store, self.dtype = store, dtype

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.store.length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Round, and append."""
        return self.store.append(key.to(self.dtype), value.to(self.dtype))


class Run(ABC):
    """What a model keeps between the steps of one call of ``generate``."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes of the live KV entries."""

    @property
    @abstractmethod
    def kv_entries(self) -> int:
        """KV entries of a layer, padding included."""

    @abstractmethod
    def logits(self, previous: Tensor | None) -> Tensor:
        """Scores of the next token, ``[rows, vocab_size]``.

        Args:
            previous: ``[rows]``, the token chosen before in this block; None: it begins.
        """

    @abstractmethod
    def advance(self, block: Tensor) -> None:
        """Append a whole block, ``[rows, block_length]``."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""

    def figures(self) -> dict[str, Any]:
        """What else the report is to say of this run."""
        return {}


class DecoderRun(Run):
    """A run of one `Decoder`, all rows in step.

    The decoder runs once per block of tokens, at the price of one KV entry, and leaves a context
    from which the next block's tokens are told; a vanilla model has blocks of one.

    Attributes:
        context: ``[rows, width]``, the decoder's output for the last block.
        stores: Keys and values of each layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: Callable[[Tensor], Tensor],
        grid: Tensor,
        first: Tensor,
        entries: int,
        kv_dtype: torch.dtype,
    ) -> None:
        """Run the prompts.

        Args:
            decoder: The one that has a KV cache.
            embed: From ``[rows, blocks, block_length]`` ids to ``[rows, blocks, width]``.
            grid: Prompts, ``[rows, blocks, block_length]``, padded on the left.
            first: ``[rows]``, int32: the first block of each row that is no padding.
            entries: KV entries that there will be at most.
            kv_dtype: In which they are held.
        """
        self.decoder, self.embed, self.kv_dtype = decoder, embed, kv_dtype
        self.first = first if bool(first.any()) else None
        self.stores = [KVStore(entries) for _ in decoder.layers]
        rows, blocks = grid.shape[:2]
        for store, layer in zip(self.stores, decoder.layers, strict=True):
            assert isinstance(layer, Layer)
            nothing = torch.zeros((), dtype=kv_dtype, device=grid.device)
            room = nothing.expand(rows, layer.kv_heads, blocks, layer.head_dim)
            store.append(room, room)
        step = max(1, PREFILL_POSITIONS // blocks)
        parts = [self._prefill(grid, at, min(at + step, rows)) for at in range(0, rows, step)]
        self.context = torch.cat(parts)

    def _prefill(self, grid: Tensor, start: int, stop: int) -> Tensor:
        first = None if self.first is None else self.first[start:stop]
        views = [Rows(store, start, stop) for store in self.stores]
        x = self.embed(grid[start:stop])
        return self.decoder(x, views, first, last_only=True)[:, 0]  # type: ignore[no-any-return]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live KV entries."""
        return sum(store.used_bytes for store in self.stores)

    @property
    def kv_entries(self) -> int:
        """KV entries of a layer, padding included."""
        return self.stores[0].length

    def advance(self, block: Tensor) -> None:
        """Append a whole block, ``[rows, block_length]``."""
        stores = [KVCast(store, self.kv_dtype) for store in self.stores]
        self.context = self.decoder(self.embed(block[:, None]), stores, self.first)[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.context = self.context[rows]
        self.first = None if self.first is None else self.first[rows]
        for store in self.stores:
            store.select(rows)


def padded(prompts: Sequence[Tensor], block_length: int, padding_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as one grid of blocks, padded on the left, and the first block of each.

    Within its first block a row is padded as it would be alone; whole blocks before it are padding
    that no other sees.
    """
    longest = max(-(-len(prompt) // block_length) for prompt in prompts)
    width = longest * block_length
    rows = [F.pad(prompt, (width - len(prompt), 0), value=padding_id) for prompt in prompts]
    first = [longest - -(-len(prompt) // block_length) for prompt in prompts]
    grid = torch.stack(rows).view(len(prompts), longest, block_length)
    return grid, torch.tensor(first, dtype=torch.int32, device=grid.device)


def best(scores: Tensor) -> Tensor:
    """The place of the largest score in each row, the first of equals.

    As ``scores.argmax(-1)``, which PyTorch does not vectorise: the maxima of pieces first, then the
    place in one of them. Four times as fast for 64 rows of 50 000.
    """
    rows, count = scores.shape
    pieces = count // PIECE
    if pieces < MIN_PIECES or count % PIECE:
        return scores.argmax(-1)
    cut = scores.view(rows, pieces, PIECE)
    piece = cut.amax(-1).argmax(-1)
    inside = cut[torch.arange(rows, device=scores.device), piece].argmax(-1)
    return piece * PIECE + inside


def choose(logits: Tensor, temperature: float | None, draws: Tensor | None) -> Tensor:
    """Pick one token per row: the best, or by one number in 0..1 per row, from the softmax.

    Inverting the cumulative distribution spends one number per row, whichever rows there are: a row
    that leaves the batch changes no draw of the others.
    """
    if temperature is None or draws is None:
        return best(logits)
    mass = (logits.double() / temperature).softmax(-1).cumsum(-1)
    found = torch.searchsorted(mass, draws[:, None].double() * mass[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[-1] - 1)
