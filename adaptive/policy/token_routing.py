"""TokenRouting: how much of each FFN the tokens of a model go through."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive.policy._compose import begin
from adaptive.policy._fields import check_layers_exist, is_share, refused, set_layers
from adaptive.policy._policy import Policy
from adaptive.policy.plan import Plan

STEP = 8
"""Neurons are taken in multiples of this, which the kernels need."""


@dataclass(frozen=True, kw_only=True)
class TokenRouting(Policy):
    """FFNs compute with their first neurons only, layer by layer as many as chosen.

    What a Matryoshka FFN is trained for: MatFormer's prefix slices, the same share in all layers
    or another in each, its Mix'n'Match (Kudugunta et al. 2023, arXiv:2310.07707). A model that was
    not trained so loses quality quickly. Weights are read as views: nothing is copied, and the
    neurons left out cost no time.

    Attributes:
        widths: Share of the neurons that compute, above 0 and up to 1: one number for all, or one
            for each of the ``layers``. 1: the FFN as it is, bit for bit.
        layers: The layers, ascending, counted from 0; None: all.
    """

    widths: float | tuple[float, ...]
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        set_layers(self, "layers", optional=True)
        if isinstance(self.widths, list):
            object.__setattr__(self, "widths", tuple(self.widths))
        shares = self.widths if isinstance(self.widths, tuple) else (self.widths,)
        if not shares or not all(is_share(share) for share in shares):
            raise refused(self, "widths", "be shares above 0 and up to 1", self.widths)
        several = isinstance(self.widths, tuple)
        if several and self.layers is not None and len(shares) != len(self.layers):
            rule = f"be one number or one for each of the {len(self.layers)} layers"
            raise refused(self, "widths", rule, self.widths)

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

        Raises:
            ValueError: There is no width for each.
        """
        layers = tuple(range(total)) if self.layers is None else self.layers
        several = self.widths if isinstance(self.widths, tuple) else (self.widths,) * len(layers)
        if len(several) != len(layers):
            rule = f"be one number or one for each of the model's {total} layers"
            raise refused(self, "widths", rule, self.widths)
        return {n: share for n, share in zip(layers, several, strict=True) if share < 1}


def neurons_of(share: float, total: int) -> int:
    """The nearest multiple of 8 to this share of ``total`` neurons; 32 at least, if there are."""
    return min(total, max(4 * STEP, STEP * round(share * total / STEP)))
