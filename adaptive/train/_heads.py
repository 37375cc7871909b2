"""What attention heads add to the output of a layer, and a linear function that tells how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive.layers.evaluating import evaluating
from adaptive.layers.hf_head_routing import query_name
from adaptive.layers.survey import Site


class Fit(NamedTuple):
    """A router.

    Attributes:
        weight: ``[kv_heads, width]``, float32.
        bias: ``[kv_heads]``, float32.
        explained: Share of the variance of all heads together that it tells, of what it was fit to.
    """

    weight: Tensor
    bias: Tensor
    explained: float


class HeadStatistics:
    """Sums over the tokens of one layer, in float64: enough for means and for least squares.

    Attributes:
        site: The attention module.
        real: Which tokens of the pass now running are no padding, ``[batch * tokens]``; None: all.
        tokens: Seen so far.
    """

    def __init__(self, attention: Any, site: Site) -> None:
        """Start with nothing seen."""
        self.site, self.tokens = site, 0
        self.real: Tensor | None = None
        query = getattr(attention, query_name(attention))
        width, output = query.weight.shape[1], attention.o_proj.weight.detach().float()
        self._group = site.heads // site.kv_heads * site.head_dim
        parts = output.split(self._group, 1)
        self._gram = torch.stack([part.T @ part for part in parts])
        kind = {"dtype": torch.float64, "device": output.device}
        self._states = torch.zeros(width, **kind)
        self._norms = torch.zeros(site.kv_heads, **kind)
        self._squares = torch.zeros(site.kv_heads, **kind)
        self._moments = torch.zeros(width, width, **kind)
        self._cross = torch.zeros(width, site.kv_heads, **kind)
        self._read: Tensor | None = None

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """See what the query projection reads."""
        self._read = args[0].detach().flatten(0, -2)

    def after(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """See what the output projection reads, and add up."""
        assert self._read is not None  # queries come first
        states, given = self._read, args[0].detach().flatten(0, -2)
        self._read = None
        if self.real is not None:
            states, given = states[self.real], given[self.real]
        states = states.double()
        parts = given.float().view(len(given), -1, self._group).transpose(0, 1)
        squares = ((parts @ self._gram) * parts).sum(2).T  # of W a: a' W' W a
        norms = squares.clamp(min=0).sqrt().double()
        self.tokens += len(states)
        self._states += states.sum(0)
        self._norms += norms.sum(0)
        self._squares += norms.square().sum(0)
        self._moments += states.T @ states
        self._cross += states.T @ norms

    def mean(self) -> tuple[float, ...]:
        """Mean norm of what each KV head adds."""
        return tuple((self._norms / max(self.tokens, 1)).tolist())

    def fit(self, ridge: float) -> Fit:
        """Least squares: norms from states, with a penalty of ``ridge`` times their variance."""
        many = max(self.tokens, 1)
        state, norm = self._states / many, self._norms / many
        moments = self._moments / many - torch.outer(state, state)
        cross = self._cross / many - torch.outer(state, norm)
        penalty = ridge * moments.diagonal().mean().clamp(min=1e-12)
        weight = torch.linalg.solve(moments + penalty * torch.eye(len(state)).to(moments), cross)
        variance = (self._squares / many - norm.square()).sum()
        left = variance - 2 * (weight * cross).sum() + (weight * (moments @ weight)).sum()
        explained = 1 - float(left / variance) if float(variance) > 0 else 0.0
        return Fit(weight.T.float(), (norm - state @ weight).float(), explained)


@contextmanager
def watching(root: nn.Module, found: Mapping[int, HeadStatistics]) -> Iterator[None]:
    """Run the model in evaluation mode, and let the statistics see their layers."""
    with evaluating(root), ExitStack() as hooks:
        for statistics in found.values():
            attention: Any = root.get_submodule(statistics.site.name)
            query = getattr(attention, query_name(attention))
            hooks.enter_context(query.register_forward_pre_hook(statistics.before))
            hooks.enter_context(attention.o_proj.register_forward_pre_hook(statistics.after))
        yield
