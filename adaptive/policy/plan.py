"""A plan: one mode for every KV head of every layer. Policies make it, layers read their row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptive.errors import PlanMismatch
from adaptive.policy._policy import Policy

DENSE = "dense"
STOCK = "stock"
MODES = {
    DENSE: ("#", "reads every key, native kernel"),
    STOCK: (".", "the model's own attention"),
}
"""Every mode a head can have: the sign that maps print for it, and what it means."""

FORMAT = 1
_MAX_FILE_BYTES = 64 << 20
_SHORT = 80


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a plan must know about a model, and recognises it by.

    Attributes:
        model_type: ``config.model_type``, or the class of a plain PyTorch model.
        heads: Query heads of each attention layer.
        kv_heads: Key and value heads of each attention layer.
        head_dim: Head size of each attention layer.
    """

    model_type: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "model_type": self.model_type,
            "heads": list(self.heads),
            "kv_heads": list(self.kv_heads),
            "head_dim": list(self.head_dim),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table of modes, layers by KV heads, for models of one shape. Prints as a map.

    Attributes:
        shape: The model it is for.
        rows: For each layer, a mode of MODES for each KV head.
        policies: The policies that made it, for reports.
    """

    shape: ModelShape
    rows: tuple[tuple[str, ...], ...]
    policies: tuple[Policy, ...] = field(default=())

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
            if len(set(row)) > 1:
                raise ValueError(
                    f"Plan: rows[{layer}] must have one mode for all its heads, "
                    f"got {', '.join(sorted(set(row)))}"
                )

    @staticmethod
    def make(shape: ModelShape, policies: Sequence[Policy]) -> Plan:
        """Return the plan that ``policies`` make together, each from the last one's table."""
        table = Plan(shape=shape, rows=tuple((STOCK,) * heads for heads in shape.kv_heads))
        for policy in policies:
            table = policy.plan(table)
        return replace(table, policies=tuple(policies))

    def with_layer(self, layer: int, mode: str) -> Plan:
        """Return this plan with one mode for all heads of ``layer``."""
        row = (mode,) * self.shape.kv_heads[layer]
        return replace(self, rows=(*self.rows[:layer], row, *self.rows[layer + 1 :]))

    def check_shape(self, shape: ModelShape) -> None:
        """Raise PlanMismatch, naming what differs, unless the plan is for a model of ``shape``."""
        for name, ours in self.shape.to_dict().items():
            theirs = shape.to_dict()[name]
            if ours != theirs:
                raise PlanMismatch(
                    f"adaptive: the plan is for a model with {name} {_short(ours)}, "
                    f"this model has {_short(theirs)}"
                )

    def __str__(self) -> str:
        """Return a map, one line per run of equal layers, one sign per KV head."""
        lines = [f"plan for {self.shape.model_type}: {len(self.rows)} layers x KV heads"]
        start = 0
        for layer, row in enumerate(self.rows):
            if layer + 1 == len(self.rows) or self.rows[layer + 1] != row:
                label = f"{start}" if start == layer else f"{start}-{layer}"
                lines.append(f"{label:>9}  {''.join(MODES[mode][0] for mode in row)}")
                start = layer + 1
        used = {mode for row in self.rows for mode in row}
        lines += [
            f"{MODES[mode][0]:>9}  {mode}: {MODES[mode][1]}" for mode in MODES if mode in used
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "adaptive_plan": FORMAT,
            "model": self.shape.to_dict(),
            "policies": [policy.to_dict() for policy in self.policies],
            "rows": [list(row) for row in self.rows],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Only JSON is read, nothing is executed.

        Raises:
            OSError: The file cannot be read.
            PlanMismatch: It is not a plan: names the file, the field and what is wrong with it.
        """
        try:
            if Path(path).stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"the file must be at most {_MAX_FILE_BYTES} bytes")
            return Plan.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanMismatch(f"adaptive: {path} is not a plan: {error}") from error

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Plan:
        """Return the plan that `to_dict` described.

        Raises:
            ValueError, TypeError: A field is missing, unknown or wrong; named in the message.
        """
        _check_keys("plan", values, ("adaptive_plan", "model", "policies", "rows"))
        if values["adaptive_plan"] != FORMAT:
            raise ValueError(f"adaptive_plan must be {FORMAT}, got {values['adaptive_plan']!r}")
        model = values["model"]
        _check_keys("model", model, ("model_type", "heads", "kv_heads", "head_dim"))
        if not isinstance(model["model_type"], str):
            raise TypeError(f"model.model_type must be a string, got {model['model_type']!r}")
        counts = [
            _counts(f"model.{name}", model[name]) for name in ("heads", "kv_heads", "head_dim")
        ]
        if len({len(numbers) for numbers in counts}) != 1:
            raise ValueError("model.heads, .kv_heads and .head_dim must have one number per layer")
        for name in ("policies", "rows"):
            if not isinstance(values[name], list):
                raise TypeError(f"{name} must be a list, got {values[name]!r}")
        for layer, row in enumerate(values["rows"]):
            if not isinstance(row, list) or not all(isinstance(mode, str) for mode in row):
                raise TypeError(f"rows[{layer}] must be a list of modes, got {_short(row)}")
        heads, kv_heads, head_dim = counts
        return Plan(
            shape=ModelShape(
                model_type=model["model_type"], heads=heads, kv_heads=kv_heads, head_dim=head_dim
            ),
            rows=tuple(tuple(row) for row in values["rows"]),
            policies=tuple(Policy.from_dict(policy) for policy in values["policies"]),
        )


def _check_keys(name: str, values: object, wanted: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{name} must be an object, got {_short(values)}")
    missing, unknown = set(wanted) - values.keys(), values.keys() - set(wanted)
    if missing:
        raise ValueError(f"{name} must have the field {min(missing)!r}")
    if unknown:
        raise ValueError(f"{name} must not have the field {min(unknown)!r}")


def _counts(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{name} must be a list, got {_short(values)}")
    for number in values:
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must hold whole numbers from 1, got {_short(number)}")
    return tuple(values)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."
