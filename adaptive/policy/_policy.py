"""What every policy is: a frozen value that turns one plan into another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from adaptive.policy.plan import Plan

_KINDS: dict[str, type[Policy]] = {}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Numbers a user chose, and what they mean for each layer and head.

    A policy is a keyword-only frozen dataclass that checks its fields in ``__post_init__``. It
    prints, hashes, compares, pickles, and makes the round trip through JSON.

    Attributes:
        exact: Whether the model computes the same mathematics as without it.
        modes: Modes of a plan in which it tells layers what to do; empty if they need no numbers.
        generates: Whether it answers `generate` by passes of its own.
        routes: Whether it runs layers for some of the tokens or sequences alone.
        splits_heads: Whether it runs some heads of a layer and leaves out others.
    """

    exact: ClassVar[bool] = False
    modes: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    splits_heads: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[cls.__name__] = cls

    def __str__(self) -> str:
        """Return the policy with the fields that are not at their defaults."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if f.repr]
        default = {f.name: f.default for f in fields(self)}
        chosen = [f"{name}={value!r}" for name, value in values if value != default[name]]
        return f"{type(self).__name__}({', '.join(chosen)})"

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with what this policy decides.

        Raises:
            ValueError: A field does not fit the model that the table is for.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement plan(table)")

    def prefill_layers(self, table: Plan) -> tuple[int, ...]:
        """Layers of ``table`` whose calls of more than 16 query tokens follow this policy."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the class under "kind"."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"kind": type(self).__name__, **{k: _lists(v) for k, v in values.items()}}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Policy:
        """Return the policy that `to_dict` described.

        Raises:
            TypeError: ``values`` is not a dict.
            ValueError: An unknown kind, an unknown key, or what the policy refuses itself.
        """
        if not isinstance(values, dict):
            raise TypeError(f"adaptive: policy must be an object, got {type(values).__name__}")
        kind = values.get("kind")
        if kind not in _KINDS:
            raise ValueError(
                f"adaptive: policy kind must be one of {', '.join(sorted(_KINDS))}, got {kind!r}"
            )
        known = {f.name for f in fields(_KINDS[kind])}
        unknown = sorted(values.keys() - known - {"kind"})
        if unknown:
            raise ValueError(f"adaptive: {kind} has no field {', '.join(map(repr, unknown))}")
        return _KINDS[kind](
            **{name: _tuples(value) for name, value in values.items() if name != "kind"}
        )


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
