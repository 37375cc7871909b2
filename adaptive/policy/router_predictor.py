"""RouterPredictor: tells which tokens a capacity would take, without looking ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.policy._fields import known_fields
from adaptive.policy._plan_file import short

PARTS = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
"""Names of a predictor's tensors in files: ``[hidden, width]``, ``[hidden]``, ``[hidden]``, 1."""


@dataclass(frozen=True, kw_only=True)
class RouterPredictor:
    """One small MLP per routed layer: ``logit = outer . relu(inner @ state + inner_bias) + bias``.

    It reads what the layer's router reads, and learns whether a token is among the best of its
    sequence, which only later tokens decide (Raposo et al. 2024, arXiv:2404.02258, section 3.5).

    Attributes:
        inner: ``[layers, hidden, width]``.
        inner_bias: ``[layers, hidden]``.
        outer: ``[layers, hidden]``.
        outer_bias: ``[layers]``.
    """

    inner: tuple[tuple[tuple[float, ...], ...], ...] = field(repr=False)
    inner_bias: tuple[tuple[float, ...], ...] = field(repr=False)
    outer: tuple[tuple[float, ...], ...] = field(repr=False)
    outer_bias: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        inner = tuple(
            tuple(float_row("RouterPredictor", "inner", row) for row in _rows("inner", layer))
            for layer in _rows("inner", self.inner)
        )
        shape = len(inner), len(inner[0]), len(inner[0][0])
        if not shape[2] or any(len(x) != shape[1] or len(x[0]) != shape[2] for x in inner):
            raise refused_row("RouterPredictor", "inner", "be [layers, hidden, width]", shape)
        if any(len(row) != shape[2] for layer in inner for row in layer):
            raise refused_row("RouterPredictor", "inner", "have rows of one width", shape)
        object.__setattr__(self, "inner", inner)
        for name in ("inner_bias", "outer"):
            given = _rows(name, getattr(self, name))
            rows = tuple(float_row("RouterPredictor", name, row) for row in given)
            if [len(row) for row in rows] != [shape[1]] * shape[0]:
                rule = f"be [layers, hidden] = [{shape[0]}, {shape[1]}]"
                raise refused_row("RouterPredictor", name, rule, [len(row) for row in rows])
            object.__setattr__(self, name, rows)
        bias = float_row("RouterPredictor", "outer_bias", self.outer_bias)
        if len(bias) != shape[0]:
            rule = f"have {shape[0]} numbers, one per layer"
            raise refused_row("RouterPredictor", "outer_bias", rule, len(bias))
        object.__setattr__(self, "outer_bias", bias)

    @property
    def width(self) -> int:
        """Of the states that it reads."""
        return len(self.inner[0][0])

    def logits(self, at: int, states: Tensor) -> Tensor:
        """Logits of the ``at``-th routed layer for states ``[..., width]``, float32."""
        return predict(states.float(), [t.to(states.device)[at] for t in self._tensors])

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        values = (self.inner, self.inner_bias, self.outer, self.outer_bias)
        return tuple(torch.tensor(value, dtype=torch.float32) for value in values)

    def tensors(self, at: int) -> dict[str, Tensor]:
        """The weights of the ``at``-th routed layer by the names in `PARTS`."""
        found = dict(zip(PARTS, (t[at] for t in self._tensors), strict=True))
        return {
            name: t.reshape(1).clone() if t.dim() == 0 else t.clone() for name, t in found.items()
        }

    @staticmethod
    def from_tensors(layers: Sequence[Mapping[str, Tensor]]) -> RouterPredictor:
        """Return the predictor with these weights of each routed layer, as `tensors` gives them.

        Raises:
            TypeError: One is no tensor.
            ValueError: A name is missing or unknown, or one has another shape.
        """
        for at, layer in enumerate(layers):
            if not isinstance(layer, Mapping) or set(layer) != set(PARTS):
                rule = f"map the names {', '.join(PARTS)} to tensors"
                found = list(layer) if isinstance(layer, Mapping) else layer
                raise refused_row("RouterPredictor", f"item {at}", rule, found)
            for name in PARTS:
                _check_shape(at, name, layer, layers[0]["inner.weight"])
        one = [[layer[name].detach().cpu().float() for name in PARTS] for layer in layers]
        return RouterPredictor(
            inner=tuple(tuple(map(tuple, w[0].tolist())) for w in one),
            inner_bias=tuple(tuple(w[1].tolist()) for w in one),
            outer=tuple(tuple(w[2].tolist()) for w in one),
            outer_bias=tuple(float(w[3].reshape(())) for w in one),
        )

    @staticmethod
    def from_dict(values: Any) -> RouterPredictor:
        """Return the predictor whose fields ``values`` holds.

        Raises:
            TypeError: ``values`` is not a dict.
            ValueError: A field is missing, unknown or wrong; named in the message.
        """
        return RouterPredictor(**known_fields(RouterPredictor, values))


def predict(states: Tensor, weights: list[Tensor]) -> Tensor:
    """Logits of one predictor for ``states``, ``[..., width]``, from its four tensors."""
    inner, inner_bias, outer, bias = weights
    return functional.relu(states @ inner.T + inner_bias) @ outer + bias


def _check_shape(at: int, name: str, layer: Mapping[str, Any], first: Any) -> None:
    """Raise unless a tensor has the shape that `PARTS` tells, with the ``first`` inner weight's."""
    value, place = layer[name], f"{name} of item {at}"
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"adaptive: RouterPredictor.{place} must be a tensor, got {kind}")
    if first.dim() != len(("hidden", "width")):
        raise refused_row("RouterPredictor", place, "be [hidden, width]", list(first.shape))
    hidden = len(first)
    wanted = dict(zip(PARTS, (list(first.shape), [hidden], [hidden], [1]), strict=True))[name]
    if list(value.shape) != wanted:
        raise refused_row("RouterPredictor", place, f"have shape {wanted}", list(value.shape))


def _rows(name: str, values: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise refused_row("RouterPredictor", name, "be a list that is not empty", values)
    return values


def float_row(owner: str, name: str, values: Any) -> tuple[float, ...]:
    """Return numbers rounded to float32.

    Raises:
        ValueError: They are no list, or no finite numbers.
    """
    if not isinstance(values, list | tuple) or not all(type(v) in (int, float) for v in values):
        raise refused_row(owner, name, "hold numbers", values)
    try:
        rounded = torch.tensor(values, dtype=torch.float32)
    except OverflowError:  # a whole number beyond all floats
        rounded = torch.tensor([torch.inf])
    if not bool(rounded.isfinite().all()):
        raise refused_row(owner, name, "hold finite numbers", values)
    return tuple(rounded.tolist())


def refused_row(owner: str, name: str, rule: str, value: object) -> ValueError:
    """The error that names a field of ``owner``."""
    return ValueError(f"adaptive: {owner}.{name} must {rule}, got {short(repr(value))}")
