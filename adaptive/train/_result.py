"""What early_exit() returns: the losses on the way, and those of each exit before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_MOST_LINES = 9


@dataclass(frozen=True, kw_only=True)
class EarlyExitTraining:
    """A finished training. Prints as a few lines; `to_dict` is JSON.

    Attributes:
        model: Class of the model.
        family: Its family.
        steps: That were trained.
        seconds: In them, without the measurement of the exits.
        losses: Per step, the sum of the exits' losses by their weights. With a curriculum, steps
            that count other exits do not compare.
        exit_losses_before: The loss of each exit before the first step: item ``E - 1`` is of the
            exit after ``E`` layers, the last one of the whole model. In nats per token, without
            dropout, on ``held_out`` or the first batch.
        exit_losses_after: The same after the last step.
        settings: The arguments, as given.
    """

    model: str
    family: str
    steps: int
    seconds: float
    losses: tuple[float, ...]
    exit_losses_before: tuple[float, ...]
    exit_losses_after: tuple[float, ...]
    settings: dict[str, float | int | str | None]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def __str__(self) -> str:
        """Return the speed, the settings and the exits; some of them where there are many."""
        exits = len(self.exit_losses_after)
        shown = list(range(1, exits + 1))
        if exits > _MOST_LINES:
            gaps = _MOST_LINES - 1
            shown = sorted({1 + round(n * (exits - 1) / gaps) for n in range(_MOST_LINES)})
        lines = [
            f"{self.model} ({self.family}): {self.steps} steps in {self.seconds:.1f} s, "
            f"{1e3 * self.seconds / self.steps:.1f} ms each",
            "  " + ", ".join(f"{name} {value}" for name, value in self.settings.items()),
            "  exit layer  loss before  after",
        ]
        for layer in shown:
            before, after = self.exit_losses_before[layer - 1], self.exit_losses_after[layer - 1]
            lines.append(f"  {layer:>10}  {before:>11.3f}  {after:>5.3f}")
        return "\n".join(lines)
