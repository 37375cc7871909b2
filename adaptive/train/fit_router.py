"""fit_router(model, batches): routers of dense checkpoints, fitted without a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.pooling import pooled
from adaptive.policy import MixtureOfDepths, RouterWeights
from adaptive.policy._fields import is_share
from adaptive.policy.mixture_of_depths import DECODES, UNITS
from adaptive.train._checks import causal_lm
from adaptive.train._layer_changes import watch_layers
from adaptive.train._ridge import fit_ridge
from adaptive.train._routers import routed_layers

LEAST_SAMPLES = 8
"""Sequences or tokens without which nothing can be said about others."""

_LEAST_SPREAD = 1e-6
"""Scores that are nearer to each other, or than a millionth of their spread, are alike."""


@dataclass(frozen=True, kw_only=True)
class RouterFit:
    """Routers that were fitted. Prints as a few lines; `to_dict` is JSON.

    Attributes:
        policy: For `adaptive.patch`.
        model: Class of the model.
        samples: Sequences or tokens that they were fitted to.
        similarity: Of each routed layer the mean cosine, as `layer_similarity`.
        explained: Share of the variance of the cosine that the router predicts for samples that it
            was not fitted to; 0 or less: it tells nothing about them. None: routers were given.
        shares: Of the samples, the share that runs each layer, each predicted by the others.
        settings: The arguments, as given.
    """

    policy: MixtureOfDepths
    model: str
    samples: int
    similarity: tuple[float, ...]
    explained: tuple[float, ...] | None
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
        """Return what each layer changes, what is known of it beforehand, and how often it runs."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [f"{self.model}: routers from {self.samples} samples", f"  {settings}"]
        for at, layer in enumerate(self.policy.routed):
            known = "" if self.explained is None else f", explained {self.explained[at]:.0%}"
            share = f"runs for {self.shares[at]:.0%}"
            lines.append(f"  layer {layer}: cosine {self.similarity[at]:.4f}{known}, {share}")
        return "\n".join(lines)


def fit_router(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    capacity: float = 0.5,
    layers: Sequence[int] | None = None,
    unit: str = "attention",
    decide: str = "sequence",
    per_layer: bool = False,
    router: RouterWeights | None = None,
) -> RouterFit:
    """Fit routers for `adaptive.MixtureOfDepths` to a dense model, without a gradient.

    Each layer's router predicts how much its unit will change what the layer puts out, 1 minus the
    cosine of `layer_similarity`, from what it reads before the unit runs: the mean of a sequence's
    tokens, or each token. It is a ridge regression on the batches, whose penalty is the one under
    which samples are best predicted by the others. Where little change is predicted, the unit is
    skipped. Block Influence (Men et al. 2024, arXiv:2403.03853) and dropped attention (He et al.
    2024, arXiv:2406.15786) take the mean of this cosine, and drop the same layers for all.

    The thresholds are such that of the batches the share ``capacity`` runs, each sample predicted
    by the others; on text of another kind, and behind layers that were skipped, it is another.

    Every batch runs once through the whole model, whose ``layers`` run twice unless blocks are
    routed. For tokens, what the routers read is held in memory, ``tokens * width * 4`` bytes for
    each layer, and about eight times as much for the one that is being fitted.

    Args:
        model: As for `tune_router`.
        batches: Token ids ``[batch, tokens]``, or mappings as for `tune_router`. Prompts that come
            later should be of their kind and length.
        capacity: Share of all samples and layers that is to run, above 0 and at most 1, rounded
            down to samples, but at least one; with 1 everything runs, whatever comes.
        layers: As for `tune_router`.
        unit: "attention", "mlp" or "block".
        decide: "sequence", or "token", whose keys and values are all kept.
        per_layer: Whether each layer runs for the share ``capacity``; otherwise all of them do
            together, and those that change least are skipped most.
        router: Whose weights score instead; thresholds alone are found. Its layers are routed.

    Returns:
        The policy with the routers, and what they were fitted to.

    Raises:
        UnknownFamily, UnsupportedModel, PatchConflict, TypeError: As `tune_router`.
        ValueError: A setting is out of range, ``router`` does not fit, a batch does not, or there
            are fewer than 8 samples.
        FloatingPointError: What a layer reads or puts out is not finite; the layer is named.
    """
    for name, choice, known in (("unit", unit, UNITS), ("decide", decide, tuple(DECODES))):
        if choice not in known:
            raise ValueError(f"adaptive: {name} must be one of {', '.join(known)}, got {choice!r}")
    if not is_share(capacity):
        raise ValueError(
            f"adaptive: capacity must be above 0 and at most 1, got {capacity!r}; to run nothing, "
            "MixtureOfDepths.drop(layers)"
        )
    if type(per_layer) is not bool:
        raise TypeError(f"adaptive: per_layer must be True or False, got {per_layer!r}")
    root, family, _ = causal_lm(model, 0.0)
    if router is not None:
        layers = _layers_of(router, layers, root)
    chosen = routed_layers(layers, root, family, unit)
    seen = _Samples(chosen, decide)
    watch_layers(root, family, batches, unit=unit, layers=chosen, see=seen.see)
    read, changed = seen.all()
    explained = None
    if router is None:
        fits = [fit_ridge(x, y) for x, y in zip(read, changed, strict=True)]
        weight = torch.stack([fit.weight for fit in fits])
        bias = torch.tensor([fit.bias for fit in fits], dtype=torch.float64)
        scores = torch.stack([fit.left_out for fit in fits])
        explained = tuple(fit.explained for fit in fits)
    else:
        weight = torch.tensor(router.weight, dtype=torch.float64)
        bias = torch.tensor(router.bias or [0.0] * len(chosen), dtype=torch.float64)
        pairs = zip(read, weight, bias, strict=True)
        scores = torch.stack([x.double() @ w + b for x, w, b in pairs])
    ways = [_level(each, capacity) for each in (scores if per_layer else [scores.flatten()])]
    level, scale = torch.tensor(ways * (1 if per_layer else len(chosen)), dtype=torch.float64).T
    policy = MixtureOfDepths(
        router=RouterWeights(
            layers=chosen,
            weight=tuple(map(tuple, (weight / scale[:, None]).tolist())),
            bias=tuple(((bias - level) / scale).tolist()),
        ),
        unit=unit,
        decide=decide,
        threshold=0.0 if capacity == 1 else None,
        kv="kept" if decide == "token" and unit != "mlp" else "dropped",
    )
    return RouterFit(
        policy=policy,
        model=type(root).__name__,
        samples=len(changed[0]),
        similarity=tuple(float(1 - y.double().mean()) for y in changed),
        explained=explained,
        shares=tuple((scores >= level[:, None]).double().mean(1).tolist()),
        settings={"capacity": capacity, "unit": unit, "decide": decide, "per_layer": per_layer},
    )


