"""EncoderGate: a linear layer that tells from a sequence's embeddings how many layers it needs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive.policy._fields import known_fields

POOLS = ("mean", "first")
"""What stands for a sequence: the mean of its tokens, or the first of them."""

FORMAT = 1
MAX_FILE_BYTES = 64 << 20
MAX_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class EncoderGate:
    """Weights of a linear layer on pooled embeddings: one output per exit, and one for all layers.

    A value like a policy: it compares, hashes, and makes the round trip through JSON. Made by
    `adaptive.train.encoder_gate`.

    Attributes:
        layers: Depths at which sequences may leave, ascending, all below the model's layers.
        weight: ``[exits + 1, width]``.
        bias: ``[exits + 1]``.
        pool: What it reads of the embeddings: "mean" of the tokens or the "first".
    """

    layers: tuple[int, ...]
    weight: tuple[tuple[float, ...], ...] = field(repr=False)
    bias: tuple[float, ...] = field(repr=False)
    pool: str = "mean"

    def __post_init__(self) -> None:
        layers = self.layers
        whole = isinstance(layers, list | tuple) and all(type(depth) is int for depth in layers)
        if not whole or not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
            raise _refused("layers", "be ascending depths from 1 on", layers)
        if self.pool not in POOLS:
            raise _refused("pool", f"be one of {', '.join(POOLS)}", self.pool)
        outputs = len(layers) + 1
        weight = self.weight
        if not isinstance(weight, list | tuple) or len(weight) != outputs:
            raise _refused("weight", f"have {outputs} rows, one per exit and one more", weight)
        rows = tuple(_numbers("weight", row) for row in weight)
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise _refused("weight", "have rows of one width", [len(row) for row in rows])
        bias = _numbers("bias", self.bias)
        if len(bias) != outputs:
            raise _refused("bias", f"have {outputs} numbers", len(bias))
        for name, value in (("layers", tuple(layers)), ("weight", rows), ("bias", bias)):
            object.__setattr__(self, name, value)

    @property
    def width(self) -> int:
        """Of the embeddings that it reads."""
        return len(self.weight[0])

    def depths(self, pooled: Tensor, full: int, threshold: float) -> Tensor:
        """Return the depth of each sequence: the least that is enough with that probability.

        Args:
            pooled: Embeddings, ``[batch, width]``.
            full: Layers of the model.
            threshold: Least probability that a sequence needs no more layers; above 1: all run.

        Returns:
            ``[batch]``, int64.
        """
        weight, bias = (part.to(pooled.device) for part in self._tensors)
        chance = (pooled.float() @ weight.T + bias).softmax(-1).cumsum(-1)[:, :-1]
        depths = torch.tensor((*self.layers, full), device=pooled.device)
        enough = torch.nn.functional.pad(chance >= threshold, (0, 1), value=True)
        return depths[enough.int().argmax(-1)]

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        weight, bias = (
            torch.tensor(part, dtype=torch.float32) for part in (self.weight, self.bias)
        )
        return weight, bias

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "layers": list(self.layers),
            "weight": [list(row) for row in self.weight],
            "bias": list(self.bias),
            "pool": self.pool,
        }

    @staticmethod
    def from_dict(values: Any) -> EncoderGate:
        """Return the gate that `to_dict` described.

        Raises:
            TypeError: ``values`` is not a dict.
            ValueError: A field is missing, unknown or wrong; named in the message.
        """
        return EncoderGate(**known_fields(EncoderGate, values))

    def save(self, path: str | Path) -> None:
        """Write the gate as JSON."""
        text = json.dumps({"adaptive_encoder_gate": FORMAT, **self.to_dict()})
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> EncoderGate:
        """Read a gate that `save` wrote. Only JSON is read, nothing is executed.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not a gate; says what is wrong with it.
        """
        path = Path(path)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"adaptive: {path} must be at most {MAX_FILE_BYTES} bytes")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.pop("adaptive_encoder_gate", 0) != FORMAT:
                raise ValueError(f"adaptive_encoder_gate must be {FORMAT}")
            return EncoderGate.from_dict(values)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"adaptive: {path} is not a gate: {error}") from error


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    kinds = (int, float)
    if not isinstance(values, list | tuple) or not all(type(v) in kinds for v in values):
        raise _refused(name, "hold numbers", values)
    if not all(math.isfinite(value) for value in values):
        raise _refused(name, "hold finite numbers", values)
    return tuple(float(value) for value in values)


def _refused(name: str, rule: str, value: object) -> ValueError:
    text = repr(value)
    text = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    return ValueError(f"adaptive: EncoderGate.{name} must {rule}, got {text}")
