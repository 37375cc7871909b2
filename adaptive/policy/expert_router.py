"""ExpertRouterWeights: linear routers that score the experts of an FFN or attention, per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adaptive.policy._fields import known_fields
from adaptive.policy._plan_file import short
from adaptive.policy._router_tensors import by_layer, one_shape


@dataclass(frozen=True, kw_only=True)
class ExpertRouterWeights:
    """Weights of one linear router per layer: a logit for each expert, ``weight @ x + bias``.

    A value like a policy: it compares, hashes, and makes the round trip through JSON. Its numbers
    are rounded to float32.

    Attributes:
        layers: Layers that have a router, ascending.
        weight: ``[len(layers), experts, width]``.
        bias: ``[len(layers), experts]``; None: zeros.
        order: ``[len(layers), neurons]``: the neurons of the first expert, then those of the
            second, and so on, as the routers learned them; None: as the policy splits.
    """

    layers: tuple[int, ...]
    weight: tuple[tuple[tuple[float, ...], ...], ...] = field(repr=False)
    bias: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False)
    order: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        layers = self.layers
        whole = isinstance(layers, list | tuple) and all(type(i) is int and i >= 0 for i in layers)
        if not whole or not layers or list(layers) != sorted(set(layers)):
            raise _refused("layers", "be ascending layer numbers from 0", layers)
        weight = self._checked("weight", 2)
        bias = None if self.bias is None else self._checked("bias", 1)
        if bias is not None and bias.shape != weight.shape[:2]:
            raise _refused("bias", f"have shape {list(weight.shape[:2])}", list(bias.shape))
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "weight", _tuples(weight.tolist()))
        object.__setattr__(self, "bias", None if bias is None else _tuples(bias.tolist()))
        if self.order is not None:
            self._check_order(self.order)

    def _checked(self, name: str, axes: int) -> Tensor:
        """The numbers of a field, of ``axes`` dimensions in each layer, ``[layers, ...]``."""
        values: Any = getattr(self, name)
        listed = isinstance(values, list | tuple)
        if not listed or len(values) != len(self.layers):
            rule = f"have {len(self.layers)} entries, one per layer"
            raise _refused(name, rule, len(values) if listed else values)
        given = zip(self.layers, values, strict=True)
        found = {i: _numbers(f"{name} of layer {i}", own, axes) for i, own in given}
        one_shape("ExpertRouterWeights", name, found)
        return torch.stack([*found.values()])

    def _check_order(self, order: Any) -> None:
        if not isinstance(order, list | tuple) or len(order) != len(self.layers):
            raise _refused("order", f"have {len(self.layers)} rows, one per layer", order)
        for row in order:
            listed = isinstance(row, list | tuple) and all(type(i) is int for i in row)
            if not listed or sorted(row) != list(range(len(row))) or not row:
                raise _refused("order", "name each neuron of a layer once", row)
            if len(row) % self.experts:
                rule = f"have rows that {self.experts} experts divide"
                raise _refused("order", rule, len(row))
        object.__setattr__(self, "order", tuple(map(tuple, order)))

    @property
    def experts(self) -> int:
        """That it scores."""
        return len(self.weight[0])

    @property
    def width(self) -> int:
        """Of the states that it reads."""
        return len(self.weight[0][0])

    def of(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weight ``[experts, width]`` and bias ``[experts]`` of a layer's router, float32."""
        at = self.layers.index(layer)
        weight, bias = self._tensors
        return weight.to(device)[at], bias.to(device)[at]

    def order_of(self, layer: int) -> Tensor | None:
        """The neurons of a layer, expert by expert, int64; None: as the policy splits."""
        return None if self.order is None else torch.tensor(self.order[self.layers.index(layer)])

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        weight = torch.tensor(self.weight, dtype=torch.float32)
        zeros = weight.new_zeros(weight.shape[:2])
        return weight, zeros if self.bias is None else torch.tensor(self.bias, dtype=torch.float32)

    @staticmethod
    def random(
        layers: Sequence[int], experts: int, width: int, *, seed: int = 0
    ) -> ExpertRouterWeights:
        """Return routers that nobody trained: what others are to be compared with.

        Weights are normal with standard deviation ``1 / sqrt(width)``.
        """
        for name, value in (("experts", experts), ("width", width)):
            if type(value) is not int or value < 1:
                raise _refused(name, "be a whole number from 1 on", value)
        rng = torch.Generator().manual_seed(seed)
        weight = torch.randn(len(layers), experts, width, generator=rng) / math.sqrt(width)
        return ExpertRouterWeights(layers=tuple(layers), weight=_tuples(weight.tolist()))

    @staticmethod
    def from_tensors(
        weights: Mapping[int, Tensor],
        biases: Mapping[int, Tensor] | None = None,
        orders: Mapping[int, Tensor] | None = None,
    ) -> ExpertRouterWeights:
        """Return the routers of a checkpoint.

        Args:
            weights: For each layer ``[experts, width]``.
            biases: For each of them ``[experts]``; None: zeros.
            orders: For each of them ``[neurons]``; None: as the policy splits.

        Raises:
            TypeError: One is no mapping or no tensor, or not of numbers of its kind.
            ValueError: Shapes or layers do not agree, or numbers are not finite; named by layer.
        """
        owner = "ExpertRouterWeights"
        weight = by_layer(owner, "weight", weights, ("experts", "width"))
        layers, experts = tuple(weight), one_shape(owner, "weight", weight)[0]
        found: dict[str, Any] = {"weight": weight}
        if biases is not None:
            found["bias"] = by_layer(owner, "bias", biases, (experts,), layers)
        if orders is not None:
            found["order"] = by_layer(owner, "order", orders, ("neurons",), layers, whole=True)
        lists = {name: [own.tolist() for own in of.values()] for name, of in found.items()}
        return ExpertRouterWeights(layers=layers, **lists)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {f.name: _lists(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_dict(values: Any) -> ExpertRouterWeights:
        """Return the routers that `to_dict` described.

        Raises:
            TypeError: ``values`` is not a dict.
            ValueError: A field is missing, unknown or wrong; named in the message.
        """
        return ExpertRouterWeights(**known_fields(ExpertRouterWeights, values))


def _numbers(name: str, values: Any, rank: int) -> Tensor:
    try:
        found = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = torch.empty(0)
    if found.dim() != rank or not found.numel():
        raise _refused(name, f"hold numbers of {rank} dimensions", values)
    if not bool(found.isfinite().all()):
        raise _refused(name, "hold finite numbers", values)
    return found


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list | tuple) else values


def _lists(values: Any) -> Any:
    return list(map(_lists, values)) if isinstance(values, tuple) else values


def _refused(name: str, rule: str, value: object) -> ValueError:
    text = f"ExpertRouterWeights.{name} must {rule}, got {short(repr(value))}"
    return ValueError(f"adaptive: {text}")
