"""FeedForwardExperts: dense FFNs cut into experts, of which each token goes through a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adaptive.policy._compose import begin
from adaptive.policy._fields import (
    check_count,
    check_flag,
    check_layers_exist,
    refused,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.expert_router import ExpertRouterWeights
from adaptive.policy.plan import Plan

SPLITS = ("clusters", "cut")
AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class FeedForwardExperts(Policy):
    """The neurons of each FFN become experts of equal size; a token runs those with the best score.

    The dense weights are used as they are: the sum over all experts is the FFN. EMoE (Qiu et al.
    2023, arXiv:2310.10908) finds experts by balanced clustering of the rows of the gate projection
    and scores them by the mean of their gates, before its activation function; FactorLLM (2024)
    cuts the neurons in the order they have and trains a linear router. What is not chosen is not
    computed. A model that was not trained for it loses quality; audits say how much.

    Attributes:
        experts: Of each FFN, at least 2; they must divide its neurons.
        top_k: Experts that each token runs; of equal scores the first.
        layers: Whose FFNs are split, ascending, counted from 0; None: all, or those of the router.
        split: "clusters": neurons whose gates are alike, from a copy of the weights in that order;
            "cut": neighbours, read where they are.
        router: "average": the mean of an expert's gates. Or trained weights.
        scaled: Whether what an FFN returns is multiplied by ``experts / top_k``, as in FactorLLM.
        audit_every: In every n-th call of an FFN some of its rows also run in full, and the
            difference is measured; None: never.
    """

    experts: int = 8
    top_k: int = 2
    layers: tuple[int, ...] | None = None
    split: str = "clusters"
    router: str | ExpertRouterWeights = AVERAGE
    scaled: bool = False
    audit_every: int | None = 64

    def __post_init__(self) -> None:
        if isinstance(self.router, dict):
            object.__setattr__(self, "router", ExpertRouterWeights.from_dict(self.router))
        check_count(self, "experts", 2)
        check_count(self, "top_k", 1)
        check_count(self, "audit_every", 1, optional=True)
        check_flag(self, "scaled")
        set_layers(self, "layers", optional=True)
        if self.top_k > self.experts:
            raise refused(self, "top_k", f"be at most the {self.experts} experts", self.top_k)
        if self.split not in SPLITS:
            raise refused(self, "split", f"be one of {', '.join(SPLITS)}", self.split)
        if self.layers == ():
            raise refused(self, "layers", "name a layer, or be None", self.layers)
        if isinstance(self.router, ExpertRouterWeights):
            self._check_router(self.router)
        elif self.router != AVERAGE:
            rule = f"be {AVERAGE!r} or ExpertRouterWeights"
            raise refused(self, "router", rule, self.router)

    def _check_router(self, router: ExpertRouterWeights) -> None:
        if router.experts != self.experts:
            raise refused(self, "router", f"score {self.experts} experts", router.experts)
        if self.layers is None:
            object.__setattr__(self, "layers", router.layers)
        if self.layers != router.layers:
            raise refused(self, "router", f"be for layers {self.layers}", router.layers)
        if router.order is not None and self.split == "cut":
            raise refused(self, "split", "be 'clusters' where the router orders neurons", "cut")

    @property
    def whole(self) -> bool:
        """Whether nothing would be left out nor moved: FFNs stay as they are."""
        return self.top_k == self.experts and self.split == "cut"

    @staticmethod
    def emoe(*, experts: int = 16, top_k: int = 2) -> FeedForwardExperts:
        """EMoE (Qiu et al. 2023, arXiv:2310.10908): clusters, scored by their mean gate."""
        return FeedForwardExperts(experts=experts, top_k=top_k)

    @staticmethod
    def factor_llm(router: ExpertRouterWeights, *, top_k: int = 2) -> FeedForwardExperts:
        """FactorLLM (2024): neighbours, a trained router, outputs scaled."""
        return FeedForwardExperts(
            experts=router.experts, top_k=top_k, split="cut", router=router, scaled=True
        )

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A layer is not one of the model.
        """
        table = begin(self, table)
        check_layers_exist(self, "layers", self.layers or (), len(table.rows))
        return table

    def split_layers(self, total: int) -> tuple[int, ...]:
        """Layers whose FFNs run experts, of a model of ``total`` layers."""
        if self.whole:
            return ()
        return tuple(range(total)) if self.layers is None else self.layers

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the class under "kind" and the weights of the routers."""
        router = self.router if isinstance(self.router, str) else self.router.to_dict()
        return {**super().to_dict(), "router": router}
