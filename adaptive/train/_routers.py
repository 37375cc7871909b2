"""Routers while they learn: every unit runs in full, and its output counts by a hard decision."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.adapters import Family
from adaptive.errors import UnsupportedModel
from adaptive.layers.autocast import in_own_dtype
from adaptive.layers.changes import own_forward
from adaptive.layers.hf_windows import own_windows
from adaptive.layers.pooling import pool_weights, pooled
from adaptive.layers.routed_tokens import best_tokens
from adaptive.policy.mixture_of_depths import THRESHOLD, always_run
from adaptive.policy.router_predictor import predict
from adaptive.train._learning import check_last, still


@dataclass
class Gates:
    """What the routed modules share while routers learn.

    Attributes:
        layers: That have a router.
        unit: "block", "attention" or "mlp".
        decide: "sequence" or "token".
        weight: Of the routers, ``[len(layers), width]``, float32, requires gradients.
        mask: Which tokens of the pass are not padding, ``[batch, tokens]``; None: all.
        shares: Of each layer in the pass, the share that ran, with a straight-through gradient.
        capacity: Share of each sequence's tokens that runs; None: those that score 0.5.
        predictor: Its weights, for each layer the four of `RouterPredictor`; None: none learns.
        guesses: Of each layer in the pass, the loss of its predictor, and the share of tokens that
            it guessed right.
    """

    layers: tuple[int, ...]
    unit: str
    decide: str
    weight: Tensor
    mask: Tensor | None = None
    shares: list[Tensor] = field(default_factory=list)
    capacity: float | None = None
    predictor: tuple[list[Tensor], ...] | None = None
    guesses: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def decide_on(self, index: int, states: Tensor) -> Tensor:
        """Return 1 for what runs layer ``index``, else 0, ``[batch, tokens or 1]``, and count it.

        The gradient is that of the score: a straight-through estimate.
        """
        weight = self.weight[self.layers.index(index)]
        real = pool_weights(states, self.mask, "mean")
        with in_own_dtype(states.device):
            if self.decide == "sequence":
                logits = (pooled(states, real) @ weight)[:, None]
                counted = (real.sum(1, keepdim=True) > 0).float()
            else:
                logits, counted = states.float() @ weight, (real > 0).float()
        score = logits.sigmoid()
        hard = score >= THRESHOLD
        if self.capacity is not None:
            hard = best_tokens(logits, self.capacity, real > 0)
            self._guess(index, states, hard.float(), real > 0)
        runs = hard.float() + score - score.detach()
        self.shares.append((runs * counted).sum() / counted.sum().clamp(min=1))
        return runs

    def _guess(self, index: int, states: Tensor, best: Tensor, real: Tensor) -> None:
        """Let the layer's predictor guess which tokens are the ``best``; states get no gradient."""
        assert self.predictor is not None  # a capacity comes with one
        with in_own_dtype(states.device):
            weights = self.predictor[self.layers.index(index)]
            logits = predict(states.detach().float(), weights)[real]
        loss = functional.binary_cross_entropy_with_logits(logits, best[real])
        right = ((logits > 0) == (best[real] > 0)).float().mean()
        self.guesses.append((loss, right))


