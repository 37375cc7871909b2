"""EncoderExit: sequences of an encoder leave after the layers that they need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from adaptive.policy._compose import begin
from adaptive.policy._fields import check_count, refused
from adaptive.policy._policy import Policy
from adaptive.policy.encoder_gate import POOLS, EncoderGate
from adaptive.policy.plan import Plan

CRITERIA = ("cosine",)
GATE_THRESHOLD = 0.5
"""Where no threshold is given for a gate: its median depth."""


@dataclass(frozen=True, kw_only=True)
class EncoderExit(Policy):
    """Each sequence of a batch leaves an encoder's layers early; the others go on without it.

    The state of a sequence that left goes as it is to what follows the layers: the model's own
    last norm, pooler and head. Depths count layers that run, so depth 4 is the exit after 4 layers.
    Exactly one of three rules says when:

    - ``layer``: every sequence at that depth, as ModularStarEncoder is left at ``till_layer``
      (Gurioli et al. 2025, arXiv:2503.03008).
    - ``threshold`` without a gate: at the first of the ``layers`` at which the pooled state before
      and after the last layer that ran has at least that cosine, the saturation of states that
      CALM measures per token (Schuster et al. 2022, arXiv:2207.07061).
    - ``gate``: at the depth that a linear layer predicts from the pooled embeddings, before the
      first layer, after ECO-M2F (Yao et al. 2024, arXiv:2404.15244). See
      `adaptive.train.encoder_gate`.

    Attributes:
        layer: Depth of all sequences; at least 1.
        layers: Depths at which a sequence may leave by its cosine, ascending; None: every one.
        criterion: "cosine".
        threshold: Least cosine at which a sequence leaves; above 1 none does. With a gate: the
            least probability with which its depth is enough, 0.5 if None.
        gate: What predicts the depth.
        pool: What stands for a sequence: "mean" of its tokens without padding, or the "first".
        audit_every: Every n-th call also runs in full, and the cosine of the pooled outputs is
            measured; None: never.
    """

    layer: int | None = None
    layers: tuple[int, ...] | None = None
    criterion: str = "cosine"
    threshold: float | None = None
    gate: EncoderGate | None = None
    pool: str = "mean"
    audit_every: int | None = 64

    leaves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.gate, dict):
            object.__setattr__(self, "gate", EncoderGate.from_dict(self.gate))
        check_count(self, "layer", 1, optional=True)
        check_count(self, "audit_every", 1, optional=True)
        if self.criterion not in CRITERIA:
            raise refused(self, "criterion", f"be one of {', '.join(CRITERIA)}", self.criterion)
        if self.pool not in POOLS:
            raise refused(self, "pool", f"be one of {', '.join(POOLS)}", self.pool)
        self._check_layers()
        self._check_rule()

    def _check_layers(self) -> None:
        layers = self.layers
        if layers is None:
            return
        whole = isinstance(layers, list | tuple) and all(type(depth) is int for depth in layers)
        if not whole or not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
            raise refused(self, "layers", "be ascending depths from 1 on, or None", layers)
        object.__setattr__(self, "layers", tuple(layers))

    def _check_rule(self) -> None:
        threshold, gate = self.threshold, self.gate
        if gate is not None and not isinstance(gate, EncoderGate):
            raise refused(self, "gate", "be an EncoderGate or None", gate)
        number = type(threshold) in (int, float) and math.isfinite(threshold)  # type: ignore[arg-type]
        if threshold is not None and not number:
            raise refused(self, "threshold", "be a number or None", threshold)
        if self.layer is not None:
            for name in ("layers", "threshold", "gate"):
                if getattr(self, name) is not None:
                    rule = "be None together with layer, at which all leave"
                    raise refused(self, name, rule, getattr(self, name))
        elif gate is not None:
            if self.layers is not None:
                raise refused(self, "layers", "be None: the gate has its own", self.layers)
            if gate.pool != self.pool:
                raise refused(self, "pool", f"be that of the gate, {gate.pool!r}", self.pool)
        elif threshold is None:
            raise refused(self, "threshold", "be given, or layer, or gate", None)

    def exits(self, layers: int) -> tuple[int, ...]:
        """Depths at which sequences of a model of so many ``layers`` may leave, ascending."""
        if self.layer is not None:
            return (self.layer,) if self.layer < layers else ()
        if self.gate is not None:
            return self.gate.layers
        return tuple(range(1, layers)) if self.layers is None else self.layers

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A depth is not one of the model.
        """
        table = begin(self, table)
        layers = len(table.rows)
        if self.layer is not None and self.layer > layers:
            raise refused(self, "layer", f"be at most the model's {layers} layers", self.layer)
        for depth in self.layers or ():
            if depth >= layers:
                rule = f"be below the model's {layers} layers, after which all leave"
                raise refused(self, "layers", rule, depth)
        if self.gate is not None and self.gate.layers[-1] >= layers:
            rule = f"have exits below the model's {layers} layers"
            raise refused(self, "gate", rule, self.gate)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the class under "kind" and the gate's weights."""
        gate = None if self.gate is None else self.gate.to_dict()
        return {**super().to_dict(), "gate": gate}
