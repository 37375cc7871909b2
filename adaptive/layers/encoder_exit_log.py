"""What early exit did to the sequences of an encoder, as counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive.layers.cosine_audit import CosineAudits


@dataclass(kw_only=True)
class EncoderExitLog(CosineAudits):
    """Counters of one patched encoder.

    Attributes:
        layers: Of the model.
        calls: Passes that sequences could leave.
        depths: Sequences by the number of layers that ran for them.
        layer_rows: Times that a layer ran for a sequence, added up.
        seconds: Time in these passes, on CPU, audits left out.
    """

    layers: int
    calls: int = 0
    depths: dict[int, int] = field(default_factory=dict)
    layer_rows: int = 0
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Sequences that were counted."""
        return sum(self.depths.values())

    @property
    def mean_depth(self) -> float | None:
        """Layers that ran for a sequence, in the mean; None before the first."""
        return self.layer_rows / self.rows if self.rows else None

    @property
    def skipped_share(self) -> float | None:
        """Share of the layers that did not run, over all sequences."""
        return 1 - self.layer_rows / (self.rows * self.layers) if self.rows else None

    def count(self, depths: list[int], seconds: float) -> None:
        """Count one pass and how many layers ran for each of its sequences."""
        self.calls += 1
        self.seconds += seconds
        self.layer_rows += sum(depths)
        for depth in depths:
            self.depths[depth] = self.depths.get(depth, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        mean, least = self.agreement or (None, None)
        values = asdict(self)
        del values["cosine_sum"], values["cosine_min"]
        return {
            **values,
            "depths": {str(depth): count for depth, count in sorted(self.depths.items())},
            "mean_depth": self.mean_depth,
            "skipped_share": self.skipped_share,
            "cosine_mean": mean,
            "cosine_min": least,
        }

    def __str__(self) -> str:
        """Return a few lines for the report."""
        if not self.rows:
            return "early exit: no pass yet"
        depths = ", ".join(f"{count} after {depth}" for depth, count in sorted(self.depths.items()))
        line = (
            f"early exit: mean depth {self.mean_depth:.2f} of {self.layers}, "
            f"{self.skipped_share:.1%} of layers skipped\n"
            f"{self.rows} sequences in {self.seconds:.3g} s, left: {depths}"
        )
        if self.agreement is None:
            return line + "\nnone audited"
        mean, least = self.agreement
        return line + f"\n{self.audited} audited: cosine {mean:.4f}, at least {least:.4f}"
