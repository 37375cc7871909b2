"""Experts of FFNs while their routers learn: all run, and those count that a hard choice names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.layers.autocast import in_own_dtype
from adaptive.layers.balanced_clusters import balanced_clusters
from adaptive.layers.feed_forward import FeedForward


@dataclass(kw_only=True)
class LearningRouter:
    """The router of one FFN while it learns.

    Attributes:
        order: The neurons, expert by expert; None: as they are.
        of: Expert of each neuron, ``[neurons]``.
        weight: ``[experts, width]``, float32, requires gradients.
        bias: ``[experts]``, likewise.
    """

    order: Tensor | None
    of: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def start(ffn: FeedForward, experts: int, split: str) -> LearningRouter:
        """What learning starts from: the mean gate of each expert."""
        gate, bias = ffn.scored
        neurons = gate.shape[0]
        order = balanced_clusters(gate, experts) if split == "clusters" else None
        at = torch.arange(neurons) if order is None else order
        of = torch.empty(neurons, dtype=torch.long)
        of[at] = torch.arange(neurons) // (neurons // experts)
        of = of.to(gate.device)
        share = experts / neurons
        zeros = torch.zeros(experts, gate.shape[1], device=gate.device)
        weight = zeros.index_add(0, of, gate.detach().float()) * share
        means = torch.zeros(experts, device=gate.device)
        if bias is not None:
            means = means.index_add(0, of, bias.detach().float()) * share
        return LearningRouter(
            order=order, of=of, weight=weight.requires_grad_(), bias=means.requires_grad_()
        )

    def choose(self, states: Tensor, top_k: int) -> Tensor:
        """1 for the experts that run, else 0, ``[..., experts]``.

        The gradient is that of ``top_k`` times the softmax of the scores: a straight-through
        estimate, which reaches experts that were not chosen, too.
        """
        with in_own_dtype(states.device):
            scores = states.float() @ self.weight.T + self.bias
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        runs = torch.zeros_like(scores).scatter(-1, best, 1.0)
        soft = top_k * scores.softmax(-1)
        return runs + soft - soft.detach()


class LearningForward:
    """The forward of an FFN while its router learns."""

    def __init__(self, ffn: FeedForward, router: LearningRouter, top_k: int, factor: float) -> None:
        """Know the FFN, its router, how many experts run, and what their sum is scaled by."""
        self.ffn = ffn
        self.router, self.top_k, self.factor = router, top_k, factor

    def __call__(self, x: Tensor) -> Tensor:
        """Run the whole FFN, and let the neurons of the chosen experts count."""
        runs = self.router.choose(x, self.top_k)[..., self.router.of] * self.factor
        hidden = self.ffn.hidden_of(x)
        down = self.ffn.down
        made = functional.linear(hidden * runs.to(hidden.dtype), down.weight, down.bias)
        return self.ffn.finish(made)
