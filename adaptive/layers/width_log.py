"""What FFNs of a part of their neurons did, as counters."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive.layers.token_audit import TokenAudit


@dataclass(kw_only=True)
class LayerWidths:
    """Counters of one FFN.

    Attributes:
        calls: Of it.
        tokens: By number of neurons, the tokens that went through so many; without padding.
        used: Neurons that tokens went through, added up over them. Of up to 16 tokens in a call
            all are computed up to the widest, which costs no more than reading the weights.
        dense: Those of the whole FFN.
        read: Neurons whose weights some token of the call needed, added up over calls.
        held: Those of the whole FFN.
        audit: How far the outputs were from those of the whole FFN.
    """

    calls: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    used: int = 0
    dense: int = 0
    read: int = 0
    held: int = 0
    audit: TokenAudit = field(default_factory=TokenAudit)

    def count(self, tokens: dict[int, int], neurons: int) -> None:
        """Count one call, whose ``tokens`` are by width, of an FFN of so many ``neurons``."""
        self.calls += 1
        for width, many in tokens.items():
            self.tokens[width] = self.tokens.get(width, 0) + many
            self.used += width * many
            self.dense += neurons * many
        self.read += max(tokens, default=0)
        self.held += neurons


@dataclass(kw_only=True)
class WidthLog:
    """Counters of one patched model.

    Attributes:
        layers: By number of the layer.
    """

    layers: dict[int, LayerWidths] = field(default_factory=dict)

    def of(self, layer: int) -> LayerWidths:
        """Counters of a layer."""
        return self.layers.setdefault(layer, LayerWidths())

    @property
    def used_share(self) -> float | None:
        """Share of the neurons that were used, over all tokens; None before the first."""
        return _share(self.layers, "used", "dense")

    @property
    def read_share(self) -> float | None:
        """Share of the weights that were read, over all calls; None before the first."""
        return _share(self.layers, "read", "held")

    @property
    def audit(self) -> TokenAudit:
        """Audits of all layers."""
        total, every = TokenAudit(), [layer.audit for layer in self.layers.values()]
        for name in ("audits", "tokens", "error_squares", "dense_squares"):
            setattr(total, name, sum(getattr(audit, name) for audit in every))
        worst = [audit.worst for audit in every]
        total.worst = math.nan if any(map(math.isnan, worst)) else max(worst, default=0.0)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        layers = {}
        for number, layer in sorted(self.layers.items()):
            tokens = {str(width): many for width, many in sorted(layer.tokens.items())}
            layers[str(number)] = {
                **asdict(layer),
                "tokens": tokens,
                "audit": layer.audit.to_dict(),
            }
        return {
            "layers": layers,
            "used_share": self.used_share,
            "read_share": self.read_share,
            "audit": self.audit.to_dict(),
        }

    def __str__(self) -> str:
        """Return a few lines for the report."""
        if self.used_share is None or self.read_share is None:
            return "widths of FFNs: no call yet"
        shares = ", ".join(
            f"{number}: {layer.used / layer.dense:.0%}"
            for number, layer in sorted(self.layers.items())
            if layer.dense
        )
        line = (
            f"widths of FFNs: {self.used_share:.1%} of neurons used, "
            f"{self.read_share:.1%} of weights read; by layer {shares}\n"
        )
        audit = self.audit
        if audit.error is None:
            return line + "none audited"
        return line + (
            f"{audit.audits} calls audited, {audit.tokens} tokens: FFN outputs off by "
            f"{audit.error:.2%}, one token's by {audit.worst:.2%} at most"
        )


def _share(layers: dict[int, LayerWidths], part: str, whole: str) -> float | None:
    total: int = sum(getattr(layer, whole) for layer in layers.values())
    return sum(getattr(layer, part) for layer in layers.values()) / total if total else None
