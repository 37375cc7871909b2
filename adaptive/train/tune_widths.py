"""tune_widths(model, batches): learns how much of each FFN which tokens need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.layers.autocast import in_own_dtype
from adaptive.layers.feed_forward import FeedForward
from adaptive.policy import TokenRouting, WidthRouter
from adaptive.policy.token_routing import neurons_of
from adaptive.progress import ProgressBar
from adaptive.train._ffns import Ffns
from adaptive.train._learning import (
    check_number,
    check_rate,
    check_steps,
    check_strength,
    descend,
)
from adaptive.train._routers import step_of
from adaptive.train.tune_router import RouterTuning


@dataclass
class _Choices:
    """What FFNs share while their routers learn.

    Attributes:
        layers: That have a router.
        widths: That they choose from.
        weight: ``[layers, choices, width]``, float32, requires gradients.
        bias: ``[layers, choices]``, likewise.
        mask: Which tokens of the pass are not padding, ``[batch, tokens]``; None: all.
        shares: Of each layer in the pass, the share of the neurons that tokens use.
    """

    layers: tuple[int, ...]
    widths: tuple[float, ...]
    weight: Tensor
    bias: Tensor
    mask: Tensor | None = None
    shares: list[Tensor] = field(default_factory=list)

    def start(self, mask: Tensor | None) -> None:
        """Forget the last pass; ``mask`` is that of the next one."""
        self.mask = mask
        self.shares.clear()

    def of(self, layer: int, x: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Which neurons each token of ``x`` uses, ``[batch, tokens, total]``, and whether any.

        1 or 0; the gradient is that of the router's probabilities, a straight-through estimate.
        """
        at = self.layers.index(layer)
        with in_own_dtype(x.device):
            return self._of(at, x, total)

    def _of(self, at: int, x: Tensor, total: int) -> tuple[Tensor, Tensor]:
        odds = functional.linear(x.float(), self.weight[at], self.bias[at]).softmax(-1)
        hard = functional.one_hot(odds.argmax(-1), len(self.widths)).float()
        chosen = hard + (odds - odds.detach())
        neurons = torch.tensor([neurons_of(w, total) for w in self.widths], device=x.device)
        used = (torch.arange(total, device=x.device) < neurons[:, None]).float()
        share = chosen @ (neurons / total)
        real = torch.ones_like(share) if self.mask is None else (self.mask != 0).float()
        self.shares.append((share * real).sum() / real.sum())
        return chosen @ used, (chosen @ (neurons > 0).float())[..., None]


class _MaskedForward:
    """The forward of an FFN while its router learns: in full, and masked."""

    def __init__(self, ffn: FeedForward, layer: int, choices: _Choices) -> None:
        """Know the FFN and its layer, and what decides."""
        self.ffn = ffn
        self.layer, self.choices = layer, choices

    def __call__(self, x: Tensor) -> Tensor:
        """Run the FFN; neurons that a token does not use count nothing."""
        ffn = self.ffn
        hidden = ffn.hidden_of(x)
        used, some = self.choices.of(self.layer, x, hidden.shape[-1])
        weight, bias = ffn.down.weight, ffn.down.bias
        made = ffn.finish(functional.linear(hidden * used.to(hidden.dtype), weight, bias))
        return made if bias is None else made * some.to(made.dtype)


def tune_widths(  # noqa: PLR0913
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    widths: Sequence[float],
    steps: int,
    layers: Sequence[int] | None = None,
    target: float = 0.5,
    strength: float = 1.0,
    learning_rate: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RouterTuning:
    """Train routers for `adaptive.TokenRouting`; the model's weights stay as they are.

    As Duo-LLM trains its routers (Alizadeh et al. 2024, arXiv:2410.10846): the loss is the cross
    entropy of the next token, and ``strength`` times the square of what the share of neurons in use
    is off the ``target``. An encoder, which has no next token, learns as in `tune_experts`.

    Choices are hard from the start; gradients pass through them straight to the probabilities.
    While routers learn, FFNs run in full: nothing is saved before `patch` runs the policy. Whether
    narrow FFNs are any good is a matter of the model's weights, which do not learn here: that takes
    training with `TokenRouting`, whose gradients are right.

    Args:
        model: A causal LM or encoder of transformers whose FFNs are plain linear layers and an
            activation function, not patched, bare or inside PEFT.
        batches: As for `tune_experts`.
        widths: Shares of the neurons to choose from, two or more, ascending; the first may be 0.
        steps: Of the optimiser, Adam.
        layers: That get a router, ascending; None: all.
        target: Share of the neurons of these layers that is to be used, in [0, 1].
        strength: What the square of the difference costs, in nats.
        learning_rate: None: a logit moves by about 0.05 a step.
        seed: Of the random routers that learning starts from.
        progress: Whether to show a bar, if stderr is a terminal, after two seconds.

    Returns:
        The policy with the routers, and how they came to be.

    Raises:
        UnknownFamily, UnsupportedModel, PatchConflict, TypeError: As `tune_router`.
        ValueError: A setting is out of range, a batch does not fit, or there are too few.
        FloatingPointError: A loss is not finite.
    """
    check_steps(steps)
    check_number("target", target, lambda x: 0 <= x <= 1, "be in [0, 1]")
    check_strength(strength)
    check_rate(learning_rate)
    every = Ffns.of(model)
    chosen = tuple(range(every.total)) if layers is None else tuple(layers)
    width: int = every.root.config.hidden_size  # type: ignore[union-attr, assignment]
    start = WidthRouter.random(chosen, width, choices=max(len(widths), 2), seed=seed)
    untrained = TokenRouting(widths=tuple(widths), layers=chosen, router=start)  # checks them
    ffns = every.at(chosen)
    device = ffns[chosen[0]].down.weight.device
    weight = torch.tensor(start.weight, device=device, requires_grad=True)
    bias = torch.zeros(weight.shape[:2], device=device, requires_grad=True)
    rate = step_of(width) if learning_rate is None else learning_rate
    # A bias moves a logit by its own step; all weights together by that of all.
    groups: list[dict[str, Any]] = [
        {"params": [weight]},
        {"params": [bias], "lr": rate * 0.05 / step_of(width)},
    ]
    optimizer = torch.optim.Adam(groups, lr=rate)
    choices = _Choices(chosen, untrained.choices, weight, bias)
    losses, shares = [], []
    began = perf_counter()
    forwards = {i: _MaskedForward(ffn, i, choices) for i, ffn in ffns.items()}
    with ProgressBar("tuning widths", steps, progress) as bar, torch.enable_grad():
        for step, (batch, mask) in enumerate(every.read(batches, steps, device)):
            choices.start(mask)
            loss = every.loss(batch, ffns, forwards)
            share = torch.stack(choices.shares).mean()
            value = loss + strength * (share - target).square()
            descend(optimizer, value, step)
            losses.append(float(loss.detach()))
            shares.append(float(share.detach()))
            bar.step(f"loss {losses[-1]:.3f}, {shares[-1]:.0%} in use")
    learned, biases = (
        dict(zip(chosen, part.detach().cpu(), strict=True)) for part in (weight, bias)
    )
    return RouterTuning(
        policy=TokenRouting(
            widths=untrained.choices, router=WidthRouter.from_tensors(learned, biases)
        ),
        model=type(every.root).__name__,
        steps=steps,
        seconds=perf_counter() - began,
        losses=tuple(losses),
        shares=tuple(shares),
        settings={"target": target, "strength": strength, "learning_rate": rate, "seed": seed},
    )
