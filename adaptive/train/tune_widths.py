"""tune_widths(model, batches): learns how much of each FFN which tokens need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.errors import UnsupportedModel
from adaptive.layers.feed_forward import FeedForward, whole_ffn
from adaptive.policy import TokenRouting, WidthRouter
from adaptive.policy.token_routing import neurons_of
from adaptive.progress import ProgressBar
from adaptive.train._batch import Batch, read_batches
from adaptive.train._checks import causal_lm
from adaptive.train._learning import (
    check_last,
    check_number,
    check_rate,
    check_steps,
    check_strength,
    descend,
    next_token_loss,
    still,
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

    def of(self, layer: int, x: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Which neurons each token of ``x`` uses, ``[batch, tokens, total]``, and whether any.

        1 or 0; the gradient is that of the router's probabilities, a straight-through estimate.
        """
        at = self.layers.index(layer)
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
        made: Tensor = ffn.finish(ffn.down(hidden * used.to(hidden.dtype)))
        return made if ffn.down.bias is None else made * some.to(made.dtype)


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
    is off the ``target``. Choices are hard from the start; gradients pass through them straight to
    the probabilities. While routers learn, FFNs run in full: nothing is saved before `patch` runs
    the policy. Whether narrow FFNs are any good is a matter of the model's weights, which do not
    learn here: that takes training with `TokenRouting`, whose gradients are right.

    Args:
        model: A causal LM of transformers whose FFNs are plain linear layers and an activation
            function, not patched, bare or inside PEFT.
        batches: As for `tune_router`.
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
    root, family, total = causal_lm(model, 0.0)
    chosen = tuple(range(total)) if layers is None else tuple(layers)
    width: int = root.config.hidden_size  # type: ignore[union-attr, assignment]
    start = WidthRouter.random(chosen, width, choices=max(len(widths), 2), seed=seed)
    untrained = TokenRouting(widths=tuple(widths), layers=chosen, router=start)  # checks them
    check_last(chosen[-1], total)
    names = family.mlp_names(root)
    ffns = {}
    for i in chosen:
        ffn = whole_ffn(root.get_submodule(names[i])) if i < len(names) else None
        if ffn is None:
            raise UnsupportedModel(f"adaptive: layer {i} has no FFN of plain linear layers")
        ffns[i] = names[i], ffn
    device = ffns[chosen[0]][1].down.weight.device
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
    bar = ProgressBar("tuning widths", steps, progress)
    forwards = {name: _MaskedForward(ffn, i, choices) for i, (name, ffn) in ffns.items()}
    with still(root, forwards), bar, torch.enable_grad():
        for step, batch in enumerate(read_batches(batches, steps, device)):
            loss, share = _losses(root, choices, batch)
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
        model=type(root).__name__,
        steps=steps,
        seconds=perf_counter() - began,
        losses=tuple(losses),
        shares=tuple(shares),
        settings={"target": target, "strength": strength, "learning_rate": rate, "seed": seed},
    )


def _losses(root: nn.Module, choices: _Choices, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of one batch, and the share of the neurons in use."""
    choices.shares.clear()
    choices.mask = batch.inputs.get("attention_mask")
    loss = next_token_loss(root, batch)
    return loss, torch.stack(choices.shares).mean()
