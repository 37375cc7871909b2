"""Audits of an encoder that does less than its work: pooled outputs beside those of a full pass."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from adaptive.layers.pooling import pool_weights, pooled


@dataclass(kw_only=True)
class CosineAudits:
    """Counters of audits.

    Attributes:
        audits: Passes that were audited: run in full, too.
        audited: Sequences in them, or tokens, where those are compared.
        cosine_sum: Cosines of their pooled outputs (of their outputs, where tokens are compared)
            with those of the full pass, added up.
        cosine_min: The least of them.
        audit_seconds: Time in the full passes, on CPU.
    """

    audits: int = 0
    audited: int = 0
    cosine_sum: float = 0.0
    cosine_min: float = math.inf
    audit_seconds: float = 0.0

    @property
    def agreement(self) -> tuple[float, float] | None:
        """Mean and least cosine of audited pooled outputs with full ones; None: none audited."""
        return (self.cosine_sum / self.audited, self.cosine_min) if self.audited else None

    @torch.no_grad()
    def audit(
        self, made: Tensor, run: Callable[[], Any], mask: Tensor | None, pool: str, timed: bool
    ) -> None:
        """Run the full pass and count how far its output is from what was made.

        Args:
            made: Output of the pass that did less, ``[batch, tokens, width]``.
            run: The full pass; its first output is compared.
            mask: Which tokens are not padding, ``[batch, tokens]``; None: all.
            pool: As `pool_weights`.
            timed: Whether the time is counted.
        """
        start = perf_counter()
        full: Tensor = run()[0]
        weights = pool_weights(full, mask, pool)
        ours, theirs = (pooled(states, weights) for states in (made.detach(), full))
        known = weights.sum(1) > 0  # not for rows of padding alone
        cosines = torch.cosine_similarity(ours, theirs, dim=-1)[known].clamp(max=1).tolist()
        self.count_audit(cosines, perf_counter() - start if timed else 0.0)

    def count_audit(self, cosines: list[float], seconds: float) -> None:
        """Count one audit, unless nothing was compared in it."""
        if cosines:
            self.audits += 1
            self.audited += len(cosines)
            self.cosine_sum += sum(cosines)
            least = (self.cosine_min, *cosines)  # min() would lose a NaN
            self.cosine_min = math.nan if any(map(math.isnan, least)) else min(least)
            self.audit_seconds += seconds
