"""FFNs of a transformers model that compute with their first neurons only."""

import inspect
import re
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.errors import PatchConflict
from adaptive.layers.hf_linear import fast_linear, is_plain
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.layers.switch import Switch
from adaptive.policy.token_routing import TokenRouting, neurons_of

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FORWARD = re.compile(
    r"def forward\(self, (\w+)[^)]*\)(?: -> [\w.]+)?:\s+"
    r"down_proj = self\.down_proj\(self\.act_fn\(self\.gate_proj\(\1\)\) "
    r"\* self\.up_proj\(\1\)\)"
    r"\s+return down_proj\s*$"
)
"""All that the forward of a gated FFN does, in transformers' words."""


class PrefixForward:
    """The forward of one patched gated FFN, set on the instance: its first neurons alone.

    An object with a weak reference, for the reasons of `hf_linear.LinearForward`.
    """

    def __init__(self, ffn: nn.Module, switch: Switch, neurons: int) -> None:
        """Know the FFN, whose parts are read anew in every call, and how many neurons compute."""
        self._ffn = weakref.ref(ffn)
        self.switch = switch
        self.neurons = neurons

    def __getstate__(self) -> tuple[nn.Module | None, Switch, int]:
        """Let copies and pickles arrive with the copy of the FFN."""
        return self._ffn(), self.switch, self.neurons

    def __setstate__(self, state: tuple[nn.Module, Switch, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the FFN would if it had only its first neurons. Differentiable."""
        ffn: Any = self._ffn()
        assert ffn is not None  # it is what calls
        if not self.switch.on:
            return type(ffn).forward(ffn, x)  # type: ignore[no-any-return]
        for name in _PROJECTIONS:
            if not is_plain(getattr(ffn, name)):
                raise PatchConflict(
                    f"adaptive: TokenRouting reads slices of {name!r}, which someone wrapped or "
                    "hooked since patch(); unpatch() first"
                )
        gate, up = (self._slice(getattr(ffn, name), x) for name in _PROJECTIONS[:2])
        down = ffn.down_proj
        return _multiply(down, ffn.act_fn(gate) * up, down.weight[:, : self.neurons], down.bias)

    def _slice(self, linear: nn.Linear, x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias[: self.neurons]
        return _multiply(linear, x, linear.weight[: self.neurons], bias)


def _multiply(linear: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with a slice, natively where that of the whole layer would be."""
    native = "forward" in linear.__dict__ and not torch.compiler.is_compiling()
    out = fast_linear(x, weight, bias) if native else None
    return F.linear(x, weight, bias) if out is None else out


def problems(root: nn.Module, survey: Survey, policy: TokenRouting) -> list[str]:
    """Why FFNs of the model cannot compute with some of their neurons; the first reason."""
    if not survey.layers:
        return ["TokenRouting does not fit: it needs a decoder of transformers"]
    for layer in policy.shares(len(survey.layers)):
        if layer >= len(survey.layers):
            continue  # the policy's plan says that better
        name = ffn_name(survey, layer)
        ffn = None if name is None else root.get_submodule(name)
        if ffn is None or not _is_gated(ffn):
            kind = "no FFN" if ffn is None else f"an FFN, {type(ffn).__name__},"
            return [
                f"TokenRouting does not fit: layer {layer} has {kind} that is no "
                "down_proj(act_fn(gate_proj(x)) * up_proj(x)) of plain linear layers"
            ]
    return []


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give the FFNs of the routed layers a PrefixForward, undoably."""
    for policy in record.policies:
        if not isinstance(policy, TokenRouting):
            continue
        for layer, share in policy.shares(len(survey.layers)).items():
            name = ffn_name(survey, layer)
            assert name is not None  # or it would have been refused
            ffn: Any = root.get_submodule(name)
            neurons = neurons_of(share, ffn.up_proj.weight.shape[0])
            record.log.set(root, name, "forward", PrefixForward(ffn, record.switch, neurons))


def ffn_name(survey: Survey, layer: int) -> str | None:
    """Dotted name of the FFN of a layer; None if it has none that is known."""
    start = survey.layers[layer] + "."
    return next((name for name in survey.mlps if name.startswith(start)), None)


def _is_gated(ffn: Any) -> bool:
    if not all(is_plain(getattr(ffn, name, None)) for name in _PROJECTIONS):
        return False
    if "forward" in ffn.__dict__ or not callable(getattr(ffn, "act_fn", None)):
        return False
    try:
        return _FORWARD.search(inspect.getsource(type(ffn).forward)) is not None
    except (OSError, TypeError):
        return False  # defined where there is no source to read
