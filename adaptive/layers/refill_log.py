"""What `generate_many` did, as counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from adaptive.layers.units import in_bytes


@dataclass
class RefillLog:
    """Counters of one patched model's `generate_many` calls.

    Attributes:
        calls: Calls that were answered.
        prompts: Prompts read.
        refills: Prompts that took the place of a finished row.
        prompt_tokens: Tokens of prompts.
        tokens: Tokens made.
        steps: Steps that made a token for each row in the batch, with self-speculation some.
        rows: Rows in those steps, all of them unfinished.
        places: Rows that there would be had each batch stayed full.
        shifts: Times that the cache was moved, for longer prompts, to close gaps between tokens
            or to give memory back.
        held_bytes: Most bytes of keys and values held at a time, with those of a prompt just read.
    """

    calls: int = 0
    prompts: int = 0
    refills: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    rows: int = 0
    places: int = 0
    shifts: int = 0
    held_bytes: int = 0

    @property
    def mean_rows(self) -> float | None:
        """Unfinished rows in a step, on average; None without one."""
        return self.rows / self.steps if self.steps else None

    @property
    def busy_share(self) -> float | None:
        """Share of the places of the batch that an unfinished row took; None without a step."""
        return self.rows / self.places if self.places else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "mean_rows": self.mean_rows, "busy_share": self.busy_share}

    def __str__(self) -> str:
        """Return a line for the report."""
        line = (
            f"generate_many: {self.prompts} prompts, {self.tokens} tokens, {self.refills} refills"
        )
        if self.steps:
            line += (
                f"; {self.mean_rows:.1f} rows in {self.steps} steps, "
                f"{self.busy_share:.0%} of the places busy; cache at most "
                f"{in_bytes(self.held_bytes)}"
            )
        return line
