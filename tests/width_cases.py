"""Routers of widths for tiny models, and the masked dense model that they are held to."""

from types import MethodType

import torch
from models import make

from adaptive import TokenRouting, WidthRouter
from adaptive.policy.token_routing import neurons_of

WIDTHS = (0, 0.34, 0.5, 1)
"""Of 96 neurons: none, 32, 48 and all."""


def router(layers=(0, 1), width=128, choices=4, seed=0):
    """Routers whose choices are all in use."""
    return WidthRouter.random(layers, width, choices=choices, seed=seed)


def always(choice, choices=4, layers=(0, 1), width=128):
    """Routers that choose the same for every token."""
    bias = torch.zeros(choices)
    bias[choice] = 1.0
    weights = {layer: torch.zeros(choices, width) for layer in layers}
    return WidthRouter.from_tensors(weights, dict.fromkeys(layers, bias))


def _forward(self, x):
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    chosen = (x.detach().float() @ self.choices.T + self.biases).argmax(-1)
    neurons = self.sizes[chosen]
    used = torch.arange(hidden.shape[-1]) < neurons[..., None]
    self.seen.append(neurons)
    return self.down_proj(hidden * used)


def masked(case, routers, widths=WIDTHS, **fields):
    """A model that computes all neurons and multiplies those that a token does not use by 0."""
    model = make(case, **fields)
    for at, layer in enumerate(routers.layers):
        mlp = model.model.layers[layer].mlp
        total = mlp.up_proj.weight.shape[0]
        mlp.choices = torch.tensor(routers.weight[at])
        mlp.biases = torch.tensor(routers.bias[at] if routers.bias else 0.0)
        mlp.sizes = torch.tensor([neurons_of(share, total) for share in widths])
        mlp.seen = []
        mlp.forward = MethodType(_forward, mlp)
    return model


def policy(**fields):
    """TokenRouting of two layers among WIDTHS, not audited."""
    return TokenRouting(**{"widths": WIDTHS, "router": router(), "audit_every": None, **fields})
