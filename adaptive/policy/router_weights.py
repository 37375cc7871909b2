"""RouterWeights: linear routers that score tokens or sequences, one per routed layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive.policy._fields import known_fields
from adaptive.policy._router_files import key, read, write
from adaptive.policy._router_tensors import by_layer
from adaptive.policy.router_predictor import PARTS, RouterPredictor, float_row, refused_row

_HEAD = "adaptive_router"
_PAIR = 2
"""Rows of a router that was trained with a softmax over skipping and running."""


@dataclass(frozen=True, kw_only=True)
class RouterWeights:
    """Weights of one linear router per layer: ``logit = weight . state + bias``.

    A value like a policy: it compares, hashes, and makes the round trip through JSON. Made by
    `adaptive.train.tune_router`, or from the tensors of a checkpoint by `from_tensors`. Its numbers
    are rounded to float32.

    Attributes:
        layers: Layers that have a router, ascending.
        weight: ``[len(layers), width]``.
        bias: ``[len(layers)]``; None: zeros.
        predictor: What tells while decoding which tokens a capacity would take; None: nothing.
    """

    layers: tuple[int, ...]
    weight: tuple[tuple[float, ...], ...] = field(repr=False)
    bias: tuple[float, ...] | None = field(default=None, repr=False)
    predictor: RouterPredictor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        layers = self.layers
        whole = isinstance(layers, list | tuple) and all(type(i) is int and i >= 0 for i in layers)
        if not whole or not layers or list(layers) != sorted(set(layers)):
            raise _refused("layers", "be ascending layer numbers from 0", layers)
        weight, bias = self.weight, self.bias
        if not isinstance(weight, list | tuple) or len(weight) != len(layers):
            raise _refused("weight", f"have {len(layers)} rows, one per layer", weight)
        rows = tuple(
            _numbers(f"weight of layer {i}", row) for i, row in zip(layers, weight, strict=True)
        )
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            sizes = {layer: len(row) for layer, row in zip(layers, rows, strict=True)}
            raise _refused("weight", "have rows of one width in all layers", sizes)
        if bias is not None:
            bias = _numbers("bias", bias)
            if len(bias) != len(layers):
                raise _refused("bias", f"have {len(layers)} numbers, or be None", len(bias))
        self._check_predictor(len(rows), len(rows[0]))
        for name, value in (("layers", tuple(layers)), ("weight", rows), ("bias", bias)):
            object.__setattr__(self, name, value)

    def _check_predictor(self, layers: int, width: int) -> None:
        if isinstance(self.predictor, dict):
            object.__setattr__(self, "predictor", RouterPredictor.from_dict(self.predictor))
        predictor = self.predictor
        if predictor is None:
            return
        if not isinstance(predictor, RouterPredictor):
            raise _refused("predictor", "be a RouterPredictor or None", predictor)
        if (len(predictor.inner), predictor.width) != (layers, width):
            found = f"{len(predictor.inner)} layers of width {predictor.width}"
            raise _refused("predictor", f"be for {layers} layers of width {width}", found)

    @property
    def width(self) -> int:
        """Of the states that it reads."""
        return len(self.weight[0])

    def of(self, layer: int, device: torch.device) -> tuple[Tensor, float]:
        """Return the weight ``[width]``, float32, and the bias of a layer's router."""
        at = self.layers.index(layer)
        return self._tensor.to(device)[at], 0.0 if self.bias is None else self.bias[at]

    @cached_property
    def _tensor(self) -> Tensor:
        return torch.tensor(self.weight, dtype=torch.float32)

    @staticmethod
    def random(layers: Sequence[int], width: int, *, seed: int = 0) -> RouterWeights:
        """Return routers that nobody trained: what others are to be compared with.

        Weights are normal with standard deviation ``1 / sqrt(width)``: logits of normalised states
        are about standard normal, and half of them positive.
        """
        if type(width) is not int or width < 1:
            raise _refused("width", "be a whole number from 1 on", width)
        rng = torch.Generator().manual_seed(seed)
        weight = torch.randn(len(layers), width, generator=rng) / math.sqrt(width)
        return RouterWeights(layers=tuple(layers), weight=tuple(map(tuple, weight.tolist())))

    @staticmethod
    def from_tensors(weights: Mapping[int, Tensor]) -> RouterWeights:
        """Return the routers of a checkpoint.

        Args:
            weights: For each layer ``[width]`` or ``[1, width]``, whose logit goes through a
                sigmoid; or ``[2, width]``, whose two logits, skip and run, go through a softmax:
                the same as the sigmoid of their difference.

        Raises:
            TypeError: It is no mapping, or a weight is no tensor of real numbers.
            ValueError: It has another shape, or numbers that are not finite; the layer is named.
        """
        rows, known = [], by_layer("RouterWeights", "weight", weights, None)
        for layer, given in known.items():
            found = given[None] if given.dim() == 1 else given
            if found.dim() != _PAIR or not 1 <= len(found) <= _PAIR:
                rule = "have shape [width], [1, width] or [2, width]"
                raise _refused(f"weight of layer {layer}", rule, list(given.shape))
            rows.append(tuple((found[1] - found[0] if len(found) == _PAIR else found[0]).tolist()))
        return RouterWeights(layers=tuple(known), weight=tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "layers": list(self.layers),
            "weight": [list(row) for row in self.weight],
            "bias": None if self.bias is None else list(self.bias),
            "predictor": None if self.predictor is None else asdict(self.predictor),
        }

    @staticmethod
    def from_dict(values: Any) -> RouterWeights:
        """Return the routers that `to_dict` described.

        Raises:
            TypeError: ``values`` is not a dict.
            ValueError: A field is missing, unknown or wrong; named in the message.
        """
        if isinstance(values, dict):  # files from before there were predictors name none
            values = {"predictor": None, **values}
        return RouterWeights(**known_fields(RouterWeights, values))

    def save(self, path: str | Path) -> None:
        """Write safetensors, ``layers.<number>.router.weight`` and ``.bias``, and what they are.

        A predictor's weights lie beside them, ``layers.<number>.router.predictor.*``.

        Raises:
            ImportError: The package safetensors is missing.
        """
        tensors = {key(i): self.of(i, torch.device("cpu"))[0][None].clone() for i in self.layers}
        for layer, bias in zip(self.layers, self.bias or (), strict=False):
            tensors[key(layer, "bias")] = torch.tensor([bias])
        has = {"bias": self.bias is not None}
        if self.predictor is not None:
            has["predictor"] = True
            for at, layer in enumerate(self.layers):
                named = self.predictor.tensors(at)
                tensors |= {key(layer, f"predictor.{name}"): t for name, t in named.items()}
        write(path, _HEAD, tensors, self.layers, **has)

    @staticmethod
    def load(path: str | Path) -> RouterWeights:
        """Read routers that `save` wrote. Only safetensors and JSON are read.

        Raises:
            OSError: The file cannot be read.
            ImportError: The package safetensors is missing.
            ValueError: It holds no routers, or lacks that of a layer, or has one too many; named.
        """
        return read(path, _HEAD, "routers", _parts, _read)


def _parts(meta: Mapping[str, Any]) -> list[str]:
    predictor = [f"predictor.{name}" for name in PARTS] if meta.get("predictor") else []
    return ["weight", *(["bias"] if meta.get("bias") else []), *predictor]


def _read(meta: Mapping[str, Any], layers: list[int], tensors: dict[str, Tensor]) -> RouterWeights:
    found = RouterWeights.from_tensors({layer: tensors[key(layer)] for layer in layers})
    bias = None
    if meta.get("bias"):
        bias = tuple(float(tensors[key(layer, "bias")].reshape(())) for layer in found.layers)
    predictor = None
    if meta.get("predictor"):
        predictor = RouterPredictor.from_tensors(
            [{name: tensors[key(i, f"predictor.{name}")] for name in PARTS} for i in found.layers]
        )
    return replace(found, bias=bias, predictor=predictor)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    return float_row("RouterWeights", name, values)


def _refused(name: str, rule: str, value: object) -> ValueError:
    return refused_row("RouterWeights", name, rule, value)
