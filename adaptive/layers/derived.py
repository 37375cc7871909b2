"""What is computed from the keys and values of a cache and kept up to date as it grows.

A `KVStore` tells what derives from it when tokens are removed or rows change places; new tokens are
taken in at the next use. So each costs O(new tokens) per step.
"""

from typing import Protocol

import torch
from torch import Tensor


class Derived(Protocol):
    """What a `KVStore` tells about changes of its content."""

    def crop(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Tokens from ``length`` on go; ``keys`` and ``values`` still hold them."""

    def select(self, rows: Tensor) -> None:
        """The batch becomes one of the rows ``rows``, ``[rows]``, int64."""


class RunningSums:
    """Sums of all keys and of all values, per row and KV head, in float64."""

    def __init__(self) -> None:
        """Start with no token."""
        self._length = 0
        self._sums: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the new tokens.

        Args:
            keys: All of the cache, ``[batch, kv_heads, length, head_dim]``.
            values: As ``keys``.

        Returns:
            Both sums, ``[batch, kv_heads, head_dim]``, float64; valid until the next update.
        """
        new = _sums(keys, values, self._length)
        if self._sums is not None:
            new = self._sums[0] + new[0], self._sums[1] + new[1]
        self._sums, self._length = new, keys.shape[2]
        return new

    def crop(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Forget the tokens from ``length`` on, which ``keys`` and ``values`` still hold."""
        if self._sums is None or length >= self._length:
            return
        gone = _sums(keys[:, :, : self._length], values[:, :, : self._length], length)
        self._sums = self._sums[0] - gone[0], self._sums[1] - gone[1]
        self._length = length

    def select(self, rows: Tensor) -> None:
        """Make a batch of the rows ``rows``."""
        if self._sums is not None:
            self._sums = self._sums[0].index_select(0, rows), self._sums[1].index_select(0, rows)


class PageBounds:
    """Largest and smallest key of each page, coordinate by coordinate (Tang et al. 2024, Quest).

    Args:
        page_size: Tokens of a page.
    """

    def __init__(self, page_size: int) -> None:
        """Start with no page."""
        self.page_size = page_size
        self._complete = 0  # pages that are full, whose bounds are final
        self._bounds: Tensor | None = None

    def update(self, keys: Tensor) -> Tensor:
        """Take in the new tokens.

        Args:
            keys: All of the cache, ``[batch, kv_heads, length, head_dim]``.

        Returns:
            ``[batch, kv_heads, pages, 2 * head_dim]``, dtype of ``keys``: the maxima, then the
            minima. Against ``[max(q, 0), min(q, 0)]`` its inner product bounds ``<q, k>`` from
            above for every key of the page.
        """
        size, width = self.page_size, keys.shape[3]
        pages = -(-keys.shape[2] // size)
        bounds = self._room(keys, pages)
        fresh = keys[:, :, self._complete * size :]
        full = fresh.shape[2] // size
        last = self._complete + full
        if full:
            block = fresh[:, :, : full * size].unflatten(2, (full, size))
            torch.amax(block, 3, out=bounds[:, :, self._complete : last, :width])
            torch.amin(block, 3, out=bounds[:, :, self._complete : last, width:])
        if last < pages:
            rest = fresh[:, :, full * size :]
            bounds[:, :, last, :width] = rest.amax(2)
            bounds[:, :, last, width:] = rest.amin(2)
        self._complete = last
        return bounds[:, :, :pages]

    def crop(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Forget the pages that are not full any more once ``length`` tokens are left."""
        self._complete = min(self._complete, length // self.page_size)

    def select(self, rows: Tensor) -> None:
        """Make a batch of the rows ``rows``."""
        if self._bounds is not None:
            self._bounds = self._bounds.index_select(0, rows)

    def _room(self, keys: Tensor, pages: int) -> Tensor:
        """Storage for ``pages``, what is known kept; a quarter more than asked, when it grows."""
        if self._bounds is None or self._bounds.shape[2] < pages:
            shape = (*keys.shape[:2], pages + pages // 4 + 1, 2 * keys.shape[3])
            new = torch.empty(shape, dtype=keys.dtype, device=keys.device)
            if self._bounds is not None:
                new[:, :, : self._complete] = self._bounds[:, :, : self._complete]
            self._bounds = new
        return self._bounds


def _sums(keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Sums of the tokens from ``start`` on."""
    return (
        keys[:, :, start:].sum(2, dtype=torch.float64),
        values[:, :, start:].sum(2, dtype=torch.float64),
    )
