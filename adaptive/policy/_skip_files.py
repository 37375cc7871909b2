"""Skip sets as JSON files: which layers' attention drafts leave out, and which layers' MLP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaptive.policy._head_files import read_object

FIELDS = ("attention", "mlp")


def write_sets(path: Path, skip: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Write ``{"attention": [layers], "mlp": [layers]}``."""
    values = dict(zip(FIELDS, map(list, skip), strict=True))
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_sets(path: Path) -> tuple[Any, Any]:
    """Read what `write_sets` wrote, two lists; what is in them is the policy's to check.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such object: names the file and the field.
    """
    values = read_object(path)
    unknown = sorted(values.keys() - set(FIELDS))
    if unknown:
        raise ValueError(
            f"adaptive: {path}: must have the fields 'attention' and 'mlp' alone, "
            f"got {unknown[0]!r}"
        )
    for name in FIELDS:
        if not isinstance(values.get(name), list):
            raise ValueError(
                f"adaptive: {path}: {name} must be a list of layers, got {values.get(name)!r}"
            )
    return values["attention"], values["mlp"]
