"""tune_experts(model, batches): learns which experts of split FFNs a token needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.feed_forward import FeedForward
from adaptive.policy import ExpertRouterWeights, FeedForwardExperts
from adaptive.progress import ProgressBar
from adaptive.train._experts import LearningForward, LearningRouter
from adaptive.train._ffns import Ffns
from adaptive.train._learning import check_rate, check_steps, descend
from adaptive.train._routers import step_of


@dataclass(frozen=True, kw_only=True)
class ExpertTuning:
    """Routers of experts that have learned. Prints as a few lines; `to_dict` is JSON.

    Attributes:
        policy: For `adaptive.patch`.
        model: Class of the model.
        steps: That were trained.
        seconds: In them.
        losses: Of each step: cross entropy in nats per token, or what an encoder learns from.
        settings: The arguments, as given.
    """

    policy: FeedForwardExperts
    model: str
    steps: int
    seconds: float
    losses: tuple[float, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {**asdict(self), "losses": list(self.losses), "policy": self.policy.to_dict()}

    def __str__(self) -> str:
        """Return speed, settings, and the first and last loss."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{self.model}: {self.steps} steps in {self.seconds:.1f} s\n  {settings}\n"
            f"  loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}"
        )


def tune_experts(  # noqa: PLR0913
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    steps: int,
    experts: int = 8,
    top_k: int = 2,
    layers: Sequence[int] | None = None,
    split: str = "clusters",
    scaled: bool = False,
    learning_rate: float | None = None,
    progress: bool = True,
) -> ExpertTuning:
    """Train routers for `adaptive.FeedForwardExperts`; the model's weights stay as they are.

    Routers start as the mean gate of each expert. In a causal LM they learn from the cross entropy
    of the next token; in an encoder from the model's own loss where a batch has labels, and else
    from how far its last hidden states are off those of the whole FFNs: squared errors over squared
    norms, the mean of the tokens without padding.

    The choice is hard from the start; its gradient is that of the softmax of the scores. While
    routers learn every FFN runs in full, since what was not chosen must say whether it would have
    helped: nothing is saved before `patch` runs the policy.

    Args:
        model: A causal LM or encoder of transformers of a known family, not patched, bare or inside
            PEFT.
        batches: As many as ``steps``, as `tune_router` takes them. For an encoder tensors of token
            ids ``[batch, tokens]`` or images, or mappings with what it is called with.
        steps: Of the optimiser, Adam.
        experts: Of each FFN; they must divide its neurons.
        top_k: Experts that each token runs.
        layers: Whose FFNs are split, ascending; None: all.
        split: "clusters" or "cut", as in the policy.
        scaled: Likewise.
        learning_rate: None: a score moves by about 0.05 a step.
        progress: Whether to show a bar, if stderr is a terminal, after two seconds.

    Returns:
        The policy with the routers, and how they came to be.

    Raises:
        UnknownFamily, UnsupportedModel: The model is of no known family whose FFNs can be
            split, or set up in a way that cannot be trained here; all by name.
        PatchConflict: It is patched.
        TypeError: An argument or a batch is of the wrong type.
        ValueError: A setting is out of range, a batch does not fit, or there are too few.
        FloatingPointError: A loss is not finite.
    """
    plain = FeedForwardExperts(
        experts=experts,
        top_k=top_k,
        split=split,
        scaled=scaled,
        layers=None if layers is None else tuple(layers),
    )
    check_steps(steps)
    check_rate(learning_rate)
    every = Ffns.of(model)
    ffns = every.at(tuple(range(every.total)) if plain.layers is None else plain.layers)
    _check_neurons(ffns, experts)
    routers = {layer: LearningRouter.start(ffn, experts, split) for layer, ffn in ffns.items()}
    width = next(iter(routers.values())).weight.shape[1]
    rate = step_of(width) if learning_rate is None else learning_rate
    parameters = [p for router in routers.values() for p in (router.weight, router.bias)]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    factor = experts / top_k if scaled else 1.0
    forwards = {
        layer: LearningForward(ffn, routers[layer], top_k, factor) for layer, ffn in ffns.items()
    }
    losses = []
    began = perf_counter()
    with ProgressBar("tuning experts", steps, progress) as bar, torch.enable_grad():
        for step, (batch, _) in enumerate(every.read(batches, steps, parameters[0].device)):
            loss = every.loss(batch, ffns, forwards)
            descend(optimizer, loss, step)
            losses.append(float(loss.detach()))
            bar.step(f"loss {losses[-1]:.3f}")
    return ExpertTuning(
        policy=_policy(plain, routers),
        model=type(every.root).__name__,
        steps=steps,
        seconds=perf_counter() - began,
        losses=tuple(losses),
        settings={"experts": experts, "top_k": top_k, "split": split, "learning_rate": rate},
    )


def _policy(plain: FeedForwardExperts, routers: Mapping[int, LearningRouter]) -> FeedForwardExperts:
    """The policy with the routers as they are now."""
    orders = {layer: r.order for layer, r in routers.items() if r.order is not None}
    router = ExpertRouterWeights.from_tensors(
        {layer: found.weight for layer, found in routers.items()},
        {layer: found.bias for layer, found in routers.items()},
        orders or None,
    )
    return FeedForwardExperts(
        experts=plain.experts,
        top_k=plain.top_k,
        split=plain.split,
        scaled=plain.scaled,
        router=router,
    )


def _check_neurons(ffns: Mapping[int, FeedForward], experts: int) -> None:
    for layer, ffn in ffns.items():
        if ffn.neurons % experts:
            raise ValueError(
                f"adaptive: experts must divide the {ffn.neurons} neurons of layer {layer}, "
                f"got {experts}"
            )
