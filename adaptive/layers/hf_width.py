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
from adaptive.layers.hf_prefix_rows import fast_prefix
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.layers.switch import Switch
from adaptive.layers.token_audit import sampled
from adaptive.layers.width_choice import WidthPass, chosen_neurons
from adaptive.layers.width_log import WidthLog
from adaptive.ops import prefix_ffn, recorded
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

    def __init__(
        self,
        ffn: nn.Module,
        switch: Switch,
        layer: int,
        share: float,
        policy: TokenRouting,
    ) -> None:
        """Know the FFN, whose parts are read anew in every call, and how many neurons compute.

        Args:
            ffn: The module.
            switch: Of the patch.
            layer: Whose FFN it is.
            share: Of the neurons that compute, where the policy has no router.
            policy: What decides.
        """
        self._ffn = weakref.ref(ffn)
        self.switch, self.layer, self.share, self.policy = switch, layer, share, policy

    @property
    def now(self) -> WidthPass:
        """What is known of the pass now running."""
        assert self.switch.width_pass is not None  # install made it
        return self.switch.width_pass

    def __getstate__(self) -> tuple[Any, ...]:
        """Let copies and pickles arrive with the copy of the FFN."""
        return self._ffn(), self.switch, self.layer, self.share, self.policy

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the FFN would if each token had only its first neurons. Differentiable."""
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
        return self._prefix(ffn, x) if self.policy.router is None else self._routed(ffn, x)

    def _prefix(self, ffn: Any, x: Tensor) -> Tensor:
        """The same neurons for all tokens."""
        neurons = neurons_of(self.share, int(ffn.up_proj.weight.shape[0]))  # a trace has no number
        made = _narrow(ffn, x, neurons)
        if not torch.compiler.is_compiling() and not recorded():
            real = self.now.real(x)
            tokens = x.shape[:-1].numel() if real is None else int(real.sum())
            self._count(ffn, x, made, real, {neurons: tokens})
        return made

    def _routed(self, ffn: Any, x: Tensor) -> Tensor:
        """Each token with neurons of its own.

        Raises:
            NotImplementedError: torch.compile or torch.jit.trace is at work: how many tokens share
                a width is data.
        """
        if torch.compiler.is_compiling() or self.now.in_graph or torch._C._is_tracing():
            raise NotImplementedError(
                "adaptive: TokenRouting(router=...) cannot run under torch.compile or "
                "torch.jit.trace"
            )
        total, rows, real = ffn.up_proj.weight.shape[0], x.flatten(0, -2), self.now.real(x)
        neurons = chosen_neurons(self.policy, self.layer, rows, real, total, self.now)
        if isinstance(neurons, int):  # of one token
            made = _narrow(ffn, x, neurons)
            self._count(ffn, x, made, real, {neurons: 1})
            return made
        if bool((neurons == total).all()):
            made = type(ffn).forward(ffn, x)
        else:
            made = _own_widths(ffn, rows, neurons)
            made = made.view(*x.shape[:-1], made.shape[1])
        counted = neurons if real is None else neurons[real]
        widths, many = counted.unique(return_counts=True)
        tokens = dict(zip(widths.tolist(), many.tolist(), strict=True))
        self._count(ffn, x, made, real, tokens)
        return made

    def _count(
        self, ffn: Any, x: Tensor, made: Tensor, real: Tensor | None, tokens: dict[int, int]
    ) -> None:
        """Count a call, and audit it if it is its turn."""
        log: WidthLog | None = self.switch.widths
        every = self.policy.audit_every
        if log is None:
            return
        counters = log.of(self.layer)
        counters.count(tokens, ffn.up_proj.weight.shape[0])
        if every is None or (counters.calls - 1) % every or ffn.training:  # dropout would differ
            return
        rows = x.detach().flatten(0, -2)
        places = torch.arange(len(rows), device=x.device)
        places = sampled(places if real is None else places[real])
        if len(places):
            with torch.no_grad():
                dense = type(ffn).forward(ffn, rows[places])
            counters.audit.compare(made.detach().flatten(0, -2)[places], dense)


def _own_widths(ffn: Any, rows: Tensor, neurons: Tensor) -> Tensor:
    """What the FFN would return if each row had only its own first neurons."""
    gate, up, down = (getattr(ffn, name) for name in _PROJECTIONS)
    native = "forward" in up.__dict__
    made = fast_prefix(ffn, rows, neurons) if native else None
    if made is not None:
        return made
    return prefix_ffn(
        rows,
        neurons,
        gate.weight,
        up.weight,
        down.weight,
        ffn.act_fn,
        (gate.bias, up.bias, down.bias),
        _native_linear if native else F.linear,
    )


def _narrow(ffn: Any, x: Tensor, neurons: int) -> Tensor:
    """What the FFN would return if it had only its first neurons; zeros if it had none."""
    down: nn.Linear = ffn.down_proj
    if not neurons:
        return x.new_zeros(*x.shape[:-1], down.weight.shape[0])
    if neurons == down.weight.shape[1]:
        return type(ffn).forward(ffn, x)  # type: ignore[no-any-return]
    gate, up = (_slice(getattr(ffn, name), x, neurons) for name in _PROJECTIONS[:2])
    return _multiply(down, ffn.act_fn(gate) * up, down.weight[:, :neurons], down.bias)


def _slice(linear: nn.Linear, x: Tensor, neurons: int) -> Tensor:
    bias = None if linear.bias is None else linear.bias[:neurons]
    return _multiply(linear, x, linear.weight[:neurons], bias)


def _multiply(linear: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with a slice, natively where that of the whole layer would be."""
    native = "forward" in linear.__dict__ and not torch.compiler.is_compiling()
    return _native_linear(x, weight, bias) if native else F.linear(x, weight, bias)


