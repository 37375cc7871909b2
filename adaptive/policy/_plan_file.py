"""Plans as files: JSON, and safetensors beside it for what calibration measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adaptive.errors import PlanMismatch
from adaptive.policy._policy import Policy
from adaptive.policy.shape import ModelShape

if TYPE_CHECKING:
    from adaptive.policy.plan import Plan

FORMAT = 2
MAX_FILE_BYTES = 64 << 20
MAX_SCORES_BYTES = 1 << 30
FIELDS = ("adaptive_plan", "model", "policies", "rows", "fingerprint", "scores")
_SHORT = 80


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return JSON values of all but the scores."""
    return {
        "adaptive_plan": FORMAT,
        "model": plan.shape.to_dict(),
        "policies": [policy.to_dict() for policy in plan.policies],
        "rows": [list(row) for row in plan.rows],
        "fingerprint": None if plan.fingerprint is None else dict(plan.fingerprint),
        "scores": None,
    }


def from_dict(kind: type[Plan], values: dict[str, Any]) -> Plan:
    """Return the plan that `to_dict` described.

    Raises:
        ValueError, TypeError: A field is missing, unknown or wrong; named in the message.
    """
    if isinstance(values, dict) and values.get("adaptive_plan", FORMAT) != FORMAT:
        raise ValueError(f"adaptive_plan must be {FORMAT}, got {values['adaptive_plan']!r}")
    _check_keys("plan", values, FIELDS)
    for name in ("policies", "rows"):
        if not isinstance(values[name], list):
            raise TypeError(f"{name} must be a list, got {short(values[name])}")
    for layer, row in enumerate(values["rows"]):
        if not isinstance(row, list) or not all(isinstance(mode, str) for mode in row):
            raise TypeError(f"rows[{layer}] must be a list of modes, got {short(row)}")
    plan = kind(
        shape=_shape(values["model"]),
        rows=tuple(tuple(row) for row in values["rows"]),
        policies=tuple(Policy.from_dict(policy) for policy in values["policies"]),
        fingerprint=_fingerprint(values["fingerprint"]),
    )
    plan.check_policies()
    return plan


def write_plan(plan: Plan, path: Path) -> None:
    """Write ``path``, and beside it a file of the same name for the scores, if there are any."""
    values = to_dict(plan)
    if plan.scores:
        beside = path.with_name(path.name + ".safetensors")
        save_file = _safetensors().save_file
        tensors = {name: score.detach().cpu().contiguous() for name, score in plan.scores.items()}
        save_file(tensors, beside)
        values["scores"] = {
            "file": beside.name,
            "bytes": beside.stat().st_size,
            "tensors": {name: _kind(score) for name, score in tensors.items()},
        }
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_plan(kind: type[Plan], path: Path) -> Plan:
    """Read what `write_plan` wrote.

    Raises:
        OSError: A file cannot be read.
        PlanMismatch: The file is not a plan, or what lies beside it is not what it says.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"the file must be at most {MAX_FILE_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        plan = from_dict(kind, values)
        if values["scores"] is not None:
            scores = _read_scores(path.parent, values["scores"])
            object.__setattr__(plan, "scores", scores)
        return plan
    except (ValueError, TypeError, RecursionError) as error:
        raise PlanMismatch(f"adaptive: {path} is not a plan: {error}") from error


def _read_scores(folder: Path, values: Any) -> dict[str, Tensor]:
    _check_keys("scores", values, ("file", "bytes", "tensors"))
    name, size = values["file"], values["bytes"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"scores.file must be a .safetensors file beside it, got {short(name)}")
    path = folder / name
    found = path.stat().st_size
    if type(size) is not int or size != found or size > MAX_SCORES_BYTES:
        raise ValueError(f"scores.bytes must be the size of {name}, {found}, got {short(size)}")
    load_file = _safetensors().load_file
    from safetensors import SafetensorError

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{name} must be safetensors: {error}") from error
    kinds = {key: _kind(tensor) for key, tensor in tensors.items()}
    if kinds != values["tensors"]:
        raise ValueError(f"scores.tensors must be {short(kinds)}, got {short(values['tensors'])}")
    return tensors


def _safetensors() -> Any:
    """The module that reads and writes tensors; whoever has transformers has it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adaptive: the scores of a plan need the package safetensors: pip install safetensors; "
            "dataclasses.replace(plan, scores=None) needs it not"
        ) from error
    return safetensors.torch


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def _shape(model: Any) -> ModelShape:
    numbers = ("heads", "kv_heads", "head_dim")
    _check_keys("model", model, ("model_type", *numbers, "windows"))
    if not isinstance(model["model_type"], str):
        raise TypeError(f"model.model_type must be a string, got {short(model['model_type'])}")
    heads, kv_heads, head_dim = (_counts(f"model.{name}", model[name]) for name in numbers)
    windows = model["windows"]
    if not isinstance(windows, list):
        raise TypeError(f"model.windows must be a list, got {short(windows)}")
    _counts("model.windows", [window for window in windows if window is not None])
    if len({len(heads), len(kv_heads), len(head_dim), len(windows)}) != 1:
        raise ValueError(
            "model.heads, .kv_heads, .head_dim and .windows must have one entry per layer"
        )
    return ModelShape(
        model_type=model["model_type"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=tuple(windows),
    )


def _fingerprint(values: Any) -> tuple[tuple[str, str], ...] | None:
    if values is None:
        return None
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise TypeError(f"fingerprint must be an object of strings, got {short(values)}")
    return tuple(values.items())


def _check_keys(name: str, values: object, wanted: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{name} must be an object, got {short(values)}")
    missing, unknown = set(wanted) - values.keys(), values.keys() - set(wanted)
    if missing:
        raise ValueError(f"{name} must have the field {min(missing)!r}")
    if unknown:
        raise ValueError(f"{name} must not have the field {min(unknown)!r}")


def _counts(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{name} must be a list, got {short(values)}")
    for number in values:
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must hold whole numbers from 1, got {short(number)}")
    return tuple(values)


def short(value: object) -> str:
    """Return ``repr(value)``, cut to what fits in an error."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."
