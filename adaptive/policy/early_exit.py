"""Early exit: a token leaves the model at the first depth at which it is sure enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._compose import begin
from adaptive.policy._fields import check_count, refused, set_layers
from adaptive.policy._policy import Policy
from adaptive.policy.plan import Plan

AGREEMENT = "agreement"
_LEAST = {"confidence": 0.0, "margin": 0.0, "entropy": 0.0, "cosine": -1.0}
CRITERIA = (*_LEAST, AGREEMENT)
COPY, DEFERRED, PROJECT = "copy", "deferred", "project"
FILLS = (COPY, DEFERRED, PROJECT)
TOGETHER, ALONE = "together", "alone"
ROWS = (TOGETHER, ALONE)


@dataclass(frozen=True, kw_only=True)
class EarlyExit(Policy):
    """`generate` makes a token with the first layers alone where they are sure of it.

    After CALM (Schuster et al. 2022, arXiv:2207.07061) and FREE (Bae et al. 2023,
    arXiv:2310.05424). After each number of layers in ``layers`` the hidden state goes through the
    model's own norm and head; if the criterion holds, that is the token, and the later layers do
    not run for it now. Prompts run in full. The results are not those of the whole model. Best for
    models that were trained to be left early, see `adaptive.train.early_exit`.

    Attributes:
        layers: Layers run before each exit, ascending, from 1 to the model's number of layers - 1.
        criterion: "confidence", the largest probability, and "margin", its distance from the
            second largest, must be at least the threshold; "entropy", in nats, at most; "cosine",
            of the hidden states before and after the last layer run, at least. "agreement": the
            last ``agree`` exits would choose the same token.
        threshold: Above 1, nothing leaves early by confidence, margin or cosine. None for
            agreement, and only there.
        kv: What later layers get of a token that left. "deferred": its hidden state is kept, and
            goes through them together with that of the next token that needs them, at most 16 in
            one pass; their cache is that of the whole model on these tokens. "copy": the keys and
            values of the last layer that ran. "project": keys and values that each later layer
            makes of the exit's hidden state.
        audit: Every how many exits the whole model is asked, too, and the report told whether it
            would choose the same token; None: never.
        agree: Exits that must agree, from 2.
        rows: How a batch leaves. "together": only where each of its unfinished rows meets the
            criterion. "alone": each row where it does; the later layers run for the others alone,
            and read their rows of the cache in place. A row then makes what it would make by
            itself. Saves arithmetic, not the reading of weights, and best with "copy".
    """

    exact: ClassVar[bool] = False
    generates: ClassVar[bool] = True

    layers: tuple[int, ...]
    criterion: str = "confidence"
    threshold: float | None = None
    kv: str = DEFERRED
    audit: int | None = 64
    agree: int = 2
    rows: str = TOGETHER

    def __post_init__(self) -> None:
        set_layers(self, "layers")
        if not self.layers or self.layers[0] < 1:
            raise refused(self, "layers", "name exits after 1 layer or more", self.layers)
        if self.criterion not in CRITERIA:
            raise refused(self, "criterion", f"be one of {', '.join(CRITERIA)}", self.criterion)
        if self.kv not in FILLS:
            raise refused(self, "kv", f"be one of {', '.join(FILLS)}", self.kv)
        if self.rows not in ROWS:
            raise refused(self, "rows", f"be one of {', '.join(ROWS)}", self.rows)
        check_count(self, "audit", 1, optional=True)
        check_count(self, "agree", 2)
        self._check_threshold()
        if self.criterion == AGREEMENT and self.agree > len(self.layers):
            rule = f"be at most the {len(self.layers)} exits of layers, or none is ever taken"
            raise refused(self, "agree", rule, self.agree)

    def _check_threshold(self) -> None:
        value = self.threshold
        if self.criterion == AGREEMENT:
            if value is not None:
                raise refused(self, "threshold", "be None for agreement", value)
            return
        least = _LEAST[self.criterion]
        number = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
        if value is None or not number or value < least:
            rule = f"be a number from {least:g} on for {self.criterion}"
            raise refused(self, "threshold", rule, value)

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: An exit is not in the model, an earlier policy skips keys while decoding, or
                there is no layer to copy keys from.
        """
        table = begin(self, table)
        layers = len(table.rows)
        if self.layers[-1] >= layers:
            rule = f"be below the model's {layers} layers, which are no early exit"
            raise refused(self, "layers", rule, self.layers[-1])
        if self.kv == COPY:
            for layer in range(self.layers[0], layers):
                self.source(table, layer, self.layers[0])
        return table

    def source(self, table: Plan, layer: int, exit_layer: int) -> int:
        """The layer whose keys ``layer`` gets of a token that ran ``exit_layer`` layers.

        It is the last that ran and has the window of ``layer``: models rotate the keys of layers
        with a window by other angles.

        Raises:
            ValueError: None that ran has its window and the shape of its keys.
        """
        shape = table.shape
        for ran in reversed(range(exit_layer)):
            alike = (shape.windows, shape.kv_heads, shape.head_dim)
            if all(each[ran] == each[layer] for each in alike):
                return ran
        rule = (
            f"be 'deferred' or 'project' here: no layer before exit {exit_layer} has the window "
            f"and the KV heads of layer {layer}"
        )
        raise refused(self, "kv", rule, self.kv)
