"""What merging did to the tokens of an encoder, as counters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TokenMergeLog:
    """Counters of one patched encoder.

    Attributes:
        calls: Passes in which tokens could merge.
        tokens: Real tokens that went through each layer, added up.
        dense_tokens: Those that would have gone through each layer without merging.
        seconds: Time in these passes, on CPU, audits left out.
        merge_seconds: Of that, time in which tokens were matched and merged.
        audits: Passes that were audited: run in full, too.
        audited: Sequences in them.
        cosine_sum: Cosines of their pooled outputs with those of the full pass, added up.
        cosine_min: The least of them.
        audit_seconds: Time in the full passes.
    """

    calls: int = 0
    tokens: list[int] = field(default_factory=list)
    dense_tokens: int = 0
    seconds: float = 0.0
    merge_seconds: float = 0.0
    audits: int = 0
    audited: int = 0
    cosine_sum: float = 0.0
    cosine_min: float = math.inf
    audit_seconds: float = 0.0

    @property
    def kept_shares(self) -> list[float]:
        """Share of the tokens that went through each layer; empty before the first pass."""
        return [count / self.dense_tokens for count in self.tokens] if self.dense_tokens else []

    @property
    def kept_share(self) -> float | None:
        """The same over all layers; None before the first pass."""
        shares = self.kept_shares
        return sum(shares) / len(shares) if shares else None

    @property
    def agreement(self) -> tuple[float, float] | None:
        """Mean and least cosine of audited pooled outputs with full ones; None: none audited."""
        return (self.cosine_sum / self.audited, self.cosine_min) if self.audited else None

    def count(self, tokens: list[int], seconds: float, merge_seconds: float) -> None:
        """Count one pass, and the real tokens that went through each of its layers."""
        self.calls += 1
        self.seconds += seconds
        self.merge_seconds += merge_seconds
        self.dense_tokens += tokens[0]
        known = self.tokens or [0] * len(tokens)
        self.tokens = [old + new for old, new in zip(known, tokens, strict=True)]

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
