"""What early exit did, as counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ExitLog:
    """Counters of one patched model's `generate` calls.

    Attributes:
        layers: Of the model.
        calls: Calls of generate that were answered.
        tokens: Tokens made, over all rows, with those that prompts gave.
        steps: Passes of the first layers, one per token and batch; prompts left out.
        exit_steps: Those that left early.
        exits: Tokens of unfinished rows by layers run before they were chosen; prompts left out.
        layer_passes: Calls of layers in those steps and between them, whatever number of tokens
            each was for, with audits and with what exited tokens needed later.
        layer_tokens: Tokens that those calls were for, over all rows.
        catch_ups: Passes of later layers for exited tokens alone.
        audited: Tokens of exits that the whole model was asked about.
        agreed: Those where it had the same best token.
        seconds: Time in steps, and in what the end of a call needs.
        row_exits: `exits` of each row of the last call.
    """

    layers: int = 0
    calls: int = 0
    tokens: int = 0
    steps: int = 0
    exit_steps: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    layer_passes: int = 0
    layer_tokens: int = 0
    catch_ups: int = 0
    audited: int = 0
    agreed: int = 0
    seconds: float = 0.0
    row_exits: list[dict[int, int]] = field(default_factory=list)

    def begin_call(self, batch: int) -> None:
        """Count a call of generate on ``batch`` rows."""
        self.calls += 1
        self.row_exits = [{} for _ in range(batch)]

    def count_pass(self, layers: int, tokens: int) -> None:
        """Count a call of each of some layers, on so many tokens of all rows."""
        self.layer_passes += layers
        self.layer_tokens += layers * tokens

    def count_exits(self, ran: int, rows: list[int]) -> None:
        """Count a token of each of these rows that was chosen after ``ran`` layers."""
        self.exits[ran] = self.exits.get(ran, 0) + len(rows)
        for row in rows:
            self.row_exits[row][ran] = self.row_exits[row].get(ran, 0) + 1

    @property
    def mean_depth(self) -> float | None:
        """Layers run before a token was chosen, on average; None if there were none."""
        tokens = sum(self.exits.values())
        return sum(ran * n for ran, n in self.exits.items()) / tokens if tokens else None

    @property
    def skipped(self) -> float | None:
        """Share of the calls of layers that did not happen; None if there were no steps."""
        return 1 - self.layer_passes / (self.layers * self.steps) if self.steps else None

    @property
    def agreement(self) -> float | None:
        """Share of audited tokens that the whole model would have chosen; None without audits."""
        return self.agreed / self.audited if self.audited else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        derived = {name: getattr(self, name) for name in ("mean_depth", "skipped", "agreement")}
        rows = [_json(exits) for exits in self.row_exits]
        return {**asdict(self), "exits": _json(self.exits), "row_exits": rows, **derived}

    def __str__(self) -> str:
        """Return lines for the report."""
        if not self.steps:
            return "early exit: no token decoded by generate yet"
        chosen = sum(self.exits.values())
        shares = ", ".join(f"{n / chosen:.0%} after {ran}" for ran, n in sorted(self.exits.items()))
        line = (
            f"early exit: {chosen} tokens, {shares} of {self.layers} layers (mean "
            f"{self.mean_depth:.1f}); {self.skipped:.0%} of layer calls skipped"
        )
        if self.audited:
            line += f"; {self.agreement:.0%} of {self.audited} audited as the whole model"
        return line


def _json(exits: dict[int, int]) -> dict[str, int]:
    return {str(ran): tokens for ran, tokens in sorted(exits.items())}
