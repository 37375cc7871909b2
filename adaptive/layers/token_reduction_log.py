"""What merging or pruning did to the tokens of an encoder, as counters."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from adaptive.layers.cosine_audit import CosineAudits


@dataclass(kw_only=True)
class TokenReductionLog(CosineAudits):
    """Counters of one patched encoder.

    Attributes:
        verb: What tokens do: "merge" or "prune".
        calls: Passes in which they could.
        tokens: Real tokens that went through each layer, added up.
        dense_tokens: Those that would have gone through each layer without it.
        seconds: Time in these passes, on CPU, audits left out.
        reduce_seconds: Of that, time in which tokens were chosen, and merged or dropped.
        nan_calls: Passes on a GPU in which what chose was NaN; in a report a number, and before
            that on the device, which nobody waits for. On a CPU such a pass raises.
    """

    verb: str
    calls: int = 0
    tokens: list[int] = field(default_factory=list)
    dense_tokens: int = 0
    seconds: float = 0.0
    reduce_seconds: float = 0.0
    nan_calls: int | Tensor = 0

    @property
    def kept_shares(self) -> list[float]:
        """Share of the tokens that went through each layer; empty before the first pass."""
        return [count / self.dense_tokens for count in self.tokens] if self.dense_tokens else []

    @property
    def kept_share(self) -> float | None:
        """The same over all layers; None before the first pass."""
        shares = self.kept_shares
        return sum(shares) / len(shares) if shares else None

    def count(
        self,
        tokens: list[int],
        seconds: float,
        reduce_seconds: float,
        nan: Tensor | None = None,
    ) -> None:
        """Count one pass, the real tokens that went through each layer, and if it met ``nan``."""
        self.calls += 1
        if nan is not None:
            self.nan_calls = self.nan_calls + nan.int()
        self.seconds += seconds
        self.reduce_seconds += reduce_seconds
        self.dense_tokens += tokens[0]
        known = self.tokens or [0] * len(tokens)
        self.tokens = [old + new for old, new in zip(known, tokens, strict=True)]

    @property
    def _name(self) -> str:
        return f"token {self.verb.removesuffix('e')}ing"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        mean, least = self.agreement or (None, None)
        values = asdict(self)
        del values["verb"], values["cosine_sum"], values["cosine_min"]
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
            return f"{self._name}: no pass yet"
        shares = ", ".join(f"{share:.0%}" for share in self.kept_shares)
        line = f"{self._name}: {self.kept_share:.1%} of tokens kept, by layer: {shares}"
        if self.seconds:
            line += (
                f"\n{self.reduce_seconds / self.seconds:.1%} of {self.seconds:.3g} s to {self.verb}"
            )
        if self.nan_calls:
            line += f"\nNaN chose the tokens of {self.nan_calls} of {self.calls} passes"
        if self.agreement is None:
            return line + "\nnone audited"
        mean, least = self.agreement
        return line + f"\n{self.audited} audited: cosine {mean:.4f}, at least {least:.4f}"


def copy_of(log: TokenReductionLog | None, verb: str) -> TokenReductionLog | None:
    """Return a copy of ``log`` if its tokens did what ``verb`` says. Waits for the device."""
    if log is None or log.verb != verb:
        return None
    found = copy.deepcopy(log)
    found.nan_calls = int(found.nan_calls)
    return found
