"""What early exit did to the sequences of an encoder, as counters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EncoderExitLog:
    """Counters of one patched encoder.

    Attributes:
        layers: Of the model.
        calls: Passes that sequences could leave.
        depths: Sequences by the number of layers that ran for them.
        layer_rows: Times that a layer ran for a sequence, added up.
        seconds: Time in these passes, on CPU, audits left out.
        audits: Passes that were audited: run in full, too.
        audited: Sequences in them.
        cosine_sum: Cosines of their pooled outputs with those of all layers, added up.
        cosine_min: The least of them.
        audit_seconds: Time in the full passes.
    """

    layers: int
    calls: int = 0
    depths: dict[int, int] = field(default_factory=dict)
    layer_rows: int = 0
    seconds: float = 0.0
    audits: int = 0
    audited: int = 0
    cosine_sum: float = 0.0
    cosine_min: float = math.inf
    audit_seconds: float = 0.0

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

    @property
    def agreement(self) -> tuple[float, float] | None:
        """Mean and least cosine of audited pooled outputs with full ones; None: none audited."""
        return (self.cosine_sum / self.audited, self.cosine_min) if self.audited else None

    def count(self, depths: list[int], seconds: float) -> None:
        """Count one pass and how many layers ran for each of its sequences."""
        self.calls += 1
        self.seconds += seconds
        self.layer_rows += sum(depths)
        for depth in depths:
            self.depths[depth] = self.depths.get(depth, 0) + 1

    def count_audit(self, cosines: list[float], seconds: float) -> None:
        """Count one full pass and the cosines of its sequences."""
        self.audits += 1
        self.audited += len(cosines)
        self.cosine_sum += sum(cosines)
        self.cosine_min = min(self.cosine_min, *cosines)
        self.audit_seconds += seconds

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
