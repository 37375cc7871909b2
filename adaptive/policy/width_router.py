"""WidthRouter: linear routers that choose among several widths for each token, one per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.policy._fields import known_fields
from adaptive.policy._router_files import key, read, write
from adaptive.policy._router_tensors import by_layer, one_shape
from adaptive.policy.router_predictor import float_row, refused_row

_HEAD = "adaptive_width_router"
_LEAST = 2
"""Choices that there are to choose from."""


@dataclass(frozen=True, kw_only=True)
class WidthRouter:
    """One linear router per layer, whose largest logit is what a token gets: ``weight @ state``.

    The routers of Duo-LLM (Alizadeh et al. 2024, arXiv:2410.10846; skip, small and big), and of
    Adaptive Computation Modules (Wojcik et al. 2023, arXiv:2312.10193; how many learners, from
    none to all). They read what the FFN reads. A value like a policy: it compares, hashes, and
    makes the round trip through JSON. Its numbers are rounded to float32.

    Attributes:
        layers: Layers that have a router, ascending.
        weight: ``[len(layers), choices, width]``, from the narrowest choice to the widest.
        bias: ``[len(layers), choices]``; None: zeros.
    """

    layers: tuple[int, ...]
    weight: tuple[tuple[tuple[float, ...], ...], ...] = field(repr=False)
    bias: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        layers = self.layers
        whole = isinstance(layers, list | tuple) and all(type(i) is int and i >= 0 for i in layers)
        if not whole or not layers or list(layers) != sorted(set(layers)):
            raise _refused("layers", "be ascending layer numbers from 0", layers)
        weight = self._rows("weight", self.weight)
        rows = []
        for layer, own in zip(layers, weight, strict=True):
            if not isinstance(own, list | tuple) or len(own) < _LEAST:
                rule = f"have {_LEAST} rows or more, one per choice"
                raise _refused(f"weight of layer {layer}", rule, own)
            rows.append(tuple(_checked(f"weight of layer {layer}", row) for row in own))
        sizes = {(len(own), len(row)) for own in rows for row in own}
        if len(sizes) != 1 or not rows[0][0]:
            raise _refused("weight", "have the same choices and width in all layers", sorted(sizes))
        bias: Any = self.bias
        if bias is not None:
            given = zip(layers, self._rows("bias", bias), strict=True)
            bias = tuple(_checked(f"bias of layer {layer}", own) for layer, own in given)
            if any(len(own) != len(rows[0]) for own in bias):
                raise _refused("bias", f"have {len(rows[0])} numbers per layer", bias)
        for name, value in (("layers", tuple(layers)), ("weight", tuple(rows)), ("bias", bias)):
            object.__setattr__(self, name, value)

    def _rows(self, name: str, values: Any) -> Any:
        if not isinstance(values, list | tuple) or len(values) != len(self.layers):
            raise _refused(name, f"have {len(self.layers)} entries, one per layer", values)
        return values

    @property
    def width(self) -> int:
        """Of the states that it reads."""
        return len(self.weight[0][0])

    @property
    def choices(self) -> int:
        """How many widths there are to choose from."""
        return len(self.weight[0])

    def logits(self, layer: int, states: Tensor) -> Tensor:
        """Logits of a layer's choices, float32, ``[rows, choices]``, for ``[rows, width]``."""
        at = self.layers.index(layer)
        weight, bias = self._tensors
        return functional.linear(
            states.float(),
            weight[at].to(states.device),
            None if bias is None else bias[at].to(states.device),
        )

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else torch.tensor(self.bias, dtype=torch.float32)
        return torch.tensor(self.weight, dtype=torch.float32), bias

    @staticmethod
    def random(
        layers: Sequence[int], width: int, *, choices: int = 2, seed: int = 0
    ) -> WidthRouter:
        """Return routers that nobody trained: what others are to be compared with.

        Weights are normal with standard deviation ``1 / sqrt(width)``: of normalised states every
        choice is as likely as the others.
        """
        for name, value, least in (("width", width, 1), ("choices", choices, _LEAST)):
            if type(value) is not int or value < least:
                raise _refused(name, f"be a whole number from {least} on", value)
        rng = torch.Generator().manual_seed(seed)
        weight = torch.randn(len(layers), choices, width, generator=rng) / math.sqrt(width)
        return WidthRouter.from_tensors(dict(zip(layers, weight, strict=True)))

    @staticmethod
    def from_tensors(
        weights: Mapping[int, Tensor], biases: Mapping[int, Tensor] | None = None
    ) -> WidthRouter:
        """Return the routers of a checkpoint.

        Args:
            weights: For each layer ``[choices, width]``, from the narrowest choice to the widest.
            biases: For each layer ``[choices]``; None: zeros.

        Raises:
            TypeError: One is no mapping or no tensor, or not of real numbers.
            ValueError: Shapes or layers do not agree, or numbers are not finite; named by layer.
        """
        weight = by_layer("WidthRouter", "weight", weights, ("choices", "width"))
        layers, choices = tuple(weight), one_shape("WidthRouter", "weight", weight)[0]
        rows: Any = [own.tolist() for own in weight.values()]
        bias: Any = None
        if biases is not None:
            given = by_layer("WidthRouter", "bias", biases, (choices,), layers)
            bias = [own.tolist() for own in given.values()]
        return WidthRouter(layers=layers, weight=rows, bias=bias)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        weight = [[list(row) for row in own] for own in self.weight]
        bias = None if self.bias is None else [list(own) for own in self.bias]
        return {"layers": list(self.layers), "weight": weight, "bias": bias}

    @staticmethod
    def from_dict(values: Any) -> WidthRouter:
        """Return the routers that `to_dict` described.

        Raises:
            TypeError: ``values`` is not a dict.
            ValueError: A field is missing, unknown or wrong; named in the message.
        """
        return WidthRouter(**known_fields(WidthRouter, values))

    def save(self, path: str | Path) -> None:
        """Write safetensors, named as those of `RouterWeights.save`, with a row for each choice.

        Raises:
            ImportError: The package safetensors is missing.
        """
        tensors = {key(i): self._tensors[0][at].clone() for at, i in enumerate(self.layers)}
        for layer, own in zip(self.layers, self.bias or (), strict=False):
            tensors[key(layer, "bias")] = torch.tensor(own)
        write(path, _HEAD, tensors, self.layers, bias=self.bias is not None)

    @staticmethod
    def load(path: str | Path) -> WidthRouter:
        """Read routers that `save` wrote. Only safetensors and JSON are read.

        Raises:
            OSError: The file cannot be read.
            ImportError: The package safetensors is missing.
            ValueError: It holds no such routers, or lacks that of a layer, or has one too many.
        """
        return read(path, _HEAD, "routers of widths", _parts, _read)


def _parts(meta: Mapping[str, Any]) -> list[str]:
    return ["weight", "bias"] if meta.get("bias") else ["weight"]


def _read(meta: Mapping[str, Any], layers: list[int], tensors: dict[str, Tensor]) -> WidthRouter:
    named = ({layer: tensors[key(layer, part)] for layer in layers} for part in _parts(meta))
    return WidthRouter.from_tensors(*named)


def _checked(name: str, values: Any) -> tuple[float, ...]:
    return float_row("WidthRouter", name, values)


def _refused(name: str, rule: str, value: object) -> ValueError:
    return refused_row("WidthRouter", name, rule, value)
