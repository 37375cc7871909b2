"""Reads lists of retrieval heads that other projects wrote. Text and JSON only; nothing is run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive.policy._fields import is_share

MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What a file says.

    Attributes:
        kept: (layer, KV head) pairs that keep every key, ascending.
        layers: Layers of the model.
        kv_heads: KV heads of each layer; None: the file does not say.
        sinks: First tokens that the others keep.
        recent: Last tokens that the others keep.
    """

    kept: tuple[tuple[int, int], ...]
    layers: int
    kv_heads: int | None = None
    sinks: int = 0
    recent: int = 0

    def heads(self) -> dict[str, Any]:
        """The fields of RazorAttention that name the heads and their model."""
        return {"heads": self.kept, "of_layers": self.layers, "of_heads": self.kv_heads}


def read_duo(folder: Path, sparsity: float) -> Pattern:
    """Read a DuoAttention pattern directory; see `RazorAttention.from_duo`.

    Of heads with equal numbers those of earlier layers keep their keys.
    """
    if (sparsity != 0 and not is_share(sparsity)) or isinstance(sparsity, bool):
        raise ValueError(f"adaptive: sparsity must be a number from 0 to 1, got {sparsity!r}")
    gates = _table(folder / "full_attention_heads.tsv")
    path = folder / "config.json"
    config = read_object(path)
    sinks = _count(path, config, "sink_size", 0)
    recent = _count(path, config, "recent_size", 1)
    places = [(layer, head) for layer, row in enumerate(gates) for head in range(len(row))]
    ranked = sorted(places, key=lambda place: (-gates[place[0]][place[1]], place))
    kept = ranked[: len(places) - round(sparsity * len(places))]
    return Pattern(
        kept=tuple(sorted(kept)),
        layers=len(gates),
        kv_heads=len(gates[0]),
        sinks=sinks,
        recent=recent,
    )


def read_json(path: Path) -> Pattern:
    """Read a JSON head list; see `RazorAttention.from_json`."""
    values = read_object(path)
    layers: dict[int, Any] = {}
    for name, heads in values.items():
        if not name.isascii() or not name.isdecimal() or str(int(name)) != name:
            raise ValueError(f"adaptive: {path}: keys must be layer numbers, got {name!r}")
        layers[int(name)] = heads
    missing = sorted(set(range(max(layers, default=0) + 1)) - layers.keys())
    if missing:
        raise ValueError(
            f"adaptive: {path}: layer {missing[0]} is missing; a layer without retrieval heads is "
            "an empty list"
        )
    for layer, heads in layers.items():
        if not isinstance(heads, list):
            raise ValueError(f"adaptive: {path}: layer {layer} must be a list, got {heads!r}")
        for head in heads:
            if type(head) is not int or head < 0 or heads.count(head) > 1:
                raise ValueError(
                    f"adaptive: {path}: layer {layer} must hold KV heads from 0 on, each once, "
                    f"got {head!r}"
                )
    kept = sorted((layer, head) for layer, heads in layers.items() for head in heads)
    return Pattern(kept=tuple(kept), layers=len(layers))


def _table(path: Path) -> list[list[float]]:
    rows: list[list[float]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = [_number(path, number, text) for text in line.split("\t")]
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"adaptive: {path}, line {number}: must have {len(rows[0])} numbers as the lines "
                f"before, got {len(row)}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"adaptive: {path}: must have a line for each layer, got none")
    return rows


def _number(path: Path, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"adaptive: {path}, line {line}: must hold numbers, got {text!r}")
    return value


def _count(path: Path, config: dict[str, Any], name: str, least: int) -> int:
    number = config.get(name)
    if type(number) is not int or number < least:
        raise ValueError(
            f"adaptive: {path}: {name} must be a whole number from {least} on, got {number!r}"
        )
    return number


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, which names nothing twice.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else; the message names it.
    """
    try:
        values = json.loads(_text(path), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"adaptive: {path}: must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"adaptive: {path}: must be an object, got {type(values).__name__}")
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is named twice")
    return values


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"adaptive: {path}: must be at most {MAX_FILE_BYTES} bytes")
    return path.read_text(encoding="utf-8")