class _Samples:
    """What routers read of sequences or tokens, and how much each layer changed them."""

    def __init__(self, layers: Sequence[int], decide: str) -> None:
        """Start with none."""
        self._decide = decide
        self._read: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._changed: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def see(self, index: int, reads: Tensor, cosines: Tensor, weights: Tensor) -> None:
        """Take one layer of one batch in; padding is no sample, nor part of one."""
        real = weights > 0
        changed = (1 - cosines).where(real, 0.0)
        if self._decide == "sequence":
            real = real.any(1)
            reads, changed = pooled(reads, weights), (changed * weights).sum(1)
        read, changed = reads[real].float(), changed[real]
        if not (read.isfinite().all() and changed.isfinite().all()):
            raise FloatingPointError(
                f"adaptive: what layer {index} reads and puts out must be finite, got NaN or "
                "infinity"
            )
        self._read[index].append(read.cpu())
        self._changed[index].append(changed.cpu())

    def all(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return ``[samples, width]`` and ``[samples]`` of each layer, once."""
        read = [torch.cat(self._read.pop(layer)) for layer in tuple(self._read)]
        if len(read[0]) < LEAST_SAMPLES:
            raise ValueError(
                f"adaptive: batches must hold {LEAST_SAMPLES} {self._decide}s or more to fit "
                f"routers to, got {len(read[0])}"
            )
        return read, [torch.cat(each) for each in self._changed.values()]


def _level(scores: Tensor, capacity: float) -> tuple[float, float]:
    """Return the level that a share of the ``scores`` reaches, between two of them, and a scale.

    Scores that are alike run alike.
    """
    scale = max(float(scores.std()), _LEAST_SPREAD)
    ordered = scores.sort(descending=True).values
    last = ordered[max(int(capacity * len(scores) + 1e-9), 1) - 1]
    below = ordered[ordered < last - _LEAST_SPREAD * scale]
    return float((last + below[0]) / 2 if len(below) else last - scale), scale


def _layers_of(
    router: RouterWeights, layers: Sequence[int] | None, root: nn.Module
) -> tuple[int, ...]:
    """Return the layers of routers that were given."""
    if not isinstance(router, RouterWeights):
        raise TypeError(f"adaptive: router must be RouterWeights, got {type(router).__name__}")
    if layers is not None and tuple(layers) != router.layers:
        raise ValueError(f"adaptive: layers must be those of router {router.layers}, got {layers}")
    width: int = root.config.hidden_size  # type: ignore[union-attr, assignment]
    if router.width != width:
        raise ValueError(
            f"adaptive: router must read states of the model's width {width}, got {router.width}"
        )
    return router.layers
