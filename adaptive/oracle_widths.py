"""oracle_widths(model, ids): which width each token needs in each layer, by trying them all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.layers.evaluating import evaluating
from adaptive.layers.state import RECORD
from adaptive.patch import patch
from adaptive.policy import TokenRouting, WidthRouter
from adaptive.policy._fields import is_share
from adaptive.policy.token_routing import neurons_of
from adaptive.progress import ProgressBar

_AXES = 2
_LEAST_TOKENS = 2
_HALVINGS = 60
"""Of the interval that the price of neurons lies in."""


@dataclass(frozen=True, kw_only=True)
class WidthOracle:
    """What widths could do for given tokens, if a router knew their losses. Prints as a few lines.

    Attributes:
        widths: That tokens chose from.
        layers: That have them.
        choices: Of each layer and token, ``[layers, batch, tokens]``, int64, from 0.
        share: Of the neurons of these layers, that the tokens' choices use.
        loss: Mean loss in nats of the model in which every token goes its own way.
        foreseen: The same, as found where all tokens of a sequence went the same way.
        dense_loss: Mean loss of the whole model.
        fixed: The best pattern of all tokens within the budget, a choice per layer.
        fixed_loss: Its mean loss.
        patterns: How many patterns were tried.
    """

    widths: tuple[float, ...]
    layers: tuple[int, ...]
    choices: Tensor = field(repr=False, compare=False)
    share: float
    loss: float
    foreseen: float
    dense_loss: float
    fixed: tuple[int, ...]
    fixed_loss: float
    patterns: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: all but the choices."""
        values = {**self.__dict__}
        del values["choices"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def __str__(self) -> str:
        """Return the losses beside each other."""
        return (
            f"widths {self.widths} in {len(self.layers)} layers, {self.patterns} patterns tried\n"
            f"  whole: loss {self.dense_loss:.3f}\n"
            f"  a width for each token, {self.share:.1%} of the neurons: loss {self.loss:.3f} "
            f"({self.foreseen:.3f} foreseen)\n"
            f"  the same for all tokens, {self.fixed}: loss {self.fixed_loss:.3f}"
        )


@torch.no_grad()
def oracle_widths(
    model: nn.Module,
    ids: Tensor,
    *,
    widths: Sequence[float],
    budget: float,
    layers: Sequence[int] | None = None,
    patterns: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> WidthOracle:
    """Find the width of every token in every layer with the least loss at a budget of neurons.

    The oracle of Duo-LLM (Alizadeh et al. 2024, arXiv:2410.10846), an analysis: it knows the next
    tokens, and says what a router could reach, not how. Every pattern, a choice per layer, is run
    for all tokens at once; then each token takes the pattern with the least sum of its own loss and
    a price of its neurons, which is set so that the budget is met. Because tokens read each other's
    keys, that is no lower bound; the model is run again with the choices mixed, and that loss
    reported. The model is left as it was.

    Args:
        model: As for `adaptive.patch` with `TokenRouting`.
        ids: Token ids, ``[batch, tokens]``; all count as tokens.
        widths: Shares to choose from, as for `TokenRouting` with a router.
        budget: Share of the neurons of these layers that tokens may use on average.
        layers: Layers that have a choice, ascending; None: all.
        patterns: How many to try at most; if there are more, random ones are drawn, and those that
            are the same in all layers.
        seed: Of these.
        progress: Whether to show a bar, if stderr is a terminal, after two seconds.

    Raises:
        ValueError: An argument is out of range, or no pattern that was tried meets the budget.
        TypeError: ``ids`` does not hold whole numbers.
        UnknownFamily, UnsupportedModel, PatchConflict: As `adaptive.patch`.
    """
    _check(ids, budget, patterns)
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = tuple(range(config.num_hidden_layers)) if layers is None else tuple(layers)
    router = WidthRouter.random(chosen, config.hidden_size, choices=max(len(widths), 2))
    policy = TokenRouting(widths=tuple(widths), layers=chosen, router=router, audit_every=None)
    tried = _patterns(len(policy.choices), len(chosen), patterns, seed)
    bar = ProgressBar("trying widths", len(tried), progress)
    with patch(model, policy) as patched, evaluating(model), bar:
        run = _Run(model, ids, chosen, patched._root.__dict__[RECORD].switch.width_pass)
        with patched.disabled():
            dense = run.losses()
        table = []
        for pattern in tried:
            table.append(run.of_pattern(pattern))
            bar.step()
        costs = _costs(policy, tried, run.neurons(patched._root))
        losses = torch.stack(table)  # [patterns, batch, tokens - 1]
        picked = _pick(losses, costs, budget)
        choices = torch.zeros(len(chosen), *ids.shape, dtype=torch.int64)
        choices[..., :-1] = tried.T[:, picked]
        mixed = run.of_choices(choices)
    means = losses.flatten(1).mean(1).masked_fill(costs > budget, torch.inf)
    return WidthOracle(
        widths=policy.choices,
        layers=chosen,
        choices=choices,
        share=float(costs[picked].mean()),
        loss=float(mixed.mean()),
        foreseen=float(losses.gather(0, picked[None])[0].mean()),
        dense_loss=float(dense.mean()),
        fixed=tuple(tried[means.argmin()].tolist()),
        fixed_loss=float(means.min()),
        patterns=len(tried),
    )


class _Run:
    """Passes of the model on the tokens."""

    def __init__(self, model: Any, ids: Tensor, layers: Sequence[int], now: Any) -> None:
        """Know what is run, and where choices are put."""
        self.model, self.ids, self.layers, self.now = model, ids, layers, now

    def losses(self) -> Tensor:
        """Loss of each next token, ``[batch, tokens - 1]``, float32, on the CPU."""
        logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1].float()
        found = functional.cross_entropy(logits.transpose(1, 2), self.ids[:, 1:], reduction="none")
        return found.cpu()

    def of_pattern(self, pattern: Tensor) -> Tensor:
        """The same where all tokens go the way of ``pattern``, ``[layers]``."""
        return self.of_choices(pattern[:, None, None].expand(-1, *self.ids.shape))

    def of_choices(self, choices: Tensor) -> Tensor:
        """The same where each token goes its own way, ``[layers, batch, tokens]``."""
        try:
            self.now.forced = dict(zip(self.layers, choices.flatten(1), strict=True))
            return self.losses()
        finally:
            self.now.forced = None

    def neurons(self, root: nn.Module) -> list[int]:
        """Neurons of the FFN of each layer."""
        return [n for _, n in sorted(_sizes(root).items())]


def _sizes(root: nn.Module) -> dict[int, int]:
    """Neurons of each FFN that has a choice, by layer."""
    from adaptive.layers.hf_width import PrefixForward

    found = {}
    for module in root.modules():
        forward: Any = module.__dict__.get("forward")
        if isinstance(forward, PrefixForward):
            found[forward.layer] = forward.ffn.neurons
    return found


def _patterns(choices: int, layers: int, most: int, seed: int) -> Tensor:
    """Patterns to try, ``[patterns, layers]``, int64, no two alike."""
    if choices**layers <= most:
        return torch.tensor(list(itertools.product(range(choices), repeat=layers)))
    rng = torch.Generator().manual_seed(seed)
    same = torch.arange(choices)[:, None].expand(-1, layers)
    shares = torch.rand(max(most - choices, 0), choices, generator=rng).square() + 1e-6
    drawn = [torch.multinomial(p, layers, replacement=True, generator=rng) for p in shares]
    every: Tensor = torch.cat([same, *(one[None] for one in drawn)]).unique(dim=0)
    return every


def _costs(policy: TokenRouting, tried: Tensor, totals: Sequence[int]) -> Tensor:
    """Share of the neurons that each pattern uses, ``[patterns]``, float64."""
    used = [[neurons_of(share, total) for share in policy.choices] for total in totals]
    table = torch.tensor(used, dtype=torch.float64)  # [layers, choices]
    shares: Tensor = table.gather(1, tried.T).sum(0) / sum(totals)
    return shares


def _pick(losses: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The pattern of each token, ``[batch, tokens - 1]``: least loss, prices meeting the budget.

    Raises:
        ValueError: No pattern is cheap enough.
    """
    if float(costs.min()) > budget:
        raise ValueError(
            "adaptive: budget must be at least the share of the narrowest pattern, "
            f"{float(costs.min()):.4g}, got {budget}"
        )
    order = costs.argsort(stable=True)  # of equal sums the cheapest
    prices, sums = costs[order][:, None, None], losses.double()[order]

    def at(price: float) -> Tensor:
        return order[(sums + price * prices).argmin(0)]

    picked = at(0.0)
    if float(costs[picked].mean()) <= budget:
        return picked
    low, high = 0.0, 1.0
    while float(costs[at(high)].mean()) > budget:
        high *= 2
        if high > 2.0**_HALVINGS:
            return torch.full_like(picked, int(order[0]))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float(costs[at(middle)].mean()) > budget:
            low = middle
        else:
            high = middle
    return at(high)


def _check(ids: object, budget: object, patterns: object) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"adaptive: ids must be a tensor of whole numbers, got {got}")
    if ids.dim() != _AXES or not len(ids) or ids.shape[1] < _LEAST_TOKENS:
        rule = "be [batch, tokens] with 1 row and 2 tokens or more"
        raise ValueError(f"adaptive: ids must {rule}, got {list(ids.shape)}")
    if not is_share(budget) and not (type(budget) in (int, float) and budget == 0):
        raise ValueError(f"adaptive: budget must be a share from 0 to 1, got {budget!r}")
    if type(patterns) is not int or patterns < 1:
        raise ValueError(f"adaptive: patterns must be a whole number from 1 on, got {patterns!r}")
