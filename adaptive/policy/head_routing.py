"""HeadRouting: attention heads as experts, of which each token runs a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from adaptive.policy._compose import begin, stock_layers
from adaptive.policy._fields import (
    Heads,
    check_count,
    check_flag,
    check_heads_exist,
    check_layers_exist,
    refused,
    set_heads,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.expert_router import ExpertRouterWeights
from adaptive.policy.plan import Plan


@dataclass(frozen=True, kw_only=True)
class HeadRouting(Policy):
    """Of the query heads of a layer some run: the same for all tokens, or for each its best.

    What is chosen is a KV head with all query heads that share it, an expert as in ModuleFormer
    (Shen et al. 2023, arXiv:2306.04640) and in SHRP's head routing. Keys and values of every token
    are computed and kept as always, since other tokens may read them. Of the heads that a token
    does not run no query is computed, no key is read, and no column of the output projection. A
    model that was not trained for it loses quality; audits say how much.

    Attributes:
        top_k: KV heads that each token runs; of equal scores the first. Needs a ``router``.
        router: Scores the KV heads, its experts, from the normed states that attention reads.
        heads: (layer, KV head) pairs that run for all tokens, in place of ``router`` and
            ``top_k``; at least one of each layer that is named. Other layers run in full.
        layers: Where heads are routed, ascending, counted from 0; None: those of ``router`` or
            ``heads``.
        weighted: Whether what a head gives is multiplied by ``top_k`` times the softmax of the
            scores of the chosen, as gates do: by 1 where scores are equal.
        audit_every: In every n-th call of a layer some of its tokens also run all heads, and the
            difference is measured; None: never.
    """

    splits_heads: ClassVar[bool] = True

    top_k: int | None = None
    router: ExpertRouterWeights | None = None
    heads: Heads | None = None
    layers: tuple[int, ...] | None = None
    weighted: bool = False
    audit_every: int | None = 64

    def __post_init__(self) -> None:
        if isinstance(self.router, dict):
            object.__setattr__(self, "router", ExpertRouterWeights.from_dict(self.router))
        check_count(self, "top_k", 1, optional=True)
        check_count(self, "audit_every", 1, optional=True)
        check_flag(self, "weighted")
        set_layers(self, "layers", optional=True)
        set_heads(self, "heads")
        if self.heads is not None:
            self._check_heads(self.heads)
        else:
            self._check_router()

    def _check_heads(self, heads: Heads) -> None:
        if self.router is not None or self.top_k is not None:
            given = "router" if self.router is not None else "top_k"
            rule = "be None where heads are the same for all tokens"
            raise refused(self, given, rule, getattr(self, given))
        if self.weighted:
            raise refused(self, "weighted", "be False without a router", self.weighted)
        if not heads:
            raise refused(self, "heads", "name a head, or be None", heads)
        self._set_layers(tuple(sorted({layer for layer, _ in heads})))

    def _check_router(self) -> None:
        router = self.router
        if not isinstance(router, ExpertRouterWeights):
            raise refused(self, "router", "be ExpertRouterWeights where heads is None", router)
        if router.order is not None:
            raise refused(self, "router", "have no order, which is one of neurons", "one")
        if self.top_k is None or self.top_k > router.experts:
            rule = f"be from 1 to the {router.experts} heads that the router scores"
            raise refused(self, "top_k", rule, self.top_k)
        self._set_layers(router.layers)

    def _set_layers(self, known: tuple[int, ...]) -> None:
        if self.layers is None:
            object.__setattr__(self, "layers", known)
        if self.layers != known:
            where = "router" if self.router is not None else "heads"
            raise refused(self, "layers", f"be those of {where}, {known}, or None", self.layers)

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A layer or head is not one of the model, or a layer is not to be changed.
        """
        table = begin(self, table)
        layers = self.layers or ()
        check_layers_exist(self, "layers", layers, len(table.rows))
        check_heads_exist(self, "heads", self.heads or (), table.shape.kv_heads)
        for layer in layers:
            if layer in stock_layers(table):
                rule = "leave out layers that Exact leaves to the model's own attention"
                raise refused(self, "layers", rule, layer)
            if self.router is not None and table.shape.kv_heads[layer] != self.router.experts:
                rule = f"score the {table.shape.kv_heads[layer]} KV heads of layer {layer}"
                raise refused(self, "router", rule, self.router.experts)
        return table

    def routed_layers(self, kv_heads: tuple[int, ...]) -> tuple[int, ...]:
        """Layers of a model with so many KV heads in which some would be left out, or weighted."""
        layers = self.layers or ()
        if self.heads is None:
            whole = self.router is not None and self.top_k == self.router.experts
            return () if whole and not self.weighted else layers
        return tuple(layer for layer in layers if len(self.heads_of(layer)) < kv_heads[layer])

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer that run for all tokens, ascending."""
        return tuple(head for at, head in self.heads or () if at == layer)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the class under "kind" and the weights of the routers."""
        router = None if self.router is None else self.router.to_dict()
        return {**super().to_dict(), "router": router}
