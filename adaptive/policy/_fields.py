"""Checks of the numbers that a user gives to a policy; each error names field, rule and value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive.policy._policy import Policy


Heads = tuple[tuple[int, int], ...]
"""(layer, KV head) pairs, ascending."""


def refused(policy: Policy, name: str, rule: str, value: object) -> ValueError:
    """Return the error for the field ``name`` of ``policy``, to be raised by the caller."""
    return ValueError(f"adaptive: {type(policy).__name__}.{name} must {rule}, got {value!r}")


def known_fields(kind: type[Any], values: Any) -> dict[str, Any]:
    """Return ``values`` if they are a dict that names the fields of the dataclass ``kind``.

    Raises:
        TypeError: They are no dict.
        ValueError: A field is missing or unknown.
    """
    if not isinstance(values, dict):
        found = type(values).__name__
        raise TypeError(f"adaptive: {kind.__name__} must be an object, got {found}")
    known = {f.name for f in fields(kind)}
    wrong = sorted(known ^ values.keys())
    if wrong:
        rule = "a field" if wrong[0] in known else "no field"
        raise ValueError(f"adaptive: {kind.__name__} must have {rule} {wrong[0]!r}")
    return values


def check_count(policy: Policy, name: str, least: int, optional: bool = False) -> None:
    """Raise unless the field is a whole number from ``least`` on, or None where that is allowed."""
    value = getattr(policy, name)
    if optional and value is None:
        return
    if type(value) is not int or value < least:
        rule = f"be a whole number from {least} on" + (", or None" if optional else "")
        raise refused(policy, name, rule, value)


def is_share(value: object, least: float = 0.0) -> bool:
    """Whether ``value`` is a number above ``least`` and at most 1."""
    return type(value) in (int, float) and least < value <= 1  # type: ignore[operator]


def check_share(policy: Policy, name: str) -> None:
    """Raise unless the field is None or a number between 0 and 1, both excluded."""
    value = getattr(policy, name)
    if value is not None and (not is_share(value) or value == 1):
        raise refused(policy, name, "be above 0 and below 1, or None", value)


def check_rate(policy: Policy, name: str) -> None:
    """Raise unless the field is a number from 0 to 1."""
    value = getattr(policy, name)
    if (value != 0 and not is_share(value)) or isinstance(value, bool):
        raise refused(policy, name, "be a number from 0 to 1", value)


def check_flag(policy: Policy, name: str) -> None:
    """Raise unless the field is True or False."""
    if not isinstance(getattr(policy, name), bool):
        raise refused(policy, name, "be True or False", getattr(policy, name))


def set_layers(policy: Policy, name: str, optional: bool = False) -> None:
    """Make the field a tuple of layer numbers.

    Raises:
        ValueError: It is not a list or tuple of ascending whole numbers from 0.
    """
    value = getattr(policy, name)
    if optional and value is None:
        return
    whole = isinstance(value, list | tuple) and all(type(index) is int for index in value)
    if not whole or list(value) != sorted(set(value)) or any(index < 0 for index in value):
        rule = "be ascending layer numbers from 0" + (", or None" if optional else "")
        raise refused(policy, name, rule, value)
    object.__setattr__(policy, name, tuple(value))


def set_heads(policy: Policy, name: str) -> None:
    """Make the field, unless it is None, ascending (layer, KV head) pairs.

    Raises:
        ValueError: It holds no such pairs, and is no mapping from layers to heads.
    """
    heads = getattr(policy, name)
    if heads is None:
        return
    if isinstance(heads, Mapping):
        heads = [
            (layer, head)
            for layer, row in heads.items()
            for head in (row if isinstance(row, list | tuple) else [row])
        ]
    if not isinstance(heads, list | tuple | set | frozenset):
        raise refused(policy, name, "be (layer, KV head) pairs or a mapping, or None", heads)
    for pair in heads:
        two = isinstance(pair, list | tuple) and len(pair) == len(("layer", "head"))
        if not two or not all(type(number) is int and number >= 0 for number in pair):
            raise refused(policy, name, "hold (layer, KV head) pairs from (0, 0) on", pair)
    pairs = [(layer, head) for layer, head in heads]
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise refused(policy, name, "name each head once", pair)
    object.__setattr__(policy, name, tuple(sorted(pairs)))


def check_heads_exist(policy: Policy, name: str, heads: Heads, kv_heads: Sequence[int]) -> None:
    """Raise unless all ``heads`` are among the model's, ``kv_heads`` in each layer."""
    for layer, head in heads:
        if layer >= len(kv_heads) or head >= kv_heads[layer]:
            rule = f"be of the model's {len(kv_heads)} layers"
            if layer < len(kv_heads):
                rule = f"be of the {kv_heads[layer]} KV heads of layer {layer}"
            raise refused(policy, name, rule, (layer, head))


def check_layers_exist(policy: Policy, name: str, layers: Sequence[int], total: int) -> None:
    """Raise unless all ``layers`` are below ``total``, the model's number of layers."""
    for layer in layers:
        if layer >= total:
            raise refused(policy, name, f"be below the model's {total} layers", layer)


def check_budget(policy: Policy, share: bool) -> None:
    """Raise unless ``policy.budget`` is a count above sinks and recent tokens, or a share.

    Args:
        policy: With the fields "budget", "sinks" and "recent".
        share: Whether a float above 0 and at most 1 is taken, as a share of the tokens.
    """
    budget = policy.budget  # type: ignore[attr-defined]
    if share and type(budget) is float:
        if not math.isfinite(budget) or not is_share(budget):
            raise refused(policy, "budget", "be a share above 0 and at most 1", budget)
        return
    least = policy.sinks + policy.recent + 1  # type: ignore[attr-defined]
    if type(budget) is not int or budget < least:
        rule = f"be a whole number above sinks + recent = {least - 1}"
        raise refused(policy, "budget", rule + (", or a share up to 1.0" if share else ""), budget)
