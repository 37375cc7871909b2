"""Tokens and lengths of the rows of a batch, kept and updated on the device alone."""

import torch
from torch import Tensor

I64 = torch.int64


class StaticRows:
    """What a static step reads and writes besides the KV cache; the memory stays where it is.

    Attributes:
        lengths: Tokens of each row in the cache, ``[batch]``.
        last: The token after them, which no layer has seen, ``[batch, 1]``.
        made: New tokens of each row, ``[batch]``.
        tokens: Those, then padding, ``[batch, room]``.
        alive: Which rows are not finished, ``[batch]``.
        going: Whether any is, ``[1]``.
        counts: Steps in which a row was alive, such rows over all steps, drafts that they accepted.
    """

    def __init__(self, batch: int, room: int, ends: int, device: torch.device) -> None:
        """Allocate for ``room`` new tokens and ``ends`` end tokens."""

        def zeros(*sizes: int, dtype: torch.dtype = I64) -> Tensor:
            return torch.zeros(*sizes, dtype=dtype, device=device)

        self.lengths, self.made, self.top = zeros(batch), zeros(batch), zeros(batch)
        self.last, self.tokens = zeros(batch, 1), zeros(batch, room)
        self.alive, self.going = zeros(batch, dtype=torch.bool), zeros(1, dtype=torch.bool)
        self.ends, self.limit, self.counts = zeros(ends), zeros(1), zeros(3)

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return dict(self.__dict__)

    def begin(self, lengths: Tensor, first: Tensor, limit: int, ends: list[int], pad: int) -> None:
        """Start rows that have read a prompt.

        Args:
            lengths: Of the prompts, ``[batch]``.
            first: What follows each, ``[batch, 1]``.
            limit: New tokens that a row may get.
            ends: Tokens that finish a row; at most as many as there is memory for.
            pad: What stands behind the end of a row.
        """
        self.lengths.copy_(lengths - 1)  # the last token of a prompt counts with what follows it
        self.top.copy_(lengths + limit - 1)
        self.made.zero_()
        self.counts.zero_()
        self.tokens.fill_(pad)
        self.alive.fill_(True)
        self.limit.fill_(limit)
        self.ends.fill_(-1)  # no token
        self.ends[: len(ends)].copy_(torch.tensor(ends, dtype=I64))
        self.keep(first, torch.zeros_like(lengths))
        self.counts.zero_()

    def positions(self, offset: int, tokens: int) -> Tensor:
        """Positions of ``tokens`` tokens, ``offset`` behind the cache's end, ``[batch, tokens]``.

        What lies behind the last token that a row may get stays at its place: it is never kept,
        and a table of positions may end there.
        """
        return self.slots(offset, tokens).minimum(self.top[:, None])

    def slots(self, offset: int, tokens: int) -> Tensor:
        """Where the cache gets them, ``[batch, tokens]``."""
        steps = torch.arange(offset, offset + tokens, device=self.lengths.device)
        return self.lengths[:, None] + steps

    def keep(self, tokens: Tensor, accepted: Tensor) -> None:
        """Append what a check brought to the rows alive, until each ends.

        Args:
            tokens: Accepted drafts and one token more, then anything, ``[batch, 1 + drafts]``.
            accepted: Drafts accepted, ``[batch]``.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        ended = (tokens[:, :, None] == self.ends).any(-1)
        after = ended.cumsum(1) - ended.long()  # end tokens before this one
        at = self.made[:, None] + places
        kept = (places <= accepted[:, None]) & (after == 0) & (at < self.limit)
        kept &= self.alive[:, None]
        count = kept.sum(1)
        there = self.tokens.gather(1, at)  # padding, as nothing was written behind the end
        self.tokens.scatter_(1, at, torch.where(kept, tokens, there))
        last = tokens.gather(1, (count - 1).clamp(min=0)[:, None])
        self.last.copy_(torch.where(self.alive[:, None], last, self.last))
        self._count(accepted)
        self.made.add_(count)
        self.lengths.add_(count)
        self.alive &= ~(kept & ended).any(1) & (self.made < self.limit)
        self.going.copy_(self.alive.any()[None])

    def _count(self, accepted: Tensor) -> None:
        alive = self.alive.long()
        self.counts.add_(torch.stack([alive.max(), alive.sum(), (alive * accepted).sum()]))
