"""tune_heads(model, batches): learns which attention heads a token needs, or a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.adapters import Family
from adaptive.errors import UnsupportedModel
from adaptive.layers.hf_head_routing import why_whole
from adaptive.layers.survey import Site
from adaptive.policy import ExpertRouterWeights, HeadRouting
from adaptive.progress import ProgressBar
from adaptive.train._batch import read_batches
from adaptive.train._checks import causal_lm
from adaptive.train._heads import HeadStatistics, watching
from adaptive.train._learning import check_last, check_number, check_steps

DECIDE = ("token", "layer")


@dataclass(frozen=True, kw_only=True)
class HeadTuning:
    """What heads gave, and the policy made of it. Prints as a few lines; `to_dict` is JSON.

    Attributes:
        policy: For `adaptive.patch`.
        model: Class of the model.
        steps: Batches that were seen.
        tokens: In them, without padding.
        seconds: In them.
        importance: By layer, the mean norm of what each KV head and its query heads add to the
            output of attention.
        explained: By layer, the share of the variance of these norms from token to token, of all
            heads together, that the routers tell beforehand; of the tokens that they learned from.
        settings: The arguments, as given.
    """

    policy: HeadRouting
    model: str
    steps: int
    tokens: int
    seconds: float
    importance: dict[int, tuple[float, ...]]
    explained: dict[int, float]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        values = {**asdict(self), "policy": self.policy.to_dict()}
        for name in ("importance", "explained"):
            values[name] = {str(layer): found for layer, found in values[name].items()}
        return {**values, "importance": {n: [*v] for n, v in values["importance"].items()}}

    def __str__(self) -> str:
        """Return what was seen, settings, and how much routers tell."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        told = ", ".join(f"layer {layer} {share:.0%}" for layer, share in self.explained.items())
        return (
            f"{self.model}: {self.tokens} tokens in {self.seconds:.1f} s\n  {settings}\n"
            f"  told of the heads' norms: {told}"
        )


def tune_heads(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    steps: int,
    top_k: int,
    layers: Sequence[int] | None = None,
    decide: str = "token",
    ridge: float = 1e-3,
    progress: bool = True,
) -> HeadTuning:
    """Fit `adaptive.HeadRouting` to a model, whose weights stay as they are.

    The model runs as it is. Of each token and KV head it is measured how long the vector is that
    the head and its query heads add to the output of attention. A router is the linear function of
    the states before attention that tells these lengths best (least squares with a penalty), so
    there is nothing to descend on and no learning rate.

    Args:
        model: A causal LM of transformers of a known family, not patched, bare or inside PEFT.
        batches: As many as ``steps``, as `tune_router` takes them.
        steps: Batches to see.
        top_k: KV heads that run.
        layers: Where heads are routed, ascending; None: all.
        decide: "token": routers, for each token its own heads; "layer": for all tokens the heads
            that add most on average.
        ridge: Penalty on the routers' weights, as a share of the mean square of the states.
        progress: Whether to show a bar, if stderr is a terminal, after two seconds.

    Returns:
        The policy, and how it came to be.

    Raises:
        UnknownFamily, UnsupportedModel: The model is no causal LM of a known family whose heads can
            be left out; all by name.
        PatchConflict: It is patched.
        TypeError: An argument or a batch is of the wrong type.
        ValueError: A setting is out of range, a batch does not fit, or there are too few.
        FloatingPointError: What a head adds is not finite.
    """
    _check(steps, decide, ridge)
    root, family, total = causal_lm(model, 0.0)
    sites = _sites(root, family, layers, total, top_k)
    found = {site.layer: HeadStatistics(root.get_submodule(site.name), site) for site in sites}
    device = next(root.parameters()).device
    began = perf_counter()
    bar = ProgressBar("tuning heads", steps, progress)
    with watching(root, found), bar, torch.no_grad():
        for batch in read_batches(batches, steps, device):
            mask = batch.inputs.get("attention_mask")
            for statistics in found.values():
                statistics.real = None if mask is None else (mask != 0).flatten()
            root(**batch.inputs, use_cache=False)
            bar.step(f"{next(iter(found.values())).tokens} tokens")
    importance = {}
    for layer, statistics in found.items():
        mean = statistics.mean()
        if not all(map(math.isfinite, mean)):
            raise FloatingPointError(
                f"adaptive: what heads add must be finite, got {list(mean)} in layer {layer}"
            )
        importance[layer] = mean
    fits = {layer: statistics.fit(ridge) for layer, statistics in found.items()}
    if decide == "layer":
        policy = HeadRouting(heads=_best(importance, top_k))
    else:
        router = ExpertRouterWeights.from_tensors(
            {layer: fit.weight for layer, fit in fits.items()},
            {layer: fit.bias for layer, fit in fits.items()},
        )
        policy = HeadRouting(top_k=top_k, router=router)
    return HeadTuning(
        policy=policy,
        model=type(root).__name__,
        steps=steps,
        tokens=next(iter(found.values())).tokens,
        seconds=perf_counter() - began,
        importance=importance,
        explained={layer: fit.explained for layer, fit in fits.items()},
        settings={"top_k": top_k, "decide": decide, "ridge": ridge},
    )


def _best(importance: Mapping[int, Sequence[float]], top_k: int) -> tuple[tuple[int, int], ...]:
    """The heads of each layer that add most, of equal ones the first."""
    pairs = []
    for layer, means in importance.items():
        ranked = sorted(range(len(means)), key=lambda head: (-means[head], head))
        pairs += [(layer, head) for head in ranked[:top_k]]
    return tuple(sorted(pairs))


def _check(steps: int, decide: str, ridge: float) -> None:
    check_steps(steps)
    if decide not in DECIDE:
        raise ValueError(f"adaptive: decide must be one of {', '.join(DECIDE)}, got {decide!r}")
    check_number("ridge", ridge, lambda x: 0 < x < math.inf, "be positive")


def _sites(
    root: nn.Module, family: Family, layers: Sequence[int] | None, total: int, top_k: int
) -> list[Site]:
    """The attention modules of the layers to be routed."""
    wanted = tuple(range(total)) if layers is None else tuple(layers)
    known = bool(wanted) and all(type(layer) is int and layer >= 0 for layer in wanted)
    if not known or list(wanted) != sorted(set(wanted)):
        raise ValueError(
            f"adaptive: layers must be numbers from 0 on, ascending, or None, got {layers!r}"
        )
    check_last(wanted[-1], total)
    from adaptive.layers import hf_model  # which needs transformers, as the model does

    names, given = family.attention_names(root), family.problems(root)
    survey = hf_model.survey(root, family.name, family.base_name(root), names, given)
    if survey.problems:
        raise UnsupportedModel("adaptive: " + "\n".join(survey.problems))
    sites = [site for site in survey.sites if site.layer in wanted]
    for site in sites:
        reason = why_whole(root.get_submodule(site.name), site)
        if reason is not None:
            raise UnsupportedModel(f"adaptive: attention of layer {site.layer} {reason}")
        if type(top_k) is not int or not 1 <= top_k <= site.kv_heads:
            raise ValueError(
                f"adaptive: top_k must be from 1 to the {site.kv_heads} KV heads of layer "
                f"{site.layer}, got {top_k!r}"
            )
    return sites
