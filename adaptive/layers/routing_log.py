"""What routing did: how much of which layer ran, as counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive.layers.cosine_audit import CosineAudits


@dataclass
class LayerRouting:
    """Counters of one routed layer.

    Attributes:
        offered: Sequences or tokens that could have run, without padding.
        ran: Those that did.
        calls: Calls of the module in prompts.
        skipped: Those in which nothing ran.
        decode_calls: Calls with one token per sequence after the prompt.
        decode_skipped: Those in which nothing ran: they alone save reading the module's weights.
    """

    offered: int = 0
    ran: int = 0
    calls: int = 0
    skipped: int = 0
    decode_calls: int = 0
    decode_skipped: int = 0

    @property
    def share(self) -> float | None:
        """Share that ran; None before the first call."""
        return self.ran / self.offered if self.offered else None


@dataclass(kw_only=True)
class RoutingLog(CosineAudits):
    """Counters of one patched model. Audits compare the last hidden states of single tokens.

    Attributes:
        unit: What is routed: "block", "attention" or "mlp".
        decide: What is decided on: "sequence" or "token".
        layers: By number of the layer.
        since_audit: Tokens of the passes since the last audit, padding too.
    """

    unit: str
    decide: str
    layers: dict[int, LayerRouting] = field(default_factory=dict)
    since_audit: int = 0

    def count(self, layer: int, offered: int, ran: int, decoding: bool) -> None:
        """Count one call of a routed module.

        Args:
            layer: Its number.
            offered: Sequences or tokens that could have run.
            ran: Those that did.
            decoding: Whether the call had one token per sequence, after the prompt.
        """
        found = self.layers.setdefault(layer, LayerRouting())
        found.offered += offered
        found.ran += ran
        if decoding:
            found.decode_calls += 1
            found.decode_skipped += not ran
        else:
            found.calls += 1
            found.skipped += not ran

    @property
    def share(self) -> float | None:
        """Share of sequences or tokens that ran, over all routed layers; None before the first."""
        offered = sum(layer.offered for layer in self.layers.values())
        return sum(layer.ran for layer in self.layers.values()) / offered if offered else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        layers = {
            str(number): {**asdict(layer), "share": layer.share}
            for number, layer in sorted(self.layers.items())
        }
        mean, least = self.agreement or (None, None)
        return {
            "unit": self.unit,
            "decide": self.decide,
            "layers": layers,
            "share": self.share,
            "audits": self.audits,
            "audited": self.audited,
            "audit_seconds": self.audit_seconds,
            "cosine_mean": mean,
            "cosine_min": least,
        }

    def __str__(self) -> str:
        """Return a few lines for the report."""
        if self.share is None:
            return "routing: no call yet"
        shares = ", ".join(
            f"{number}: {layer.share:.0%}"
            for number, layer in sorted(self.layers.items())
            if layer.share is not None
        )
        every = self.layers.values()
        prompt, skipped = sum(x.calls for x in every), sum(x.skipped for x in every)
        steps, quiet = sum(x.decode_calls for x in every), sum(x.decode_skipped for x in every)
        many = "sequences" if self.decide == "sequence" else "tokens"
        audit = "none audited"
        if self.agreement is not None:
            mean, least = self.agreement
            audit = f"{self.audited} tokens audited: cosine {mean:.4f}, at least {least:.4f}"
        return (
            f"routing of {self.unit}s: {self.share:.1%} of {many} ran; by layer {shares}\n"
            f"modules not run: {skipped} of {prompt} calls in prompts, "
            f"{quiet} of {steps} in decoding\n{audit}"
        )
