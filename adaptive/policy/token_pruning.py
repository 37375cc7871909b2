"""TokenPruning: tokens that the class token of an encoder hardly looks at leave its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaptive.policy._compose import begin
from adaptive.policy._fields import check_count, is_share, refused, set_layers
from adaptive.policy._policy import Policy
from adaptive.policy.encoder_gate import POOLS
from adaptive.policy.plan import Plan

RULES = ("attention", "information")
FUSED = ("mean", "sum", "none")
RESTORES = ("fused", "cached")


@dataclass(frozen=True, kw_only=True)
class TokenPruning(Policy):
    """After some layers, only the tokens of a sequence that matter to its class token go on.

    EViT (Liang et al. 2022, arXiv:2202.07800): what matters is the attention that the class token
    pays in that layer, averaged over heads. Of a sequence's other tokens the best go on, the share
    ``keep`` of them, rounded up; the rest become one token behind them. Three things differ from
    the paper: tokens go behind a layer's MLP, not before it, so that layers are run as they are; a
    lone token that would become one by itself stays; and the one token is a mean, unless ``fused``
    says "sum", because models that were not trained for it cope with a mean.

    What follows the layers sees all tokens: a head that pools over them, too.

    Attributes:
        keep: Share of its tokens, the class token aside, that each sequence keeps after each of
            the ``layers``, rounded up; above 0 and at most 1.
        layers: Layers after which tokens go, ascending; None: those at a quarter, a half and three
            quarters of the model, 3, 6 and 9 of 12 as in the paper.
        rule: What is best: "attention"; or "information", the degree of Turbo (Ju et al. 2024,
            arXiv:2407.11717): ``balance`` times attention, in units of its mean, minus redundancy,
            which is the highest cosine of a token's key, averaged over heads, with that of an
            earlier one: of tokens that are alike the first counts as new.
        balance: Weight of attention in "information".
        fused: What the rest becomes: the "mean" of the tokens, weighted by their attention; EViT's
            "sum", the same not divided by the weights; or nothing, "none".
        restore: What stands for tokens that went, in what follows the layers: "fused", the token
            that they became part of; or "cached", the states in which they went, after the
            cross-layer cache of CLCA (Rios et al. 2024, arXiv:2501.00243). Heads that read the
            class token alone see neither.
        pool: What audits compare: the "first" of a sequence's tokens, or their "mean" without
            padding.
        audit_every: Every n-th call also runs in full, and the cosine of the pooled outputs is
            measured; None: never.
    """

    keep: float
    layers: tuple[int, ...] | None = None
    rule: str = "attention"
    balance: float = 1.0
    fused: str = "mean"
    restore: str = "fused"
    pool: str = "first"
    audit_every: int | None = 64

    def __post_init__(self) -> None:
        check_count(self, "audit_every", 1, optional=True)
        if not is_share(self.keep):
            raise refused(self, "keep", "be a number above 0 and at most 1", self.keep)
        choices = {"rule": RULES, "fused": FUSED, "restore": RESTORES, "pool": POOLS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise refused(self, name, f"be one of {', '.join(known)}", getattr(self, name))
        balance = self.balance
        if type(balance) not in (int, float) or not 0 <= balance < math.inf:
            raise refused(self, "balance", "be a finite number from 0 on", balance)
        if self.fused == "none" and self.restore == "fused":
            raise refused(self, "restore", "be cached where nothing is fused", self.restore)
        set_layers(self, "layers", optional=True)
        if self.layers == ():
            raise refused(self, "layers", "hold a layer, or be None", self.layers)

    def reducing_layers(self, layers: int) -> tuple[int, ...]:
        """Numbers of the layers after which tokens of a model of so many ``layers`` go."""
        if self.layers is not None:
            return self.layers
        quarters = sorted({layers * part // 4 for part in (1, 2, 3)})
        return tuple(layer for layer in quarters if layer < layers - 1)

    def removed(self, tokens: int, protect: int) -> int:
        """How many tokens of a sequence of so many real ``tokens`` go, fused or not.

        Args:
            tokens: Before it.
            protect: Tokens at the start that stay.
        """
        free = max(tokens - protect, 0)
        # 0.55 * 20 is 11.000000000000002, of which 12 would be kept
        gone = free - math.ceil(round(self.keep * free, 9))
        return 0 if gone == 1 and self.fused != "none" else gone

    def left(self, tokens: int, protect: int) -> int:
        """How many tokens such a sequence has afterwards, the fused one included."""
        gone = self.removed(tokens, protect)
        return tokens - gone + int(gone > 0 and self.fused != "none")

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A layer is not one of the model, or its last.
        """
        table = begin(self, table)
        last = len(table.rows) - 1
        for layer in self.layers or ():
            if layer >= last:
                rule = f"be below {last}, the last layer, after which there is nothing to save"
                raise refused(self, "layers", rule, layer)
        return table
