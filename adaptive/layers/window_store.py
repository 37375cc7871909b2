"""Keys and values of heads that keep sinks, recent tokens and, if wanted, one for all the rest.

Xiao et al. 2024 (arXiv:2309.17453): the first tokens draw the attention that has nowhere to go, so
they stay. Tang et al. 2024 (arXiv:2407.15891): what is dropped is replaced by one token of the mean
key and the mean value, which counts as often as tokens were dropped: its score gets ``+ log(n)``.
"""

import torch
from torch import Tensor

from adaptive.layers.kv_store import KVStore

SLACK_SHARE = 8
"""Tokens pile up to a share 1 / this above the window before the oldest are dropped together."""

LEAST_SLACK = 64
_CHUNK = 4096


def slack(window: int) -> int:
    """Tokens that may pile up above a window."""
    return max(LEAST_SLACK, window // SLACK_SHARE)


class WindowStore:
    """What is left of a cache's keys and values after most tokens were dropped for good.

    Slots: the sinks, then the compensation token if there is one, then the recent tokens. Recent
    tokens are dropped together, an eighth of the window at a time, so that a step costs O(1) tokens
    on average and the bytes held stay the same while decoding.

    Args:
        keys: ``[batch, kv_heads, length, head_dim]``, all tokens so far; copied.
        values: As ``keys``.
        visible: Which tokens are not padding, ``[batch, length]``, bool; None: all.
        sinks: Tokens to keep from the first visible one on.
        window: Recent tokens to keep; ``sinks + window < length``.
        compensation: Whether one token stands for the dropped.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        sinks: int,
        window: int,
        compensation: bool,
    ) -> None:
        """Copy what is kept and sum up what is not."""
        batch, kv_heads, length, head_dim = keys.shape
        self.sinks, self.window, self.compensation = sinks, window, compensation
        cut = length - window
        places = torch.arange(length, device=keys.device)
        real = torch.ones(batch, length, dtype=torch.bool, device=keys.device)
        real = real if visible is None else visible
        self._sink_places = real.int().argmax(1)[:, None] + places[:sinks]
        held = (self._sink_places < cut) & real.gather(1, self._sink_places.clamp(max=length - 1))
        self._sink_places = self._sink_places.clamp(max=length - 1)
        kept = torch.zeros(batch, length, dtype=torch.bool, device=keys.device)
        kept = kept.scatter(1, self._sink_places, held)

        self.dropped = torch.zeros(batch, device=keys.device, dtype=torch.float64)
        shape = (batch, kv_heads, head_dim)
        self._sums = [torch.zeros(shape, device=keys.device, dtype=torch.float64) for _ in "kv"]
        self._first = cut  # position of the first recent token
        self._head = torch.zeros(batch, 1, 1, self._fixed, device=keys.device)
        self._head[..., :sinks].masked_fill_(~held[:, None, None], -torch.inf)
        self._drop(keys[:, :, :cut], values[:, :, :cut], (real & ~kept)[:, :cut])

        index = self._sink_places[:, None, :, None].expand(batch, kv_heads, sinks, head_dim)
        parts = [[t.gather(2, index), t[:, :, cut:]] for t in (keys, values)]
        self.store = self._stored(parts)

    @property
    def _fixed(self) -> int:
        """Slots before the recent tokens."""
        return self.sinks + self.compensation

    @property
    def recent(self) -> int:
        """Recent tokens held."""
        return self.store.length - self._fixed

    def trim(self, visible: Tensor | None) -> None:
        """Drop the oldest recent tokens if too many have piled up.

        Args:
            visible: Which tokens are not padding, ``[batch, positions]``; None: all.
        """
        over = self.recent - self.window
        if over <= slack(self.window):
            return
        keys, values = self.store.keys, self.store.values
        assert keys is not None
        assert values is not None
        start, stop = self._fixed, self._fixed + over
        gone = torch.ones(len(keys), over, dtype=torch.bool, device=keys.device)
        if visible is not None:
            gone = visible[:, self._first : self._first + over]
        self._drop(keys[:, :, start:stop], values[:, :, start:stop], gone)
        self._first += over
        self.store = self._stored([[t[:, :, : self.sinks], t[:, :, stop:]] for t in (keys, values)])

    def read(
        self, mask: Tensor | None, later: int = 0, compensated: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a query attends to.

        Args:
            mask: None, or ``[batch or 1, heads or 1, query_tokens, length]`` over all positions.
            later: The last tokens, which are not seen yet.
            compensated: Whether the compensation token is seen, if there is one.

        Returns:
            Keys and values, ``[batch, kv_heads, slots, head_dim]``, and the float32 mask for them,
            ``[batch, heads or 1, query_tokens or 1, slots]``, added to the scores.
        """
        keys, values = self.store.keys, self.store.values
        assert keys is not None
        assert values is not None
        slots = keys.shape[2] - later
        bias = torch.zeros(len(keys), 1, 1, slots, device=keys.device)
        bias[..., : self._fixed] = self._head
        if self.compensation and not compensated:
            bias[..., self.sinks] = -torch.inf
        if mask is not None:
            bias = bias + self._masked(mask, slots - self._fixed)
        return keys[:, :, :slots], values[:, :, :slots], bias

    def crop(self, tokens: int) -> None:
        """Remove the last ``tokens`` tokens.

        Raises:
            ValueError: They are not held any more.
        """
        if tokens > self.recent:
            raise ValueError(
                f"adaptive::kv_cache: crop must remove at most the {self.recent} recent tokens "
                f"that are still held, got {tokens}; the others were dropped"
            )
        self.store.crop(self.store.length - tokens)

    def select(self, rows: Tensor) -> None:
        """Make a batch of the rows ``rows``."""
        self.store.select(rows)
        self._sink_places = self._sink_places.index_select(0, rows)
        self._head = self._head.index_select(0, rows)
        self.dropped = self.dropped.index_select(0, rows)
        self._sums = [sums.index_select(0, rows) for sums in self._sums]

    def _drop(self, keys: Tensor, values: Tensor, which: Tensor) -> None:
        """Add the tokens that ``which``, ``[batch, tokens]``, picks to the compensation token."""
        self.dropped = self.dropped + which.sum(1)
        if not self.compensation:
            return
        for sums, source in zip(self._sums, (keys, values), strict=True):
            for start in range(0, source.shape[2], _CHUNK):
                part = source[:, :, start : start + _CHUNK].float()
                weight = which[:, None, None, start : start + _CHUNK].float()
                sums += (weight @ part)[:, :, 0]
        self._head[..., -1] = torch.log(self.dropped)[:, None, None]

    def _stored(self, parts: list[list[Tensor]]) -> KVStore:
        """A store of sinks, compensation token and recent tokens."""
        whole = []
        for (sinks, recent), sums in zip(parts, self._sums, strict=True):
            pieces = [sinks, recent]
            if self.compensation:
                mean = sums / self.dropped.clamp(min=1)[:, None, None]
                pieces.insert(1, mean.to(recent.dtype)[:, :, None])
            whole.append(torch.cat(pieces, 2))
        store = KVStore()
        store.append(whole[0], whole[1])
        return store

    def _masked(self, mask: Tensor, recent: int) -> Tensor:
        """The part of a mask over all positions that belongs to the slots, as float32."""
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        batch = len(self._sink_places)
        mask = mask.float().expand(batch, *mask.shape[1:])
        places = self._sink_places[:, None, None].expand(*mask.shape[:3], self.sinks)
        pieces = [mask.gather(3, places), mask[..., self._first : self._first + recent]]
        if self.compensation:
            pieces.insert(1, torch.zeros((*mask.shape[:3], 1), device=mask.device))
        return torch.cat(pieces, 3)
