"""tune_router(model, batches): learns which sequences or tokens need which layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.layers.hf_windows import own_windows
from adaptive.policy import MixtureOfDepths, RouterWeights, TokenRouting
from adaptive.policy.mixture_of_depths import DECODES, UNITS, always_run
from adaptive.progress import ProgressBar
from adaptive.train._batch import Batch
from adaptive.train._checks import causal_lm
from adaptive.train._routers import Gates, gated, modules_of, step_of
from adaptive.train.early_exit import _read


@dataclass(frozen=True, kw_only=True)
class RouterTuning:
    """Routers that have learned. Prints as a few lines; `to_dict` is JSON.

    Attributes:
        policy: For `adaptive.patch`.
        model: Class of the model.
        steps: That were trained.
        seconds: In them.
        losses: Cross entropy of each step, in nats per token.
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

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {**values, "policy": self.policy.to_dict()}

    def __str__(self) -> str:
        """Return speed, settings, and the first and last loss and share."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{self.model}: {self.steps} steps in {self.seconds:.1f} s\n  {settings}\n"
            f"  loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}, "
            f"ran {self.shares[0]:.0%} -> {self.shares[-1]:.0%}"
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

    Args:
        model: A causal LM of transformers of a known family, not patched, bare or inside PEFT.
        batches: As many as ``steps``: token ids ``[batch, tokens]``, or mappings with "input_ids"
            and, if wanted, "attention_mask" and "labels" of that shape.
        steps: Of the optimiser, Adam.
        layers: That get a router, ascending; None: the deeper half of the layers but the last,
            and but those that the policy must always run.
        unit: "attention", "mlp" or "block".
        decide: "sequence" or "token".
        target: Share that is to run, in [0, 1).
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
    _check(steps, unit, decide, target, strength, learning_rate)
    root, family, total = causal_lm(model, 0.0)
    names, _ = modules_of(root, family, unit)
    config: Any = root.get_submodule(family.base_name(root)).config
    chosen = _chosen(layers, total, always_run(unit, own_windows(config, total)))
    width: int = root.config.hidden_size  # type: ignore[union-attr, assignment]
    start = RouterWeights.random(chosen, width, seed=seed)
    device = root.get_submodule(names[chosen[0]]).parameters().__next__().device
    weight = torch.tensor(start.weight, device=device, requires_grad=True)
    rate = step_of(width) if learning_rate is None else learning_rate
    optimizer = torch.optim.Adam([weight], lr=rate)
    gates = Gates(chosen, unit, decide, weight)
    losses, shares = [], []
    began = perf_counter()
    bar = ProgressBar("tuning routers", steps, progress)
    with gated(root, family, gates), bar, torch.enable_grad():
        for step, batch in enumerate(_read(batches, steps, device)):
            loss, share = _losses(root, gates, batch)
            over = functional.relu(share - target)
            value = loss + strength * over
            if not math.isfinite(float(value.detach())):
                raise FloatingPointError(
                    f"adaptive: the loss must be finite, got {float(value)} at step {step}"
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            shares.append(float(share.detach()))
            bar.step(f"loss {losses[-1]:.3f}, {shares[-1]:.0%} run")
    rows = tuple(map(tuple, weight.detach().cpu().tolist()))
    policy = MixtureOfDepths(
        router=RouterWeights(layers=chosen, weight=rows),
        unit=unit,
        decide=decide,
        kv="kept" if decide == "token" and unit != "mlp" else "dropped",
    )
    return RouterTuning(
        policy=policy,
        model=type(root).__name__,
        steps=steps,
        seconds=perf_counter() - began,
        losses=tuple(losses),
        shares=tuple(shares),
        settings={"target": target, "strength": strength, "learning_rate": rate, "seed": seed},
    )


def _chosen(layers: Sequence[int] | None, total: int, first: set[int]) -> tuple[int, ...]:
    """The layers that get a router, none of which may be among the ``first``."""
    if layers is None:
        layers = [layer for layer in range(total // 2, total - 1) if layer not in first]
    chosen = tuple(layers)
    whole = all(type(layer) is int for layer in chosen)
    if not chosen or not whole or list(chosen) != sorted(set(chosen)) or chosen[0] < 0:
        raise ValueError(f"adaptive: layers must be ascending numbers from 0 on, got {layers!r}")
    if chosen[-1] >= total:
        raise ValueError(
            f"adaptive: layers must be below the model's {total} layers, got {chosen[-1]}"
        )
    for layer in chosen:
        if layer in first:
            raise ValueError(
                "adaptive: layers must leave out the first layer, and the first with each window, "
                f"which MixtureOfDepths always runs, got {layer}"
            )
    return chosen


def _losses(root: nn.Module, gates: Gates, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of one batch, and the share that ran."""
    gates.shares.clear()
    gates.mask = batch.inputs.get("attention_mask")
    logits = root(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.places]
    loss = functional.cross_entropy(logits.float(), batch.targets)
    return loss, torch.stack(gates.shares).mean()


def _check(
    steps: object, unit: str, decide: str, target: float, strength: float, rate: float | None
) -> None:
    if type(steps) is not int or steps < 1:
        raise ValueError(f"adaptive: steps must be a whole number from 1 on, got {steps!r}")
    for name, value, known in (("unit", unit, UNITS), ("decide", decide, tuple(DECODES))):
        if value not in known:
            raise ValueError(f"adaptive: {name} must be one of {', '.join(known)}, got {value!r}")
    numbers: tuple[tuple[str, object, float, str], ...] = (
        ("target", target, 1.0, "be in [0, 1)"),
        ("strength", strength, math.inf, "be 0 or more"),
        ("learning_rate", 0.0 if rate is None else rate or -1.0, math.inf, "be positive, or None"),
    )
    for name, number, below, rule in numbers:
        known_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not known_number or not 0 <= number < below:  # type: ignore[operator]
            raise ValueError(f"adaptive: {name} must {rule}, got {number!r}")
