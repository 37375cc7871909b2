"""What a plan must know about a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a plan must know about a model, and recognises it by.

    Attributes:
        model_type: ``config.model_type``, or the class of a plain PyTorch model.
        heads: Query heads of each attention layer.
        kv_heads: Key and value heads of each attention layer.
        head_dim: Head size of each attention layer.
        windows: For each layer the tokens that the model itself lets it see, by a sliding window or
            chunks; None: all. Empty, as in the constructor's default, means None everywhere.
    """

    model_type: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * len(self.kv_heads))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "model_type": self.model_type,
            "heads": list(self.heads),
            "kv_heads": list(self.kv_heads),
            "head_dim": list(self.head_dim),
            "windows": list(self.windows),
        }