class GateForward:
    """The forward of a routed module while its router learns; it holds no strong reference."""

    def __init__(self, module: nn.Module, index: int, norm: nn.Module | None, gates: Gates) -> None:
        """Know the module, its layer, the norm that its router reads through, and the routers."""
        self._module = weakref.ref(module)
        self._norm = None if norm is None else weakref.ref(norm)
        self.index, self.gates = index, gates
        self._first = list(inspect.signature(type(module).forward).parameters)[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and let its output count where the router says so."""
        module, gates = self._module(), self.gates
        assert module is not None  # it is what calls
        hidden: Tensor = args[0] if args else kwargs[self._first]
        out = type(module).forward(module, *args, **kwargs)
        made = out[0] if isinstance(out, tuple) else out
        norm = None if self._norm is None else self._norm()
        runs = gates.decide_on(self.index, hidden if norm is None else norm(hidden))
        runs = runs[..., None].to(made.dtype)
        made = hidden + runs * (made - hidden) if gates.unit == "block" else runs * made
        return (made, *out[1:]) if isinstance(out, tuple) else made


def modules_of(
    root: nn.Module, family: Family, unit: str
) -> tuple[list[str], list[nn.Module | None]]:
    """Return the names of the unit's modules by layer, and the norms that routers read through.

    Raises:
        UnsupportedModel: A layer lacks one, or someone has set a forward of its own on it.
    """
    names = {
        "block": family.layer_names,
        "attention": family.attention_names,
        "mlp": family.mlp_names,
    }[unit](root)
    norms = family.norm_names(root) if unit == "block" else ["" for _ in names]
    layers = len(family.layer_names(root))
    if len(names) != layers or len(norms) != layers:
        raise UnsupportedModel(f"adaptive: some layers have no {unit} or norm that is known")
    for name in names:
        if own_forward(root.get_submodule(name)) is not None:
            raise UnsupportedModel(f"adaptive: {name!r} has a forward of its own")
    return names, [root.get_submodule(norm) if norm else None for norm in norms]


@contextmanager
def gated(root: nn.Module, family: Family, gates: Gates) -> Iterator[None]:
    """Let the routers of ``gates`` decide inside the block; the model stands `still`."""
    names, norms = modules_of(root, family, gates.unit)
    forwards = {
        names[index]: GateForward(root.get_submodule(names[index]), index, norms[index], gates)
        for index in gates.layers
    }
    with still(root, forwards):
        yield


def routed_layers(
    layers: Sequence[int] | None, root: nn.Module, family: Family, unit: str
) -> tuple[int, ...]:
    """Return the layers that get a router; None: the deeper half of those that may, but the last.

    Raises:
        TypeError: They are one number, or nothing of the kind.
        ValueError: They are not ascending, not there, or such as always run.
    """
    total = len(family.layer_names(root))
    config: Any = root.get_submodule(family.base_name(root)).config
    first = always_run(unit, own_windows(config, total))
    if layers is None:
        layers = [layer for layer in range(total // 2, total - 1) if layer not in first]
        if not layers:
            raise ValueError(
                f"adaptive: layers must be named: None takes the deeper half but the last of those "
                f"that may be skipped, which is none of the model's {total} layers"
            )
    if not isinstance(layers, Iterable):
        raise TypeError(f"adaptive: layers must be ascending numbers, got {layers!r}")
    chosen = tuple(layers)
    whole = all(type(layer) is int for layer in chosen)
    if not chosen or not whole or list(chosen) != sorted(set(chosen)) or chosen[0] < 0:
        raise ValueError(f"adaptive: layers must be ascending numbers from 0 on, got {layers!r}")
    check_last(chosen[-1], total)
    for layer in chosen:
        if layer in first:
            raise ValueError(
                "adaptive: layers must leave out the first layer, and the first with each window, "
                f"which MixtureOfDepths always runs, got {layer}"
            )
    return chosen


def new_predictor(
    layers: int, width: int, hidden: int, seed: int, device: torch.device
) -> tuple[list[Tensor], ...]:
    """Return random weights of predictors, for each layer four that require gradients."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(layers):
        inner = torch.randn(hidden, width, generator=rng) / math.sqrt(width)
        outer = torch.randn(hidden, generator=rng) / math.sqrt(hidden)
        parts = [inner, torch.zeros(hidden), outer, torch.zeros(1)]
        found.append([part.to(device).requires_grad_() for part in parts])
    return tuple(found)


def step_of(width: int) -> float:
    """A learning rate with which Adam moves a logit of normalised states by about 0.05 a step.

    At width 4096 it is the 1e-5 of Router-Tuning.
    """
    return 0.05 / (width * math.sqrt(2 / math.pi))
