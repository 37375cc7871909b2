"""FFNs of encoders in full, with the neurons that a token does not run at 0; by hand."""

import copy

import torch
from torch.nn import functional as F

import adaptive


def halves(layer):
    """The module of a layer whose forward is replaced, and weights of its FFN as they are named."""
    if hasattr(layer, "intermediate"):
        seat, up = layer.output.dense, layer.intermediate.dense
        return seat, None, up, seat, layer.intermediate.intermediate_act_fn
    mlp = getattr(layer, "mlp", None) or layer.ffn
    if hasattr(mlp, "Wi"):
        neurons = mlp.Wo.in_features
        first = mlp.Wi.weight[:neurons], None
        return mlp, first, (mlp.Wi.weight[neurons:], None), mlp.Wo, mlp.act
    names = ("lin1", "lin2"), ("fc1", "fc2"), ("up_proj", "down_proj")
    first, last = next(pair for pair in names if hasattr(mlp, pair[0]))
    acts = "activation", "activation_fn", "act_fn"
    act = next(getattr(mlp, name) for name in acts if hasattr(mlp, name))
    return mlp, None, getattr(mlp, first), getattr(mlp, last), act


def _linear(x, part):
    weight, bias = part if isinstance(part, tuple) else (part.weight, part.bias)
    return F.linear(x, weight, bias)


class Masked:
    """The forward of an FFN that computes all neurons and multiplies some by 0."""

    def __init__(self, layer, runs):
        """Take the layer's own weights, and which neurons run of the scores that they give."""
        self.seat, self.gate, self.up, self.down, self.act = halves(layer)
        self.runs = runs

    def __call__(self, x):
        up = _linear(x, self.up)
        read = up if self.gate is None else _linear(x, self.gate)
        hidden = self.act(read) * (1 if self.gate is None else up)
        return F.linear(hidden * self.runs(x, read), self.down.weight, self.down.bias)


class Experts:
    """Which neurons run: those of the experts with the largest mean before the activation."""

    def __init__(self, forward):
        """Take the order of a patched FFN, and nothing else of it."""
        self.experts, self.top_k = forward.policy.experts, forward.policy.top_k
        neurons, order = forward.ffn.neurons, forward.weights.order
        order = torch.arange(neurons) if order is None else order
        self.of = torch.empty(neurons, dtype=torch.long)
        self.of[order] = torch.arange(neurons) // (neurons // self.experts)
        self.chosen = []

    def __call__(self, x, read):
        scores = torch.stack(
            [read[..., self.of == e].mean(-1) for e in range(self.experts)], -1
        ).detach()
        best = scores.topk(self.top_k, -1).indices
        runs = torch.zeros_like(scores).scatter(-1, best, 1.0)
        self.chosen.append(runs)
        return runs[..., self.of]


class First:
    """Which neurons run: the first ones."""

    def __init__(self, neurons):
        """Know how many."""
        self.neurons = neurons

    def __call__(self, x, read):
        return (torch.arange(read.shape[-1]) < self.neurons).to(read.dtype)


def masked(model, names, runs_of):
    """A stock copy of a patched encoder whose FFNs run as ``runs_of(forward)`` says."""
    other = copy.deepcopy(model)
    forwards = [vars(halves(other.get_submodule(name))[0])["forward"] for name in names]
    adaptive.patched(other).unpatch()
    found = []
    for name, forward in zip(names, forwards, strict=True):
        layer = other.get_submodule(name)
        runs = runs_of(forward)
        reference = Masked(layer, runs)
        reference.seat.forward = reference
        if hasattr(layer, "intermediate"):
            layer.intermediate.forward = lambda x: x
        found.append(runs)
    return other, found
