"""Keys and values of heads that see a window and some first tokens, and never anything else.

Slots: the first tokens, then the recent ones. A row's first tokens lie at the end of their slots,
so that what is held of a row is one run: its first tokens, a gap that nobody sees, its recent ones.
Read as a sequence of its own it gives every query what it would see in the whole text.
"""

import torch
from torch import Tensor

from adaptive.layers.kv_store import KVStore
from adaptive.layers.pattern import Pattern
from adaptive.layers.window_store import slack

ROLLBACK = 32
"""Tokens kept besides the window, so that so many of the last ones can be cropped."""


def kept_tokens(window: int) -> int:
    """Recent tokens that are kept at least: those that the next query sees, and some to crop."""
    return window - 1 + ROLLBACK


class LocalStore:
    """What is left of the keys and values of some heads.

    Args:
        keys: ``[batch, kv_heads, length, head_dim]``, all tokens so far; what is kept is copied.
        values: As ``keys``.
        starts: Position of each row's first token that is not padding, ``[batch]``, int64.
        sinks: First tokens to keep.
        window: Tokens that a query sees, its own included.

    Attributes:
        store: Sinks and recent tokens, ``[batch, kv_heads, sinks + recent, head_dim]``.
        starts: Slot of each row's first token, ``[batch]``, int64.
        missing: Tokens that were dropped after each row's sinks, ``[batch]``, int64.
        settled: Whether the sinks of all rows stand in their slots, the first ones.
        even: If so, and as many tokens are missing in all rows: how many; else None.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, starts: Tensor, sinks: int, window: int
    ) -> None:
        """Copy what is kept."""
        self.sinks, self.window = sinks, window
        self.dropped = 0
        # As if there were slots for sinks before all tokens, which nobody sees yet.
        self.starts = starts.to(keys.device) + sinks
        self.missing = torch.zeros_like(self.starts)
        self.settled = False
        self.even: int | None = None
        self.store = KVStore()
        self._keep(keys, values, max(keys.shape[2] - kept_tokens(window), 0), -sinks)

    @property
    def recent(self) -> int:
        """Recent tokens held."""
        return self.store.length - self.sinks

    def trim(self) -> None:
        """Drop the oldest recent tokens if too many have piled up."""
        over = self.recent - kept_tokens(self.window)
        if over > slack(self.window):
            keys, values = self.tensors()
            self._keep(keys, values, over, 0)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[batch, kv_heads, slots, head_dim]``."""
        keys, values = self.store.keys, self.store.values
        assert keys is not None
        assert values is not None
        return keys, values

    def offsets(self) -> Tensor:
        """Where the run of each row starts and ends, ``[batch, 2]``, int32."""
        ends = torch.full_like(self.starts, self.store.length)
        return torch.stack([self.starts, ends], 1).int()

    def pattern(self) -> Pattern:
        """The same as a pattern, without offsets where they say nothing."""
        return Pattern(self.store.length, self.window, None if self.settled else self.offsets())

    def dropped_between(self) -> Tensor | int:
        """Tokens that were dropped after the sinks: of each row, ``[batch, 1]``, or of all."""
        return self.missing[:, None] if self.even is None else self.even

    def seen(self, queries: int, sinks: bool = True) -> Tensor:
        """Which slots the last ``queries`` tokens see, ``[batch, 1, queries, slots]``, bool.

        Args:
            queries: How many tokens.
            sinks: Whether they look at the sinks before their window, too.
        """
        slots = torch.arange(self.store.length, device=self.starts.device)
        places = slots[len(slots) - queries :, None]
        first = self.starts[:, None, None, None]
        away = places - slots
        near = away < self.window
        if sinks:
            near = near | (slots < first + self.sinks)
        return near & (away >= 0) & (slots >= first)

    def crop(self, tokens: int) -> None:
        """Remove the last ``tokens`` tokens.

        Raises:
            ValueError: The window before them is not held any more.
        """
        most = self.recent - (self.window - 1 if self.dropped else 0)
        if tokens > most:
            raise ValueError(
                f"adaptive::kv_cache: crop must remove at most {max(most, 0)} tokens, got "
                f"{tokens}; the window before the others was dropped"
            )
        self.store.crop(self.store.length - tokens)

    def select(self, rows: Tensor) -> None:
        """Make a batch of the rows ``rows``."""
        self.store.select(rows)
        self.starts = self.starts.index_select(0, rows)
        self.missing = self.missing.index_select(0, rows)

    def _keep(self, keys: Tensor, values: Tensor, over: int, shift: int) -> None:
        """Drop ``over`` of the oldest recent tokens, after the sinks among them were moved.

        Args:
            keys: Where slot ``i`` is ``keys[:, :, i + shift]``; before the first, nobody looks.
            values: As ``keys``.
            over: How many.
            shift: 0, or minus the slots for sinks.
        """
        batch, heads, _, width = keys.shape
        places = torch.arange(self.sinks, device=keys.device)
        passed = self.starts <= over  # rows all of whose sinks have left the recent tokens
        source = torch.where(passed[:, None], self.starts[:, None] + places, over + places)
        source = (source + shift).clamp(min=0)
        index = source[:, None, :, None].expand(batch, heads, self.sinks, width)
        rest = slice(self.sinks + over + shift, None)
        parts = [torch.cat([t.gather(2, index), t[:, :, rest]], 2) for t in (keys, values)]
        store = KVStore()
        store.append(parts[0], parts[1])
        self.store = store
        self.missing += (over - self.starts).clamp(min=0)
        self.starts = (self.starts - over).clamp(min=0)
        self.settled = not bool(self.starts.any())
        counts = self.missing.tolist() if self.settled else []
        self.even = counts[0] if len(set(counts)) == 1 else None
        self.dropped += over
