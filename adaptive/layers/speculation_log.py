"""What self-speculation did, as counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
        dropped: Drafts that were not worth a check.
        turned_off: How often drafting was given up for a while, because it did not pay.
        lengths: Steps by number of drafts checked.
        draft_seconds: Time in drafts.
        verify_seconds: Time in checks.
        plain_seconds: Time in steps without drafts.
        draft_head_bytes: What the copy of the LM head takes that drafts were made with.
    """

    calls: int = 0
    tokens: int = 0
    steps: int = 0
    plain_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    dropped: int = 0
    turned_off: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    plain_seconds: float = 0.0
    draft_head_bytes: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of right drafts; None if there were none."""
        return self.accepted / self.drafted if self.drafted else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "acceptance": self.acceptance}

    def __str__(self) -> str:
        """Return one line for the report."""
        if not self.calls:
            return "self-speculation: no call of generate yet"
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
        if self.draft_head_bytes:
            line += f"; int8 draft head of {self.draft_head_bytes / 2**20:.1f} MiB"
        return line + (f"; given up {self.turned_off} times" if self.turned_off else "")
