"""What self-speculation did, as counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SkipSearchLog:
    """What a search for skip sets has found.

    Attributes:
        skip: Layers whose attention drafts leave out, and layers whose MLP they do: what
            ``SelfSpeculative(skip=...)`` takes; None before the first candidate.
        matchness: Share of tokens that the model is expected to make without them.
        speedup: Expected speed over plain decoding, with the best number of drafts.
        finished: Why the search is over; "" while it goes on.
    """

    skip: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    matchness: float | None = None
    speedup: float | None = None
    finished: str = ""

    def __str__(self) -> str:
        """Return a part of a line."""
        if self.skip is None:
            return "searching for skip sets"
        attention, mlp = (", ".join(map(str, layers)) or "none" for layers in self.skip)
        return (
            f"skip sets: attention {attention}; MLP {mlp}; matchness {self.matchness:.0%}, "
            f"{self.finished or 'searching on'}"
        )


@dataclass
class SpeculationLog:
    """Counters of one patched model's `generate` calls.

    Attributes:
        calls: Calls of generate that were answered.
        tokens: Tokens made, over all rows.
        steps: Steps with drafts.
        plain_steps: Passes of the whole model without drafts, prompts left out.
        drafted: Tokens drafted and checked, over all rows.
        accepted: Those that were right.
        siblings: Of the drafted, those beside a draft in its tree.
        siblings_right: Those of them that were right.
        dropped: Drafts that were not worth a check.
        turned_off: How often drafting was given up for a while, because it did not pay.
        lengths: Steps by number of drafts checked.
        draft_seconds: Time in drafts; of the calling thread where that is a CPU's, see `clock`.
        verify_seconds: Time in checks.
        plain_seconds: Time in steps without drafts.
        draft_head_bytes: What the copy of the LM head takes that drafts were made with.
        static_bytes: What the KV caches of static steps take.
        candidates: Skip sets that a search scored.
        search_seconds: Time in that.
        search: What it has found since the model was patched; None without one.
    """

    calls: int = 0
    tokens: int = 0
    steps: int = 0
    plain_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    siblings: int = 0
    siblings_right: int = 0
    dropped: int = 0
    turned_off: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    plain_seconds: float = 0.0
    draft_head_bytes: int = 0
    static_bytes: int = 0
    candidates: int = 0
    search_seconds: float = 0.0
    search: SkipSearchLog | None = None

    @property
    def search_share(self) -> float:
        """Share of the time of decoding that a search took."""
        rest = self.draft_seconds + self.verify_seconds + self.plain_seconds
        return self.search_seconds / (rest + self.search_seconds) if self.search_seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of right drafts; None if there were none."""
        return self.accepted / self.drafted if self.drafted else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        own = {"acceptance": self.acceptance, "search_share": self.search_share}
        return {**asdict(self), **own}

    def __str__(self) -> str:
        """Return one line for the report."""
        if not self.calls:
            return "self-speculation: no call of generate yet"
        return self._steps() + self._search()

    def _steps(self) -> str:
        if not self.steps:
            return (
                f"self-speculation: {self.tokens} tokens, none drafted "
                f"({self.plain_steps} plain steps; given up {self.turned_off} times)"
            )
        drafts = self.drafted / self.steps
        line = (
            f"self-speculation: {self.tokens} tokens; {self.steps} checks of {drafts:.1f} drafts, "
            f"{self.acceptance:.0%} accepted; {self.plain_steps} plain steps"
        )
        if self.siblings:
            line += f"; {self.siblings_right} of {self.siblings} siblings right"
        if self.draft_head_bytes:
            line += f"; int8 draft head of {self.draft_head_bytes / 2**20:.1f} MiB"
        if self.static_bytes:
            line += f"; static cache of {self.static_bytes / 2**20:.1f} MiB"
        return line + (f"; given up {self.turned_off} times" if self.turned_off else "")

    def _search(self) -> str:
        if self.search is None:
            return ""
        return (
            f"\n{self.search}; {self.candidates} candidates in {self.search_seconds:.2f} s, "
            f"{self.search_share:.0%} of the time"
        )
