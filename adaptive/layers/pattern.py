"""What the queries of a call see where that is near keys of their own sequence, without a mask."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which keys each query sees, in the words of `local_attention`.

    Attributes:
        tokens: Keys that matter, counted from the first; the last query stands at the last of them.
        window: Keys less than this away are seen; None: however far.
        offsets: Where each row is cut into sequences, ``[batch, sequences + 1]``, int32; what lies
            outside is padding. None: one sequence of all tokens.
        causal: No query sees a later key.
    """

    tokens: int
    window: int | None = None
    offsets: Tensor | None = None
    causal: bool = True

    @cached_property
    def padded_after(self) -> int:
        """The most padding after the tokens of a row that has any."""
        if self.offsets is None:
            return 0
        starts, ends = self.offsets[:, 0], self.offsets[:, -1]
        return int(torch.where(ends > starts, self.tokens - ends, 0).amax())

    @cached_property
    def padded_before(self) -> int:
        """The most padding before the tokens of a row that has any."""
        if self.offsets is None:
            return 0
        starts, ends = self.offsets[:, 0], self.offsets[:, -1]
        return int(torch.where(ends > starts, starts, 0).amax())

    @cached_property
    def lengths(self) -> list[int] | None:
        """Tokens of every sequence of all rows; None: each row is one, without padding."""
        if self.offsets is None:
            return None
        lengths: list[int] = self.offsets.diff(dim=1).flatten().tolist()
        return lengths

    def limits(self, batch: int, queries: int, device: torch.device) -> tuple[Tensor, ...]:
        """Positions of the queries, and where their sequences start and end.

        Returns:
            Three int64 tensors ``[batch, queries]``; for padding, start and end are the same.
        """
        places = torch.arange(self.tokens - queries, self.tokens, device=device)
        places = places.expand(batch, -1).contiguous()
        if self.offsets is None:
            return places, torch.zeros_like(places), torch.full_like(places, self.tokens)
        cuts = self.offsets.long()
        number = torch.searchsorted(cuts, places, right=True)
        last = cuts.shape[1] - 1
        inside = (number > 0) & (number <= last)
        starts = cuts.gather(1, (number - 1).clamp(min=0))
        ends = cuts.gather(1, number.clamp(max=last))
        return places, starts, torch.where(inside, ends, starts)

    def scores(self, batch: int, queries: int, window: int | None, sinks: int = 0) -> int:
        """How many keys the queries of one head see, added up.

        Args:
            batch: Rows.
            queries: The last tokens.
            window: Of the head; None: however far.
            sinks: First tokens of its sequence that each query sees besides.
        """
        if self.offsets is None and window is None and self.causal:
            return batch * sum((self.tokens - queries + 1, self.tokens)) * queries // 2
        device = torch.device("cpu") if self.offsets is None else self.offsets.device
        places, starts, ends = self.limits(batch, queries, device)
        near = self.tokens if window is None else window
        first = torch.maximum(starts, places - near + 1)
        after = torch.minimum(ends, places + (1 if self.causal else near))
        besides = (first - starts).clamp(max=sinks)
        seen = (after - first + besides).clamp(min=0)
        return int(torch.where(ends > starts, seen, 0).sum())

    def keys_read(self, queries: int) -> int:
        """Keys of a row that lie within the window of some query, padding included."""
        if self.window is None:
            return self.tokens
        return min(self.tokens, queries + self.window - 1)


def cut_at(visible: Tensor | None, cuts: Tensor | None) -> tuple[bool, Tensor | None]:
    """Return offsets for rows that are cut into sequences.

    Args:
        visible: Which tokens are not padding, ``[batch, tokens]``, bool; None: all.
        cuts: Which tokens are the first of a sequence, likewise; None: none but the row's first.

    Returns:
        Whether offsets can say it: padding has to lie before and after the tokens of a row. And
        the offsets; None: one sequence of all tokens.
    """
    if visible is not None and bool(visible.all()):
        visible = None
    known = visible if cuts is None else cuts
    if known is None:
        return True, None
    batch, tokens = known.shape
    places = torch.arange(tokens, device=known.device)
    starts = torch.zeros(batch, dtype=torch.int64, device=known.device)
    ends = torch.full_like(starts, tokens)
    if visible is not None:
        count = visible.sum(1)
        starts = torch.where(count > 0, visible.int().argmax(1), 0)
        ends = starts + count
        run = (places >= starts[:, None]) & (places < ends[:, None])
        if not bool((run == visible).all()):
            return False, None
    inner = torch.zeros_like(known)
    if cuts is not None:
        inner = cuts & (places > starts[:, None]) & (places < ends[:, None])
    slots = inner.cumsum(1)
    most = int(slots.max()) if slots.numel() else 0
    if visible is None and most == 0:
        return True, None
    offsets = ends[:, None].expand(batch, most + 2).clone()
    offsets[:, 0] = starts
    rows, columns = inner.nonzero(as_tuple=True)
    offsets[rows, slots[rows, columns]] = columns
    return True, offsets.int()
