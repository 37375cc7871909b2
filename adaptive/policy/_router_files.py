"""Files of routers: one safetensors each, whose header says which layers have what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from adaptive.policy._plan_file import short

FORMAT = 1
MAX_FILE_BYTES = 1 << 30
Routers = TypeVar("Routers")


def key(layer: int, part: str = "weight") -> str:
    """The name of a tensor of a layer's router."""
    return f"layers.{layer}.router.{part}"


def write(
    path: str | Path, head: str, tensors: Mapping[str, Tensor], layers: Sequence[int], **has: bool
) -> None:
    """Write tensors named by `key`, and under ``head`` the layers and what they have.

    Raises:
        ImportError: The package safetensors is missing.
    """
    meta = {"format": FORMAT, "layers": layers, **has}
    _safetensors().save_file(dict(tensors), Path(path), metadata={head: json.dumps(meta)})


def read(
    path: str | Path,
    head: str,
    what: str,
    parts: Callable[[Mapping[str, Any]], Sequence[str]],
    make: Callable[[Mapping[str, Any], list[int], dict[str, Tensor]], Routers],
) -> Routers:
    """Return what ``make`` makes of what `write` wrote: what the layers have, they, and tensors.

    Args:
        path: Of the file.
        head: As `write` was given it.
        what: Such routers are, for errors.
        parts: Of each layer, given what the layers have.
        make: Gets a tensor for each part of each layer, and no other.

    Raises:
        OSError: The file cannot be read.
        ImportError: The package safetensors is missing.
        ValueError: It holds no such routers, or lacks that of a layer, or has one too many; named.
    """
    path = Path(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"adaptive: {path} must be at most {MAX_FILE_BYTES} bytes")
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(head, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = _layers(meta, head)
        _check_names(tensors, {key(layer, part) for layer in layers for part in parts(meta)})
        return make(meta, layers, tensors)
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"adaptive: {path} holds no {what}: {error}") from error


def _layers(meta: Any, head: str) -> list[int]:
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{head}.format must be {FORMAT}")
    layers = meta.get("layers")
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise ValueError(f"{head}.layers must be a list of whole numbers, got {short(layers)}")
    return layers


def _check_names(tensors: Mapping[str, Tensor], wanted: set[str]) -> None:
    for name in sorted(wanted - tensors.keys()):
        raise ValueError(f"it must have {name!r}")
    for name in sorted(tensors.keys() - wanted):
        raise ValueError(f"it must not have {name!r}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adaptive: files of routers need the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch
