"""What the experts of FFNs did: how much of which layer ran, and how far it was from the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adaptive.layers.units import in_bytes

AUDITED_ROWS = 16
"""Most rows of a call that also run in full."""


@dataclass(kw_only=True)
class LayerExperts:
    """Counters of one FFN.

    Attributes:
        calls: Of it.
        rows: Tokens in them, without padding.
        runs: Of these, those that ran each expert.
        read: Experts that some row of a call ran, added up: those whose weights were read.
        audits: Calls of which rows also ran in full.
        audited: Those rows.
        error_sum: Of them, the distance from the whole FFN's output over its length, added up.
        error_max: The largest.
        cosine_sum: Cosines with the whole FFN's output, added up.
        cosine_min: The least.
    """

    calls: int = 0
    rows: int = 0
    runs: list[int] = field(default_factory=list)
    read: int = 0
    audits: int = 0
    audited: int = 0
    error_sum: float = 0.0
    error_max: float = 0.0
    cosine_sum: float = 0.0
    cosine_min: float = 1.0

    def count(self, rows: int, runs: list[int], read: int) -> None:
        """Count one call, the tokens that ran each expert, and how many experts rows ran."""
        self.calls += 1
        self.rows += rows
        self.read += read
        known = self.runs or [0] * len(runs)
        self.runs = [old + new for old, new in zip(known, runs, strict=True)]

    def audit(self, made: Tensor, full: Tensor) -> None:
        """Count how far rows, ``[rows, width]``, are from what the whole FFN makes of them."""
        ours, theirs = made.detach().double(), full.detach().double()
        size = theirs.norm(dim=1)
        known = size != 0  # nothing is relative to zero
        errors = ((ours - theirs).norm(dim=1) / size)[known].tolist()
        cosines = torch.cosine_similarity(ours, theirs, dim=1)[known].clamp(max=1).tolist()
        if errors:
            self.audits += 1
            self.audited += len(errors)
            self.error_sum += sum(errors)
            self.error_max = _worst(max, self.error_max, errors)
            self.cosine_sum += sum(cosines)
            self.cosine_min = _worst(min, self.cosine_min, cosines)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; means and extremes are None where nothing was audited."""
        values = asdict(self)
        for name in ("error", "cosine"):
            total = values.pop(f"{name}_sum")
            values[f"{name}_mean"] = total / self.audited if self.audited else None
        for name in () if self.audited else ("error_max", "cosine_min"):
            values[name] = None
        return values


@dataclass(kw_only=True)
class ExpertLog:
    """Counters of one patched model since they were reset.

    Attributes:
        experts: Of each FFN.
        layers: By number of the layer.
        copied_bytes: Held now for copies of weights in another order.
    """

    experts: int
    layers: dict[int, LayerExperts] = field(default_factory=dict)
    copied_bytes: int = 0

    def layer(self, index: int) -> LayerExperts:
        """Counters of a layer."""
        return self.layers.setdefault(index, LayerExperts())

    @property
    def share(self) -> float | None:
        """Share of the neurons that tokens ran; None before the first call."""
        offered = self.experts * sum(layer.rows for layer in self.layers.values())
        return sum(sum(layer.runs) for layer in self.layers.values()) / offered if offered else None

    @property
    def read_share(self) -> float | None:
        """Share of the weights that calls read; None before the first call."""
        calls = self.experts * sum(layer.calls for layer in self.layers.values())
        return sum(layer.read for layer in self.layers.values()) / calls if calls else None

    @property
    def error(self) -> tuple[float, float] | None:
        """Mean and largest relative error of audited rows of single FFNs; None: none audited."""
        audited = sum(layer.audited for layer in self.layers.values())
        if not audited:
            return None
        total = sum(layer.error_sum for layer in self.layers.values())
        return total / audited, _worst(max, 0.0, [x.error_max for x in self.layers.values()])

    @property
    def cosine(self) -> tuple[float, float] | None:
        """Mean and least cosine of audited rows of single FFNs; None: none audited."""
        audited = sum(layer.audited for layer in self.layers.values())
        if not audited:
            return None
        total = sum(layer.cosine_sum for layer in self.layers.values())
        return total / audited, _worst(min, 1.0, [x.cosine_min for x in self.layers.values()])

    def reset(self) -> ExpertLog:
        """A log of the same FFNs with nothing in it."""
        return ExpertLog(experts=self.experts)

    def holding(self, copied_bytes: int) -> ExpertLog:
        """A copy that says how much is held."""
        layers = {n: replace(layer, runs=[*layer.runs]) for n, layer in self.layers.items()}
        return ExpertLog(experts=self.experts, layers=layers, copied_bytes=copied_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        error, cosine = self.error or (None, None), self.cosine or (None, None)
        return {
            "experts": self.experts,
            "layers": {str(n): layer.to_dict() for n, layer in sorted(self.layers.items())},
            "copied_bytes": self.copied_bytes,
            "share": self.share,
            "read_share": self.read_share,
            **dict(zip(("error_mean", "error_max"), error, strict=True)),
            **dict(zip(("cosine_mean", "cosine_min"), cosine, strict=True)),
        }

    def __str__(self) -> str:
        """Return a few lines for the report."""
        held = f"; {in_bytes(self.copied_bytes)} of weights copied" if self.copied_bytes else ""
        if self.share is None:
            return f"FFN experts: no call yet{held}"
        text = f"FFN experts: {self.share:.1%} of neurons ran, {self.read_share:.1%} read{held}"
        if self.error is None or self.cosine is None:
            return text + "\nnone audited"
        audited = sum(layer.audited for layer in self.layers.values())
        return (
            f"{text}\n{audited} rows audited: an FFN's relative error {self.error[0]:.3f}, at most "
            f"{self.error[1]:.3f}; cosine {self.cosine[0]:.3f}, at least {self.cosine[1]:.3f}"
        )


def _worst(of: Callable[..., float], known: float, found: list[float]) -> float:
    """The largest or least of all; NaN is worse than any number, and `max` would lose it."""
    values = [known, *found]
    return math.nan if any(map(math.isnan, values)) else of(values)
