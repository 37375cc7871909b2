"""A plan: one mode for every KV head of every layer. Policies make it, layers read their row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive.errors import PlanMismatch
from adaptive.policy._plan_file import from_dict, read_plan, short, to_dict, write_plan
from adaptive.policy._policy import Policy
from adaptive.policy.shape import ModelShape

DENSE = "dense"
STOCK = "stock"
SELECT = "select"
REUSE = "reuse"
PAGES = "pages"
WINDOW = "window"
RAZOR = "razor"
GLOBAL_LOCAL = "global_local"
LOCAL = "local"
MODES = {
    DENSE: ("#", "reads every key, native kernel"),
    STOCK: (".", "the model's own attention"),
    SELECT: ("S", "reads every key, and chooses some for the layers below it"),
    REUSE: ("r", "reads the keys that the last select layer chose"),
    PAGES: ("p", "reads the pages of keys whose bounds promise most"),
    WINDOW: ("w", "keeps first and recent tokens, drops the others for good"),
    RAZOR: ("z", "keeps first and recent tokens, and one that stands for all others"),
    GLOBAL_LOCAL: ("g", "sees near keys and the global tokens, which see all"),
    LOCAL: ("l", "sees first and recent tokens, in the prompt, too; drops the others for good"),
}
"""Every mode a head can have: the sign that maps print for it, and what it means."""

WINDOWED = (WINDOW, RAZOR, LOCAL)
"""Modes of heads that do not keep every key."""

BLOCKS = "blocks"
PREFILL = {BLOCKS: ("b", "prompts read chosen blocks of keys")}
"""What a policy can do to a layer's long calls, whatever its heads do in decoding."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table of modes, layers by KV heads, for models of one shape. Prints as a map.

    The heads of a layer that keep every key share one mode, and so do those that keep a window.
    A layer that selects does so for all its heads, because later layers take their sets by head.

    Attributes:
        shape: The model it is for.
        rows: For each layer, a mode of MODES for each KV head.
        policies: The policies that made it; layers read their numbers.
        fingerprint: Hashes of the weights it was calibrated on, by part of the model; None: it fits
            any model of the shape.
        scores: What calibration measured, by name; kept beside the plan, not compared.
    """

    shape: ModelShape
    rows: tuple[tuple[str, ...], ...]
    policies: tuple[Policy, ...] = field(default=())
    fingerprint: tuple[tuple[str, str], ...] | None = None
    scores: dict[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.shape.kv_heads):
            raise ValueError(
                f"Plan: rows must be {len(self.shape.kv_heads)} layers, got {len(self.rows)}"
            )
        for layer, (row, kv_heads) in enumerate(zip(self.rows, self.shape.kv_heads, strict=True)):
            if len(row) != kv_heads:
                raise ValueError(
                    f"Plan: rows[{layer}] must have {kv_heads} KV heads, got {len(row)}"
                )
            unknown = [mode for mode in row if mode not in MODES]
            if unknown:
                raise ValueError(
                    f"Plan: rows[{layer}] must hold {', '.join(MODES)}, got {unknown[0]!r}"
                )
            rule = _broken_rule(row)
            if rule is not None:
                raise ValueError(
                    f"Plan: rows[{layer}] must {rule}, got {', '.join(sorted(set(row)))}"
                )

    @staticmethod
    def make(shape: ModelShape, policies: Sequence[Policy]) -> Plan:
        """Return the plan that ``policies`` make together, each from the last one's table.

        Raises:
            ValueError: A policy does not fit the model, or two have no meaning together.
        """
        table = Plan(shape=shape, rows=tuple((STOCK,) * heads for heads in shape.kv_heads))
        for policy in policies:
            table = replace(policy.plan(table), policies=(*table.policies, policy))
        table.check_policies()
        return table

    def with_row(self, layer: int, row: tuple[str, ...]) -> Plan:
        """Return this plan with the modes ``row`` for the KV heads of ``layer``."""
        return replace(self, rows=(*self.rows[:layer], row, *self.rows[layer + 1 :]))

    def with_layer(self, layer: int, mode: str) -> Plan:
        """Return this plan with one mode for all heads of ``layer``."""
        return self.with_row(layer, (mode,) * self.shape.kv_heads[layer])

    def check_policies(self) -> None:
        """Raise ValueError unless every row can be run with the plan's policies."""
        runnable = {DENSE, STOCK, *(mode for policy in self.policies for mode in policy.modes)}
        selected = False
        for layer, row in enumerate(self.rows):
            alone = [mode for mode in row if mode not in runnable]
            if alone:
                raise ValueError(
                    f"Plan: policies must have one that says how to run {alone[0]!r} "
                    f"of rows[{layer}], got {', '.join(map(str, self.policies)) or 'none'}"
                )
            selected |= SELECT in row
            if REUSE in row and not selected:
                raise ValueError(f"Plan: rows[{layer}] must follow a row that selects, got 'reuse'")
            if set(row) - {DENSE, STOCK} and self.shape.windows[layer] is not None:
                raise ValueError(
                    f"Plan: rows[{layer}] must be dense or stock: the model itself gives that "
                    f"layer a window of {self.shape.windows[layer]} tokens, got {row[0]!r}"
                )

    def check_rowless(self) -> None:
        """Raise ValueError unless policies that no row speaks of fit the model: they say so."""
        for place, policy in enumerate(self.policies):
            if not policy.modes:
                policy.plan(replace(self, policies=self.policies[:place]))

    def prefill(self, layer: int) -> Policy | None:
        """Return the policy that the long calls of ``layer`` follow; None: they are dense."""
        found = (policy for policy in self.policies if layer in policy.prefill_layers(self))
        return next(found, None)

    def check_shape(self, shape: ModelShape) -> None:
        """Raise PlanMismatch, naming what differs, unless the plan is for a model of ``shape``."""
        for name, ours in self.shape.to_dict().items():
            theirs = shape.to_dict()[name]
            if ours != theirs:
                raise PlanMismatch(
                    f"adaptive: the plan is for a model with {name} {short(ours)}, "
                    f"this model has {short(theirs)}"
                )

    def check_fingerprint(self, fingerprint: tuple[tuple[str, str], ...]) -> None:
        """Raise PlanMismatch, naming the parts that differ, unless these are the weights."""
        if self.fingerprint is None:
            return
        ours, theirs = dict(self.fingerprint), dict(fingerprint)
        parts = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if parts:
            raise PlanMismatch(
                "adaptive: the plan was calibrated on other weights: "
                f"{len(parts)} of {len({**ours, **theirs})} parts of the model differ, "
                f"{short(', '.join(parts))}; calibrate again"
            )

    def __str__(self) -> str:
        """Return a map, one line per run of equal layers: a sign per KV head, one for prompts."""
        lines = [f"plan for {self.shape.model_type}: {len(self.rows)} layers x KV heads"]
        prefill = [self.prefill(layer) for layer in range(len(self.rows))]
        rows = [
            "".join(MODES[mode][0] for mode in row)
            + "".join("  " + PREFILL[mode][0] for mode in (policy.modes if policy else ()))
            for row, policy in zip(self.rows, prefill, strict=True)
        ]
        start = 0
        for layer, text in enumerate(rows):
            if layer + 1 == len(rows) or rows[layer + 1] != text:
                label = f"{start}" if start == layer else f"{start}-{layer}"
                lines.append(f"{label:>9}  {text}")
                start = layer + 1
        used = {mode for row in self.rows for mode in row}
        used |= {mode for policy in prefill if policy is not None for mode in policy.modes}
        signs = {**MODES, **PREFILL}
        lines += [
            f"{signs[mode][0]:>9}  {mode}: {signs[mode][1]}" for mode in signs if mode in used
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: all but the scores."""
        return to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, and its scores, if it has any, as safetensors beside it.

        Raises:
            ImportError: It has scores, and the package safetensors is missing.
        """
        write_plan(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Only JSON and safetensors are read, nothing is executed.

        Raises:
            OSError: The file cannot be read.
            ImportError: It has scores, and the package safetensors is missing.
            PlanMismatch: It is not a plan: names the file, the field and what is wrong with it.
        """
        return read_plan(Plan, Path(path))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Plan:
        """Return the plan that `to_dict` described.

        Raises:
            ValueError, TypeError: A field is missing, unknown or wrong; named in the message.
        """
        return from_dict(Plan, values)


def _broken_rule(row: Sequence[str]) -> str | None:
    """The rule that the modes of one layer break together; None if none."""
    whole = {mode for mode in row if mode not in WINDOWED}
    windowed = set(row) - whole
    if len(whole) > 1:
        return "have one mode for all its heads that keep every key"
    if len(windowed) > 1:
        return "have one mode for all its heads that keep a window"
    if windowed and whole & {STOCK, SELECT}:
        return f"have {whole.pop()} on all its heads or none"
    return None
