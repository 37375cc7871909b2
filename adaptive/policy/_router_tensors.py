"""Tensors of a checkpoint's routers, layer by layer; errors name the layer, shapes and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adaptive.policy.router_predictor import refused_row


def by_layer(
    owner: str,
    name: str,
    given: Any,
    shape: Sequence[str | int] | None,
    layers: Sequence[int] | None = None,
    *,
    whole: bool = False,
) -> dict[int, Tensor]:
    """Return tensors on the CPU by layer, ascending: float32, or as they are if ``whole``.

    Args:
        owner: Whose they are to be, for errors.
        name: What they are, for errors.
        given: To be a mapping from layer numbers to tensors.
        shape: Of each; a name for an axis of any length. None: any.
        layers: Those to be named, and no others; None: any, but one at least.
        whole: Whether they must hold whole numbers.

    Raises:
        TypeError: It is no mapping, one is no tensor, or one holds no numbers of that kind.
        ValueError: A layer is missing, or one too many; a shape is another, or has no numbers.
    """
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise TypeError(f"adaptive: {owner}.{name} must map layers to tensors, got {kind}")
    keys = list(given)
    if any(type(layer) is not int or layer < 0 for layer in keys) or not (keys or layers):
        raise refused_row(owner, name, "have layer numbers from 0 on as keys", keys)
    if layers is not None and set(keys) != set(layers):
        missing, unknown = sorted({*layers} - {*keys}), sorted({*keys} - {*layers})
        found = ", ".join(
            f"{what} {of}" for what, of in (("missing", missing), ("unknown", unknown)) if of
        )
        raise refused_row(owner, name, f"be for layers {list(layers)} ({found})", sorted(keys))
    return {layer: _one(owner, name, layer, given[layer], shape, whole) for layer in sorted(keys)}


def _one(
    owner: str, name: str, layer: int, value: Any, shape: Sequence[str | int] | None, whole: bool
) -> Tensor:
    name = f"{name} of layer {layer}"
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"adaptive: {owner}.{name} must be a tensor, got {kind}")
    fits = not (value.is_floating_point() if whole else value.is_complex())
    if value.is_meta or not fits:
        rule, got = "whole" if whole else "real", f"{value.dtype} on {value.device}"
        raise TypeError(f"adaptive: {owner}.{name} must hold {rule} numbers, got {got}")
    if shape is not None and not _has_shape(value, shape):
        rule = f"have shape [{', '.join(map(str, shape))}]"
        raise refused_row(owner, name, rule, list(value.shape))
    if not value.numel():
        raise refused_row(owner, name, "not be empty", list(value.shape))
    found: Tensor = value.detach().cpu()
    return found if whole else found.float()


def _has_shape(value: Tensor, shape: Sequence[str | int]) -> bool:
    return value.dim() == len(shape) and all(
        isinstance(wanted, str) or wanted == size
        for wanted, size in zip(shape, value.shape, strict=True)
    )


def one_shape(owner: str, name: str, tensors: Mapping[int, Tensor]) -> list[int]:
    """Return the shape that the tensors of all layers have.

    Raises:
        ValueError: Two differ; both layers and shapes are named.
    """
    first, *rest = tensors
    for layer in rest:
        if tensors[layer].shape != tensors[first].shape:
            found = {i: list(tensors[i].shape) for i in (first, layer)}
            raise refused_row(owner, name, "have one shape in all layers", found)
    return list(tensors[first].shape)
