"""MixtureOfDepths: a router decides per sequence or token which layers run, and no others do."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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

UNITS = ("block", "attention", "mlp")
DECODES = {"sequence": ("frozen",), "token": ("threshold", "predictor")}
"""How each kind of decision can go on after the prompt; the first is the default."""

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(Policy):
    """Some layers, or their attention or MLP, run for the sequences or tokens that need them.

    A linear router on the unit's normalised input scores each: the sigmoid of its logit. What does
    not run is not computed: the rows or tokens that run are gathered, the model's own module runs
    on them, and its output is put back. Named presets give the published methods: `mindskip`,
    `mod` and `gamma_mod`; `drop` always leaves the same layers out.

    ``decide="sequence"`` scores the mean of a sequence's tokens without padding, once, in the first
    call with a cache; later calls with that cache follow it (``decode="frozen"``). A sequence whose
    attention is skipped has no keys and values in that layer.

    ``decide="token"`` scores every token: by ``threshold``, which depends on the token alone, or in
    prompts by ``capacity``, the best share of each sequence's tokens, which looks ahead. Tokens
    that come after the prompt run by threshold, or as a predictor says that the capacity would take
    them. Tokens that run attend to those that ran.

    Attributes:
        layers: Layers that may be skipped, ascending; None: those of the router.
        router: Scores sequences or tokens. None: the ``layers`` never run.
        capacity: Share of the tokens of a prompt that run, at least one; above 0 and at most 1.
        threshold: Least score that runs; 0.5 if None and there is no capacity.
        decode_threshold: The same after the prompt; None: ``threshold``, or 0.5.
        unit: What is skipped: the whole "block", its "attention" or its "mlp".
        decide: "sequence" or "token".
        weighted: Whether the unit's output (without its residual) is multiplied by the logit:
            ``x + logit * f(x)``; "mlp": that of a block's MLP alone is, by the score.
        positions: Of tokens that run: "original", or "compact": counted among those that run.
        kv: Keys and values of skipped tokens: "dropped", or "kept": then only queries are routed.
        decode: "frozen" for sequences; "threshold" for tokens, or with a capacity "predictor":
            those whose score by the router's predictor reaches ``decode_threshold``. None: the
            first.
        audit_every: Of every n tokens at most one is run again by the whole model, and the cosine
            of the last hidden states measured: the first call in any case, others when it is their
            turn. None: never.
    """

    routes: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    router: RouterWeights | None = None
    capacity: float | None = None
    threshold: float | None = None
    decode_threshold: float | None = None
    unit: str = "block"
    decide: str = "token"
    weighted: bool | str = False
    positions: str = "original"
    kv: str = "dropped"
    decode: str | None = None
    audit_every: int | None = 64

    def __post_init__(self) -> None:
        if isinstance(self.router, dict):
            object.__setattr__(self, "router", RouterWeights.from_dict(self.router))
        check_count(self, "audit_every", 1, optional=True)
        self._check_choices()
        self._check_rule()
        self._check_layers()
        if self.decide == "sequence":
            self._check_sequence()
        reads_keys = self.unit != "mlp" and self.decide == "token"
        for name, plain in (("positions", "original"), ("kv", "dropped")):
            if getattr(self, name) != plain and not reads_keys:
                rule = f"be {plain!r}: keys of single tokens are dropped for attention and blocks"
                raise refused(self, name, rule, getattr(self, name))
        if self.positions == "compact" and self.kv == "kept":
            raise refused(self, "positions", "be 'original' where all keys are kept", "compact")
        if self.weighted == "mlp" and self.unit != "block":
            raise refused(self, "weighted", "be True or False unless unit='block'", "mlp")

    def _check_choices(self) -> None:
        choices: tuple[tuple[str, tuple[object, ...]], ...] = (
            ("unit", UNITS),
            ("decide", tuple(DECODES)),
            ("positions", ("original", "compact")),
            ("kv", ("dropped", "kept")),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                rule = f"be one of {', '.join(map(str, known))}"
                raise refused(self, name, rule, getattr(self, name))
        if not isinstance(self.weighted, bool) and self.weighted != "mlp":
            raise refused(self, "weighted", "be True, False or 'mlp'", self.weighted)
        ways = DECODES[self.decide]
        if self.decode is None:
            object.__setattr__(self, "decode", ways[0])
        elif self.decode not in ways:
            rule = f"be {' or '.join(map(repr, ways))} with decide={self.decide!r}"
            raise refused(self, "decode", rule, self.decode)
        if self.decode == "predictor" and self.capacity is None:
            rule = "be 'threshold' without a capacity, which a predictor is for"
            raise refused(self, "decode", rule, self.decode)

    def _check_rule(self) -> None:
        for name in ("threshold", "decode_threshold"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise refused(self, name, "be a number or None", value)
        if self.capacity is not None:
            if self.threshold is not None:
                raise refused(self, "threshold", "be None together with capacity", self.threshold)
            if not is_share(self.capacity):
                raise refused(self, "capacity", "be above 0 and at most 1", self.capacity)

    def _check_layers(self) -> None:
        set_layers(self, "layers", optional=True)
        if self.router is None:
            self._check_dropped()
        else:
            self._check_router(self.router)

    def _check_dropped(self) -> None:
        if not self.layers:
            raise refused(self, "layers", "name a layer, or there must be a router", self.layers)
        for name in ("capacity", "threshold", "decode_threshold"):
            if getattr(self, name) is not None:
                raise refused(self, name, "be None without a router", getattr(self, name))
        if self.decide != "sequence":
            raise refused(self, "decide", "be 'sequence' without a router", self.decide)

    def _check_router(self, router: RouterWeights) -> None:
        if not isinstance(router, RouterWeights):
            raise refused(self, "router", "be RouterWeights or None", router)
        if self.decode == "predictor" and router.predictor is None:
            raise refused(self, "router", "have a predictor with decode='predictor'", router)
        if self.layers is None:
            object.__setattr__(self, "layers", router.layers)
        for layer in self.layers or ():
            if layer not in router.layers:
                raise refused(self, "router", f"have weights for layer {layer}", router)
        for layer in router.layers:
            if layer not in (self.layers or ()):
                raise refused(self, "router", f"have no weights for layer {layer}", router)

    def _check_sequence(self) -> None:
        if self.capacity is not None:
            rule = "be None for sequences: a share of a batch would make its rows depend on others"
            raise refused(self, "capacity", rule, self.capacity)
        if self.decode_threshold is not None:
            rule = "be None for sequences, which are decided once"
            raise refused(self, "decode_threshold", rule, self.decode_threshold)
        if self.weighted:
            raise refused(self, "weighted", "be False for sequences", self.weighted)

    @property
    def routed(self) -> tuple[int, ...]:
        """Layers that may be skipped."""
        return self.layers or ()

    @property
    def least(self) -> float:
        """Least score that runs in a prompt, where no capacity says."""
        return THRESHOLD if self.threshold is None else self.threshold

    @property
    def least_later(self) -> float:
        """Least score that runs after the prompt."""
        return self.least if self.decode_threshold is None else self.decode_threshold

    @staticmethod
    def mindskip(router: RouterWeights, *, unit: str = "attention") -> MixtureOfDepths:
        """MindSkip of Router-Tuning (He et al. 2024, arXiv:2410.13184): hard, per sequence."""
        return MixtureOfDepths(router=router, unit=unit, decide="sequence")

    @staticmethod
    def mod(router: RouterWeights, *, capacity: float = 0.125) -> MixtureOfDepths:
        """Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258): weighted blocks per token.

        Decoding goes by the router's predictor if it has one.
        """
        decode = None if router.predictor is None else "predictor"
        return MixtureOfDepths(router=router, capacity=capacity, weighted=True, decode=decode)

    @staticmethod
    def gamma_mod(router: RouterWeights, *, threshold: float = 0.005) -> MixtureOfDepths:
        """Gamma-MoD at inference (Luo et al. 2024, arXiv:2410.13859).

        Its one router of two outputs is shared by all layers: `RouterWeights.from_tensors`.
        """
        return MixtureOfDepths(
            router=router,
            threshold=threshold,
            decode_threshold=THRESHOLD,
            weighted="mlp",
            positions="compact",
        )

    @staticmethod
    def drop(layers: Sequence[int], *, unit: str = "block") -> MixtureOfDepths:
        """The same layers left out for all: what a router must be better than."""
        return MixtureOfDepths(layers=tuple(layers), unit=unit, decide="sequence")

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A layer does not exist or must not be skipped, or an earlier policy has no
                meaning together with this one.
        """
        table = begin(self, table)
        check_layers_exist(self, "layers", self.routed, len(table.rows))
        first = always_run(self.unit, table.shape.windows)
        for layer in self.routed:
            if layer in first:
                rule = (
                    "leave out the first layer, and the first with each window: masks and "
                    "positions of all tokens are made for it"
                )
                raise refused(self, "layers", rule, layer)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the class under "kind" and the weights of the routers."""
        router = None if self.router is None else self.router.to_dict()
        return {**super().to_dict(), "router": router}


def always_run(unit: str, windows: Sequence[int | None]) -> set[int]:
    """Layers that cannot be skipped: masks and positions of all tokens are made for them.

    Args:
        unit: What is skipped.
        windows: Window of each layer; None: it sees all tokens.
    """
    return set() if unit == "mlp" else {windows.index(window) for window in set(windows)} | {0}


def _is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold; inf is, NaN is not."""
    if type(value) is int:
        return abs(value) <= sys.float_info.max
    return type(value) is float and not math.isnan(value)
