"""What merging did to the tokens of an encoder, as counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive.layers.cosine_audit import CosineAudits


@dataclass(kw_only=True)
class TokenMergeLog(CosineAudits):
    """Counters of one patched encoder.

    Attributes:
        calls: Passes in which tokens could merge.
        tokens: Real tokens that went through each layer, added up.
        dense_tokens: Those that would have gone through each layer without merging.
        seconds: Time in these passes, on CPU, audits left out.
        merge_seconds: Of that, time in which tokens were matched and merged.
    """

    calls: int = 0
    tokens: list[int] = field(default_factory=list)
    dense_tokens: int = 0
    seconds: float = 0.0
    merge_seconds: float = 0.0

    @property
    def kept_shares(self) -> list[float]:
        """Share of the tokens that went through each layer; empty before the first pass."""
        return [count / self.dense_tokens for count in self.tokens] if self.dense_tokens else []

    @property
    def kept_share(self) -> float | None:
        """The same over all layers; None before the first pass."""
        shares = self.kept_shares
        return sum(shares) / len(shares) if shares else None

    def count(self, tokens: list[int], seconds: float, merge_seconds: float) -> None:
        """Count one pass, and the real tokens that went through each of its layers."""
        self.calls += 1
        self.seconds += seconds
        self.merge_seconds += merge_seconds
        self.dense_tokens += tokens[0]
        known = self.tokens or [0] * len(tokens)
        self.tokens = [old + new for old, new in zip(known, tokens, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        mean, least = self.agreement or (None, None)
        values = asdict(self)
        del values["cosine_sum"], values["cosine_min"]
        return {
            **values,
            "kept_shares": self.kept_shares,
            "kept_share": self.kept_share,
            "cosine_mean": mean,
            "cosine_min": least,
        }

    def __str__(self) -> str:
        """Return a few lines for the report."""
        if self.kept_share is None:
            return "token merging: no pass yet"
        shares = ", ".join(f"{share:.0%}" for share in self.kept_shares)
        line = f"token merging: {self.kept_share:.1%} of tokens kept, by layer: {shares}"
        if self.seconds:
            line += f"\n{self.merge_seconds / self.seconds:.1%} of {self.seconds:.3g} s to merge"
        if self.agreement is None:
            return line + "\nnone audited"
        mean, least = self.agreement
        return line + f"\n{self.audited} audited: cosine {mean:.4f}, at least {least:.4f}"
