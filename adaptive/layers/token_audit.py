"""How far the output of a module that did less is from its output in full, over sampled tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 64
"""Of one call: an audit of a long prompt then costs little beside the call."""


@dataclass(kw_only=True)
class TokenAudit:
    """Counters of audits.

    Attributes:
        audits: Calls that were audited: run in full, too, on some of their tokens.
        tokens: Those.
        error_squares: Squares of the differences, added up.
        dense_squares: Squares of the outputs in full, added up.
        worst: The largest error of one token, relative to its output in full.
    """

    audits: int = 0
    tokens: int = 0
    error_squares: float = 0.0
    dense_squares: float = 0.0
    worst: float = 0.0

    @property
    def error(self) -> float | None:
        """Error of all audited outputs, relative to them in full; None: none was audited."""
        if not self.audits:
            return None
        if not self.dense_squares:  # nothing is relative to zero but itself
            return math.inf if self.error_squares else 0.0
        return math.sqrt(self.error_squares / self.dense_squares)

    @torch.no_grad()
    def compare(self, made: Tensor, dense: Tensor) -> None:
        """Count how far ``made`` is from ``dense``; both ``[tokens, width]``."""
        dense = dense.detach().float()
        errors = (made.detach().float() - dense).norm(dim=1).double()
        sizes = dense.norm(dim=1).double()
        relative = torch.where(errors == 0, errors, errors / sizes)
        self.audits += 1
        self.tokens += len(dense)
        self.error_squares += float(errors.square().sum())
        self.dense_squares += float(sizes.square().sum())
        largest = float(relative.max())
        if not largest <= self.worst:  # NaN is worst of all, and stays
            self.worst = largest if not math.isnan(self.worst) else self.worst

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        worst = self.worst if self.audits else None
        return {"audits": self.audits, "tokens": self.tokens, "error": self.error, "worst": worst}


def sampled(tokens: Tensor) -> Tensor:
    """Of these places ``[tokens]`` up to 64, evenly spread, the last among them."""
    if len(tokens) <= MAX_TOKENS:
        return tokens
    at = torch.linspace(0, len(tokens) - 1, MAX_TOKENS, device=tokens.device, dtype=torch.float64)
    return tokens[at.round().long()]
