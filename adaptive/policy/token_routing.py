"""TokenRouting: how much of each FFN the tokens of a model go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adaptive.policy._compose import begin
from adaptive.policy._fields import (
    check_count,
    check_layers_exist,
    is_share,
    refused,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.plan import Plan
from adaptive.policy.router_weights import RouterWeights
from adaptive.policy.width_router import WidthRouter

STEP = 8
"""Neurons are taken in multiples of this, which the kernels need."""

_PAIR = 2
"""Widths that one logit can choose from."""

Router = WidthRouter | RouterWeights


@dataclass(frozen=True, kw_only=True)
class TokenRouting(Policy):
    """FFNs compute with their first neurons only: as many as chosen for the layer, or the token.

    What a Matryoshka FFN is trained for: MatFormer's prefix slices, the same share in all layers
    or another in each, its Mix'n'Match (Kudugunta et al. 2023, arXiv:2310.07707). With a
    ``router`` each token chooses among several shares, as in Duo-LLM (big, small or none; Alizadeh
    et al. 2024, arXiv:2410.10846) and Adaptive Computation Modules (the first k of N learners, the
    last one included; Wojcik et al. 2023, arXiv:2312.10193). A model that was not trained so loses
    quality quickly. Weights are read as views: nothing is copied, and the neurons left out cost no
    time.

    Attributes:
        widths: Share of the neurons that compute, above 0 and up to 1: one number for all, or one
            for each of the ``layers``. 1: the FFN as it is, bit for bit. With a ``router`` what it
            chooses from: two shares or more, ascending, of which the first may be 0, no FFN at all.
        layers: The layers, ascending, counted from 0; None: all, or those of the router.
        router: Chooses a width for each token, from the states that the FFN reads. `RouterWeights`
            choose from two: the wider from a logit of 0 on.
        audit_every: Every n-th call of an FFN also runs in full, on up to 64 of its tokens, and the
            error is measured; None: never.
    """

    widths: float | tuple[float, ...]
    layers: tuple[int, ...] | None = None
    router: Router | None = None
    audit_every: int | None = 64

    def __post_init__(self) -> None:
        set_layers(self, "layers", optional=True)
        check_count(self, "audit_every", 1, optional=True)
        if isinstance(self.widths, list):
            object.__setattr__(self, "widths", tuple(self.widths))
        if isinstance(self.router, dict):
            object.__setattr__(self, "router", _router_from(self.router))
        if self.router is not None:
            self._check_choices(self.router)
            return
        shares = self.widths if isinstance(self.widths, tuple) else (self.widths,)
        if not shares or not all(is_share(share) for share in shares):
            raise refused(self, "widths", "be shares above 0 and up to 1", self.widths)
        several = isinstance(self.widths, tuple)
        if several and self.layers is not None and len(shares) != len(self.layers):
            rule = f"be one number or one for each of the {len(self.layers)} layers"
            raise refused(self, "widths", rule, self.widths)

    def _check_choices(self, router: Router) -> None:
        if not isinstance(router, Router):
            raise refused(self, "router", "be a WidthRouter, RouterWeights or None", router)
        widths = self.widths if isinstance(self.widths, tuple) else ()
        known = all(is_share(w) or (type(w) in (int, float) and w == 0) for w in widths)
        if len(widths) < _PAIR or not known or list(widths) != sorted(set(widths)):
            rule = "be ascending shares from 0 to 1, two or more, for a router to choose from"
            raise refused(self, "widths", rule, self.widths)
        choices = router.choices if isinstance(router, WidthRouter) else _PAIR
        if len(self.choices) != choices:
            raise refused(self, "widths", f"be the {choices} that the router chooses from", widths)
        if self.layers is None:
            object.__setattr__(self, "layers", router.layers)
        elif self.layers != router.layers:
            rule = f"be those of the router, {list(router.layers)}, or None"
            raise refused(self, "layers", rule, self.layers)

    @property
    def choices(self) -> tuple[float, ...]:
        """Widths that tokens choose from; empty without a router."""
        return self.widths if self.router is not None and isinstance(self.widths, tuple) else ()

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A layer is not one of the model, or there is no width for each.
        """
        table = begin(self, table)
        total = len(table.rows)
        check_layers_exist(self, "layers", self.layers or (), total)
        self.shares(total)
        return table

    def shares(self, total: int) -> dict[int, float]:
        """Share of the neurons by layer, of a model of ``total`` layers; full ones left out.

        With a router it is the largest that a token can have, and full ones stay.

        Raises:
            ValueError: There is no width for each.
        """
        layers = tuple(range(total)) if self.layers is None else self.layers
        if self.router is not None:
            return dict.fromkeys(layers, self.choices[-1])
        several = self.widths if isinstance(self.widths, tuple) else (self.widths,) * len(layers)
        if len(several) != len(layers):
            rule = f"be one number or one for each of the model's {total} layers"
            raise refused(self, "widths", rule, self.widths)
        return {n: share for n, share in zip(layers, several, strict=True) if share < 1}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the class under "kind" and the weights of the routers."""
        router = None if self.router is None else self.router.to_dict()
        return {**super().to_dict(), "router": router}


def neurons_of(share: float, total: int) -> int:
    """The nearest multiple of 8 to this share of ``total`` neurons; 32 at least, if there are.

    Of a share of 0: none.
    """
    return min(total, max(4 * STEP, STEP * round(share * total / STEP))) if share else 0


def _router_from(values: dict[str, Any]) -> Router:
    """The router that `to_dict` described: of several rows per layer, or of one."""
    weight = values.get("weight")
    rows = isinstance(weight, list | tuple) and weight and isinstance(weight[0], list | tuple)
    nested = rows and weight[0] and isinstance(weight[0][0], list | tuple)  # type: ignore[index]
    kind = WidthRouter if nested else RouterWeights
    return kind.from_dict(values)
