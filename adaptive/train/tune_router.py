"""tune_router(model, batches): learns which sequences or tokens need which layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.policy import MixtureOfDepths, RouterWeights, TokenRouting
from adaptive.policy._fields import is_share
from adaptive.policy.mixture_of_depths import DECODES, UNITS
from adaptive.policy.router_predictor import PARTS, RouterPredictor
from adaptive.progress import ProgressBar
from adaptive.train._batch import Batch, read_batches
from adaptive.train._checks import causal_lm
from adaptive.train._learning import (
    check_number,
    check_rate,
    check_steps,
    check_strength,
    descend,
    next_token_loss,
)
from adaptive.train._routers import (
    Gates,
    gated,
    modules_of,
    new_predictor,
    routed_layers,
    step_of,
)

PREDICTOR_RATE = 1e-2
"""Adam's learning rate of the predictors: a loss of their own, whatever the model's width."""


@dataclass(frozen=True, kw_only=True)
class RouterTuning:
    """Routers that have learned. Prints as a few lines; `to_dict` is JSON.

    Attributes:
        policy: For `adaptive.patch`.
        model: Class of the model.
        steps: That were trained.
        seconds: In them.
        losses: Of each step: cross entropy in nats per token, or what an encoder learns from.
        accuracies: Share of tokens of each step that the predictors guessed right; () without.
        shares: Share of sequences or tokens that ran, or of neurons that they used, of each step,
            over the routed layers.
        settings: The arguments, as given.
    """

    policy: MixtureOfDepths | TokenRouting
    model: str
    steps: int
    seconds: float
    losses: tuple[float, ...]
    shares: tuple[float, ...]
    settings: dict[str, Any]
    accuracies: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {**values, "policy": self.policy.to_dict()}

    def __str__(self) -> str:
        """Return speed, settings, and the first and last loss and share."""
        guessed = f", predicted {self.accuracies[-1]:.0%} right" if self.accuracies else ""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{self.model}: {self.steps} steps in {self.seconds:.1f} s\n  {settings}\n"
            f"  loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}, "
            f"ran {self.shares[0]:.0%} -> {self.shares[-1]:.0%}{guessed}"
        )


def tune_router(  # noqa: PLR0913
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    steps: int,
    layers: Sequence[int] | None = None,
    unit: str = "attention",
    decide: str = "sequence",
    target: float = 0.5,
    capacity: float | None = None,
    predictor_width: int = 16,
    strength: float = 1.0,
    learning_rate: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RouterTuning:
    """Train routers for `adaptive.MixtureOfDepths`; the model's weights stay as they are.

    Router-Tuning (He et al. 2024, arXiv:2410.13184): the loss is the cross entropy of the next
    token, and ``strength`` times what the share that runs exceeds the ``target``. Decisions are
    hard from the start; gradients pass through them straight to the scores. While routers learn,
    every unit runs in full for all, since its gradient says whether it was needed: nothing is saved
    before `patch` runs the policy.

    Tokens of a sequence see the keys of all others while routers learn. So for tokens the policy
    keeps them, ``kv="kept"``, unless MLPs are routed, which have none.

    With a ``capacity`` the best share of each sequence's tokens runs instead, and a predictor
    learns beside each router which tokens these are: a small MLP on the same states, which get no
    gradient from it (Raposo et al. 2024, arXiv:2404.02258). The policy decodes by it.

    Args:
        model: A causal LM of transformers of a known family, not patched, bare or inside PEFT.
        batches: As many as ``steps``: token ids ``[batch, tokens]``, or mappings with "input_ids"
            and, if wanted, "attention_mask" and "labels" of that shape.
        steps: Of the optimiser, Adam.
        layers: That get a router, ascending; None: the deeper half of the layers but the last,
            and but those that the policy must always run.
        unit: "attention", "mlp" or "block".
        decide: "sequence" or "token".
        target: Share that is to run, in [0, 1); without meaning beside a capacity.
        capacity: Share of each sequence's tokens that runs, above 0 and at most 1, for "token".
        predictor_width: Hidden units of a predictor.
        strength: What a share above the target costs, in nats.
        learning_rate: None: a logit moves by about 0.05 a step.
        seed: Of the random routers that learning starts from.
        progress: Whether to show a bar, if stderr is a terminal, after two seconds.

    Returns:
        The policy with the routers, and how they came to be.

    Raises:
        UnknownFamily, UnsupportedModel: The model is no causal LM of a known family, or set up in
            a way that cannot be trained here; all by name.
        PatchConflict: It is patched.
        TypeError: An argument or a batch is of the wrong type.
        ValueError: A setting is out of range, a batch does not fit, or there are too few.
        FloatingPointError: A loss is not finite.
    """
    check_steps(steps)
    for name, choice, known in (("unit", unit, UNITS), ("decide", decide, tuple(DECODES))):
        if choice not in known:
            raise ValueError(f"adaptive: {name} must be one of {', '.join(known)}, got {choice!r}")
    check_number("target", target, lambda x: 0 <= x < 1, "be in [0, 1)")
    check_strength(strength)
    check_rate(learning_rate)
    _check_capacity(capacity, decide, predictor_width)
    root, family, _ = causal_lm(model, 0.0)
    names, _ = modules_of(root, family, unit)
    chosen = routed_layers(layers, root, family, unit)
    width: int = root.config.hidden_size  # type: ignore[union-attr, assignment]
    start = RouterWeights.random(chosen, width, seed=seed)
    device = root.get_submodule(names[chosen[0]]).parameters().__next__().device
    weight = torch.tensor(start.weight, device=device, requires_grad=True)
    rate = step_of(width) if learning_rate is None else learning_rate
    gates = Gates(chosen, unit, decide, weight, capacity=capacity)
    groups: list[dict[str, Any]] = [{"params": [weight], "lr": rate}]
    if capacity is not None:
        gates.predictor = new_predictor(len(chosen), width, predictor_width, seed, device)
        groups.append(
            {"params": [part for layer in gates.predictor for part in layer], "lr": PREDICTOR_RATE}
        )
    optimizer = torch.optim.Adam(groups)
    losses, shares, accuracies = [], [], []
    began = perf_counter()
    bar = ProgressBar("tuning routers", steps, progress)
    with gated(root, family, gates), bar, torch.enable_grad():
        for step, batch in enumerate(read_batches(batches, steps, device)):
            loss, share = _losses(root, gates, batch)
            over = functional.relu(share - target) if capacity is None else 0.0
            value = loss + strength * over + sum(guess for guess, _ in gates.guesses)
            descend(optimizer, value, step)
            losses.append(float(loss.detach()))
            shares.append(float(share.detach()))
            if gates.guesses:
                right = torch.stack([right for _, right in gates.guesses])
                accuracies.append(float(right.mean()))
            bar.step(f"loss {losses[-1]:.3f}, {shares[-1]:.0%} run")
    rows = tuple(map(tuple, weight.detach().cpu().tolist()))
    policy = MixtureOfDepths(
        router=RouterWeights(layers=chosen, weight=rows, predictor=_predictor(gates)),
        unit=unit,
        decide=decide,
        capacity=capacity,
        decode=None if capacity is None else "predictor",
        kv="kept" if decide == "token" and unit != "mlp" else "dropped",
    )
    return RouterTuning(
        policy=policy,
        model=type(root).__name__,
        steps=steps,
        seconds=perf_counter() - began,
        losses=tuple(losses),
        shares=tuple(shares),
        settings={
            **({"target": target, "strength": strength} if capacity is None else {}),
            **({} if capacity is None else {"capacity": capacity, "predictor": predictor_width}),
            "learning_rate": rate,
            "seed": seed,
        },
        accuracies=tuple(accuracies),
    )


def _predictor(gates: Gates) -> RouterPredictor | None:
    if gates.predictor is None:
        return None
    named = [dict(zip(PARTS, weights, strict=True)) for weights in gates.predictor]
    return RouterPredictor.from_tensors(named)


def _losses(root: nn.Module, gates: Gates, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of one batch, and the share that ran."""
    gates.shares.clear()
    gates.guesses.clear()
    gates.mask = batch.inputs.get("attention_mask")
    loss = next_token_loss(root, batch)
    return loss, torch.stack(gates.shares).mean()


def _check_capacity(capacity: object, decide: str, hidden: object) -> None:
    if capacity is not None and decide != "token":
        raise ValueError(f"adaptive: capacity must be None with decide={decide!r}, got {capacity}")
    if capacity is not None and not is_share(capacity):
        raise ValueError(f"adaptive: capacity must be above 0 and at most 1, got {capacity!r}")
    if type(hidden) is not int or hidden < 1:
        raise ValueError(
            f"adaptive: predictor_width must be a whole number from 1 on, got {hidden!r}"
        )
