"""Keys and values of a stack of layers for rows that each hold a number of tokens of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive.zoo.config import RecursiveTransformerConfig


class SlotCache:
    """Keys and values of a stack of layers, in rows that each have a length of their own.

    Attributes:
        keys: Of each layer, ``[rows, kv_heads, capacity, head_dim]``.
        values: As ``keys``.
        lengths: Tokens held of each row, ``[rows]``, int64; the same in all layers.
    """

    def __init__(
        self,
        config: RecursiveTransformerConfig,
        layers: int,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Reserve room; on a CPU what is never written takes no memory."""
        shape = (rows, config.groups, capacity, config.head_width)
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
            for _ in range(2)
        )
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.token_bytes = layers * 2 * config.groups * config.head_width * dtype.itemsize

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        return int(self.lengths.sum()) * self.token_bytes


class PromptStore:
    """Some rows of one layer's cache that a whole prompt is written to, from their beginning."""

    length = 0

    def __init__(self, cache: SlotCache, number: int, rows: Tensor) -> None:
        """Stand for ``rows`` of layer ``number``."""
        self.keys, self.values, self.rows = cache.keys[number], cache.values[number], rows

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write what came, and return it, not rounded; a row's length says what of it is meant."""
        self.keys[self.rows, :, : key.shape[2]] = key.to(self.keys.dtype)
        self.values[self.rows, :, : key.shape[2]] = value.to(self.keys.dtype)
        return key, value
