"""Which heads the tokens of a call of attention run, and what a pass knows of it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int, Tensor | None]
"""KV heads from the first up to the second, and the tokens that run them; None: all of them."""


class HeadChoice(NamedTuple):
    """What the tokens of one call of attention run.

    Attributes:
        rows: Tokens of the call, ``batch * query_tokens``.
        spans: Which KV heads run for which tokens, both ascending; no head is in two.
        scales: What each head's output is multiplied by, ``[rows, kv_heads]``, float32; None: 1.
        counted: Tokens of the call that are no padding.
        audited: Tokens that run all heads, too, ``[audited]``; None: no audit.
        full: What attention gives of them with all heads, ``[audited, heads, head_dim]``, in a
            list of one as soon as it is known.
    """

    rows: int
    spans: list[Span]
    scales: Tensor | None = None
    counted: int = 0
    audited: Tensor | None = None
    full: list[Tensor] = []  # noqa: RUF012 - never written to: audits come with their own

    @property
    def same(self) -> bool:
        """Whether all tokens run the same heads."""
        return all(rows is None for _, _, rows in self.spans)

    @property
    def kv_heads(self) -> int:
        """KV heads that some token runs."""
        return sum(stop - start for start, stop, _ in self.spans)

    def pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and KV heads that meet, ``[pairs]`` each, int64, ordered by head."""
        every = torch.arange(self.rows, device=device)
        tokens, heads = [], []
        for start, stop, rows in self.spans:
            some = every if rows is None else rows
            tokens += [some] * (stop - start)
            heads.append(torch.arange(start, stop, device=device).repeat_interleave(len(some)))
        return torch.cat(tokens), torch.cat(heads)


@dataclass
class HeadPass:
    """Choices of the calls of attention that are now running, by layer."""

    chosen: dict[int, HeadChoice] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a call that an exception ended: a copy begins with none."""
        return {"chosen": {}}


def the_same(rows: int, heads: tuple[int, ...]) -> HeadChoice:
    """The choice of these KV heads for all of so many tokens."""
    spans: list[Span] = []
    for head in heads:
        if spans and spans[-1][1] == head:
            spans[-1] = (spans[-1][0], head + 1, None)
        else:
            spans.append((head, head + 1, None))
    return HeadChoice(rows, spans)
