"""FFNs of a transformers model that compute with their first neurons only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.layers.feed_forward import FeedForward, feed_forward, ffn_name
from adaptive.layers.hf_linear import fast_linear
from adaptive.layers.hf_prefix_rows import fast_prefix
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.layers.switch import Switch
from adaptive.layers.token_audit import sampled
from adaptive.layers.width_choice import WidthPass, chosen_neurons
from adaptive.layers.width_log import WidthLog
from adaptive.ops import prefix_ffn, recorded
from adaptive.policy.token_routing import TokenRouting, neurons_of


class PrefixForward:
    """The forward of one patched FFN, set on the instance: its first neurons alone."""

    def __init__(
        self,
        ffn: FeedForward,
        switch: Switch,
        layer: int,
        share: float,
        policy: TokenRouting,
    ) -> None:
        """Know the FFN, whose parts are read anew in every call, and how many neurons compute.

        Args:
            ffn: What it is made of.
            switch: Of the patch.
            layer: Whose FFN it is.
            share: Of the neurons that compute, where the policy has no router.
            policy: What decides.
        """
        self.ffn = ffn
        self.switch, self.layer, self.share, self.policy = switch, layer, share, policy

    @property
    def now(self) -> WidthPass:
        """What is known of the pass now running."""
        assert self.switch.width_pass is not None  # install made it
        return self.switch.width_pass

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the FFN would if each token had only its first neurons. Differentiable."""
        if not self.switch.on or not self.ffn.complete:
            return self.ffn.stock(x)
        self.ffn.check("TokenRouting")
        return self._prefix(x) if self.policy.router is None else self._routed(x)

    def _prefix(self, x: Tensor) -> Tensor:
        """The same neurons for all tokens."""
        neurons = neurons_of(self.share, self.ffn.neurons)
        made = _narrow(self.ffn, x, neurons)
        if not torch.compiler.is_compiling() and not recorded():
            real = self.now.real(x)
            tokens = x.shape[:-1].numel() if real is None else int(real.sum())
            self._count(x, made, real, {neurons: tokens})
        return made

    def _routed(self, x: Tensor) -> Tensor:
        """Each token with neurons of its own.

        Raises:
            NotImplementedError: torch.compile or torch.jit.trace is at work: how many tokens share
                a width is data.
        """
        if torch.compiler.is_compiling() or self.switch.in_graph or torch._C._is_tracing():
            raise NotImplementedError(
                "adaptive: TokenRouting(router=...) cannot run under torch.compile or "
                "torch.jit.trace"
            )
        ffn, real = self.ffn, self.now.real(x)
        total, rows = ffn.neurons, x.flatten(0, -2)
        neurons = chosen_neurons(self.policy, self.layer, rows, real, total, self.now)
        if isinstance(neurons, int):  # of one token
            made = _narrow(ffn, x, neurons)
            self._count(x, made, real, {neurons: 1})
            return made
        if bool((neurons == total).all()):
            made = ffn.dense(x)
        else:
            made = _own_widths(ffn, rows, neurons)
            made = made.view(*x.shape[:-1], made.shape[1])
        counted = neurons if real is None else neurons[real]
        widths, many = counted.unique(return_counts=True)
        tokens = dict(zip(widths.tolist(), many.tolist(), strict=True))
        self._count(x, made, real, tokens)
        return made

    def _count(self, x: Tensor, made: Tensor, real: Tensor | None, tokens: dict[int, int]) -> None:
        """Count a call, and audit it if it is its turn."""
        log: WidthLog | None = self.switch.widths
        every = self.policy.audit_every
        if log is None:
            return
        counters = log.of(self.layer)
        counters.count(tokens, self.ffn.neurons)
        training = self.ffn.module.training  # dropout would differ
        if every is None or (counters.calls - 1) % every or training:
            return
        rows = x.detach().flatten(0, -2)
        places = torch.arange(len(rows), device=x.device)
        places = sampled(places if real is None else places[real])
        if len(places):
            with torch.no_grad():
                dense = self.ffn.dense(rows[places])
            counters.audit.compare(made.detach().flatten(0, -2)[places], dense)


def _own_widths(ffn: FeedForward, rows: Tensor, neurons: Tensor) -> Tensor:
    """What the FFN would return if each row had only its own first neurons."""
    made = fast_prefix(ffn, rows, neurons) if ffn.native else None
    if made is None:
        linear = _native_linear if ffn.native else F.linear
        made = prefix_ffn(rows, neurons, *ffn.weights, ffn.activation, ffn.biases, linear)
    return ffn.finish(made)


def _narrow(ffn: FeedForward, x: Tensor, neurons: int) -> Tensor:
    """What the FFN would return if it had only its first neurons; zeros if it had none."""
    if not neurons:
        return x.new_zeros(*x.shape[:-1], ffn.down.weight.shape[0])
    if neurons == ffn.neurons:
        return ffn.dense(x)
    linear = _native_linear if ffn.native else F.linear
    (gate, up, down), (gate_bias, up_bias, down_bias) = ffn.weights, ffn.biases
    first = None if gate is None else linear(x, gate[:neurons], _slice(gate_bias, neurons))
    hidden = ffn.hidden(first, linear(x, up[:neurons], _slice(up_bias, neurons)))
    return ffn.finish(linear(hidden, down[:, :neurons], down_bias))


def _slice(bias: Tensor | None, neurons: int) -> Tensor | None:
    return None if bias is None else bias[:neurons]


def _native_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = fast_linear(x, weight, bias)
    return F.linear(x, weight, bias) if out is None else out


def problems(root: nn.Module, survey: Survey, policy: TokenRouting) -> list[str]:
    """Why FFNs of the model cannot compute with some of their neurons; the first reason.

    Raises:
        ValueError: The router is for states of another width.
    """
    if not survey.layers:
        return ["TokenRouting does not fit: it needs a decoder or encoder of transformers"]
    for layer in policy.shares(len(survey.layers)):
        if layer >= len(survey.layers):
            continue  # the policy's plan says that better
        ffn = feed_forward(root, survey, layer)
        if isinstance(ffn, str):
            return [f"TokenRouting does not fit: {ffn}"]
        width = ffn.width
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
            name, ffn = ffn_name(survey, layer), feed_forward(root, survey, layer)
            assert name is not None  # or it would have been refused
            assert isinstance(ffn, FeedForward)
            forward = PrefixForward(ffn, record.switch, layer, share, policy)
            ffn.replace(root, name, record.log, forward, record.switch)
