"""How FFNs are written: the code of a forward says what its parts are called, and nothing more.

An FFN whose forward does anything else is none of which a part can run: what it does would be lost.
"""

import inspect
import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from adaptive.layers.hf_linear import is_plain, is_watched

_HEAD = r"def forward\(self, (?P<x>\w+)[^)]*\)(?: -> [\w.]+)?:\s+"
_UP = r"self\.(?P<up>\w+)\((?P=x)\)"
_ACT = r"self\.(?P<activation>\w*act\w*)"
_DOWN = r"self\.(?P<down>\w+)"

_GATED = re.compile(
    rf"{_HEAD}(?P<out>\w+) = {_DOWN}\({_ACT}\(self\.(?P<gate>\w+)\((?P=x)\)\) \* {_UP}\)\s+"
    r"return (?P=out)\s*$"
)
_FUSED = re.compile(
    rf"{_HEAD}(?P<a>\w+), (?P<b>\w+) = {_UP}\.chunk\(2, dim=-1\)\s+"
    rf"return {_DOWN}\(self\.(?P<drop>\w+)\({_ACT}\((?P=a)\) \* (?P=b)\)\)\s*$"
)
_NESTED = re.compile(rf"{_HEAD}return {_DOWN}\({_ACT}\({_UP}\)\)\s*$")
_FIRST = rf"(?P<out>\w+) = {_UP}\s+(?P=out) = {_ACT}\((?P=out)\)\s+"
_PLAIN = re.compile(rf"{_HEAD}{_FIRST}(?P=out) = {_DOWN}\((?P=out)\)\s+return (?P=out)\s*$")
_CHUNK = re.compile(
    rf"{_HEAD.replace('forward', 'ff_chunk')}{_FIRST}(?P=out) = {_DOWN}\((?P=out)\)\s+"
    r"(?P=out) = self\.(?P<drop_last>\w+)\((?P=out)\)\s+return (?P=out)\s*$"
)
_BY_CHUNKS = re.compile(
    rf"{_HEAD}return apply_chunking_to_forward\(\s*self\.ff_chunk, "
    r"self\.chunk_size_feed_forward, self\.seq_len_dim, (?P=x)\s*\)\s*$"
)
_FIRST_OF_TWO = re.compile(rf"{_HEAD}{_FIRST}return (?P=out)\s*$")
_SECOND_OF_TWO = re.compile(rf"{_HEAD}(?P=x) = {_DOWN}\((?P=x)\)\s")
_BETWEEN = re.compile(
    r"(?P<h>\w+) = self\.intermediate\(\w+\)\s+(?:#[^\n]*\s+)*\w+ = self\.output\((?P=h), \w+\)"
)

SECOND = "output"
"""The module beside ``intermediate`` that is the rest of its FFN."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Names of what an FFN is made of.

    Attributes:
        up: The projection to the neurons; where ``fused``, a gate and it, one after the other.
        down: The projection back; of the second module, if there are two.
        activation: Of the gate, or, without one, of ``up``; elementwise.
        gate: The other projection to the neurons; None: there is none, or it is fused.
        fused: Whether the first half of ``up`` is a gate.
        drop: A dropout of neurons; None: none.
        drop_last: A dropout of what ``down`` makes; None: none.
        halves: Whether two modules are one FFN.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    fused: bool = False
    drop: str | None = None
    drop_last: str | None = None
    halves: bool = False


def parts_of(module: Any, second: Any = None, layer: Any = None) -> Parts | None:
    """What the parts of an FFN are called; None if it is written in no way that is known.

    Nobody may have wrapped or watch what is read in parts: plain linear layers, and, of two
    modules that are one FFN, the first and the linear layer of the second.

    Args:
        module: The FFN, or the first of two modules.
        second: What stands beside it as ``output``, if anything does.
        layer: Their layer.
    """
    if not isinstance(module, nn.Module) or "forward" in module.__dict__:
        return None
    forward = _code(type(module).forward)
    names = _alone(module, forward)
    if names is None and second is not None:
        names = _of_two(module, forward, second, layer)
    if names is None or not callable(getattr(module, names.activation, None)):
        return None
    down = getattr(second if names.halves else module, names.down, None)
    first = [getattr(module, name, None) for name in (names.gate, names.up) if name]
    if not all(is_plain(linear) for linear in (*first, down)):
        return None
    if names.halves and ("forward" in down.__dict__ or is_watched(module)):
        return None
    return names


def _alone(module: nn.Module, forward: str) -> Parts | None:
    for code in (_GATED, _NESTED, _PLAIN):
        if (found := code.search(forward)) is not None:
            return _named(found)
    if (found := _FUSED.search(forward)) is not None:
        return replace(_named(found), fused=True)
    if _BY_CHUNKS.search(forward):
        found = _CHUNK.search(_code(type(module).ff_chunk))  # type: ignore[attr-defined]
        return None if found is None else _named(found)
    return None


def _of_two(module: nn.Module, forward: str, second: Any, layer: Any) -> Parts | None:
    first = _FIRST_OF_TWO.search(forward)
    rest = _SECOND_OF_TWO.search(_code(type(second).forward))
    if first is None or rest is None or _BETWEEN.search(_code(type(layer))) is None:
        return None
    in_chunks = bool(getattr(layer, "chunk_size_feed_forward", None))
    if "forward" in second.__dict__ or in_chunks:
        return None  # chunks of tokens would not know which of them are padding
    return Parts(up=first["up"], activation=first["activation"], down=rest["down"], halves=True)


def _named(found: re.Match[str]) -> Parts:
    known = found.groupdict()
    return Parts(
        up=known["up"],
        down=known["down"],
        activation=known["activation"],
        gate=known.get("gate"),
        drop=known.get("drop"),
        drop_last=known.get("drop_last"),
    )


def _code(of: Any) -> str:
    """The code of a function or class; "" if it was defined where there is none to read."""
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):
        return ""