def _native_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = fast_linear(x, weight, bias)
    return F.linear(x, weight, bias) if out is None else out


def problems(root: nn.Module, survey: Survey, policy: TokenRouting) -> list[str]:
    """Why FFNs of the model cannot compute with some of their neurons; the first reason.

    Raises:
        ValueError: The router is for states of another width.
    """
    if not survey.layers:
        return ["TokenRouting does not fit: it needs a decoder of transformers"]
    for layer in policy.shares(len(survey.layers)):
        if layer >= len(survey.layers):
            continue  # the policy's plan says that better
        ffn = gated_ffn(root, survey, layer)
        if isinstance(ffn, str):
            return [f"TokenRouting does not fit: {ffn}"]
        width = ffn.up_proj.in_features
        if policy.router is not None and policy.router.width != width:
            raise ValueError(
                f"adaptive: TokenRouting.router must be for states of width {width}, "
                f"got {policy.router.width}"
            )
    return []


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give the FFNs of the routed layers a PrefixForward, undoably."""
    for policy in record.policies:
        if not isinstance(policy, TokenRouting):
            continue
        record.switch.width_pass, record.switch.widths = WidthPass(), WidthLog()
        for layer, share in policy.shares(len(survey.layers)).items():
            name = ffn_name(survey, layer)
            assert name is not None  # or it would have been refused
            ffn = root.get_submodule(name)
            forward = PrefixForward(ffn, record.switch, layer, share, policy)
            record.log.set(root, name, "forward", forward)


def gated_ffn(root: nn.Module, survey: Survey, layer: int) -> Any:
    """The layer's FFN, or why it is none of which a part can run."""
    name = ffn_name(survey, layer)
    ffn = None if name is None else root.get_submodule(name)
    if ffn is not None and is_gated(ffn):
        return ffn
    kind = "no FFN" if ffn is None else f"an FFN, {type(ffn).__name__},"
    return (
        f"layer {layer} has {kind} that is no down_proj(act_fn(gate_proj(x)) * up_proj(x)) of "
        "plain linear layers"
    )


def ffn_name(survey: Survey, layer: int) -> str | None:
    """Dotted name of the FFN of a layer; None if it has none that is known."""
    start = survey.layers[layer] + "."
    return next((name for name in survey.mlps if name.startswith(start)), None)


def is_gated(ffn: Any) -> bool:
    """Whether this is a gated FFN of plain linear layers that nobody wrapped or watches."""
    if not all(is_plain(getattr(ffn, name, None)) for name in _PROJECTIONS):
        return False
    if "forward" in ffn.__dict__ or not callable(getattr(ffn, "act_fn", None)):
        return False
    try:
        return _FORWARD.search(inspect.getsource(type(ffn).forward)) is not None
    except (OSError, TypeError):
        return False  # defined where there is no source to read
