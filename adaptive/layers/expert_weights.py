"""The weights of an FFN, expert by expert: a copy in another order, or where they are."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.layers.changes import ChangeLog
from adaptive.layers.expert_log import ExpertLog
from adaptive.layers.feed_forward import FeedForward
from adaptive.layers.fingerprint import SAMPLES


class Expert(NamedTuple):
    """Some neurons of an FFN.

    Attributes:
        gate: ``[neurons, width]``; None: it is part of a plain FFN.
        up: ``[neurons, width]``.
        down: ``[width, neurons]``.
        gate_bias: ``[neurons]``, or None.
        up_bias: Likewise.
        both: ``gate`` and ``up`` where they lie one after the other, ``[2 * neurons, width]``;
            else None.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    both: Tensor | None = None


class Source:
    """What something was made of, and whether it still is that; as `fingerprint.source_of`.

    For what is asked in every call of a layer: a view of the sampled values is kept, not made anew.
    """

    def __init__(self, weight: Tensor) -> None:
        """Remember a weight without keeping its memory alive for longer than to the next ask."""
        self._is = _identity(weight)
        plain = weight.detach()
        step = max(plain.numel() // SAMPLES, 1)
        flat = plain.view(-1) if plain.is_contiguous() else plain.diagonal()
        self._view = flat[:: step if plain.is_contiguous() else 1][:SAMPLES]
        self._values = self._view.clone()

    def is_still(self, weight: Tensor) -> bool:
        """Whether this is the same weight, and nobody wrote to it as far as the sample shows."""
        return self._is == _identity(weight) and torch.equal(self._view, self._values)


def _identity(weight: Tensor) -> tuple[object, ...]:
    version = None if weight.is_inference() else weight._version  # inference tensors count nothing
    return weight.data_ptr(), weight.dtype, version


class ExpertWeights:
    """The experts of one FFN, and what scores them: made when first asked for, and when stale.

    Attributes:
        experts: How many.
        order: The neurons, expert by expert; None: as they are, of which views are enough.
        router: Weight and bias, float32; None: the mean of what each expert's activation reads.
    """

    def __init__(
        self, experts: int, order: Tensor | None, router: tuple[Tensor, Tensor] | None
    ) -> None:
        """Hold nothing yet."""
        self.experts = experts
        self.order = order
        self.router = router
        self._sources: list[Source] = []
        self._held: tuple[list[Expert], Tensor, Tensor] | None = None

    def settings(self) -> tuple[Any, ...]:
        """What another one like this is made of, without weights of the model."""
        return self.experts, self.order, self.router

    def of(self, ffn: FeedForward) -> tuple[list[Expert], Tensor, Tensor]:
        """Experts without gradients; and the router, ``[experts, width]`` and ``[experts]``."""
        given = _parameters(ffn)
        known = len(given) == len(self._sources) and self._held is not None
        pairs = zip(self._sources, given, strict=False)
        if not known or not all(source.is_still(weight) for source, weight in pairs):
            self._held = None  # before there are two
            self._sources = []
            with torch.inference_mode(False), torch.no_grad():  # a later call may want gradients
                parts = self.split(ffn) if self.order is None else self._copied(ffn, self.order)
                weight, bias = self.router or _average(parts)
                device = given[0].device
                self._held = parts, weight.to(device).contiguous(), bias.to(device)
            self._sources = [Source(tensor) for tensor in given]
        assert self._held is not None
        return self._held

    def split(self, ffn: FeedForward) -> list[Expert]:
        """The experts, made of the parameters by operators that gradients go through."""
        (gate, up, down), biases = ffn.weights, ffn.biases
        size = len(up) // self.experts
        found = []
        for start in range(0, len(up), size):
            if self.order is None:
                at: Any = slice(start, start + size)
            else:
                at = self.order[start : start + size].to(up.device)
            first, *own = (None if part is None else part[at] for part in (gate, *biases[:2]))
            found.append(Expert(first, up[at], down[:, at], own[0], own[1]))
        return found

    def _copied(self, ffn: FeedForward, order: Tensor) -> list[Expert]:
        """The experts in two blocks of memory: large ones are mapped in large pages."""
        (gate, up, down), biases = ffn.weights, ffn.biases
        neurons, width = up.shape
        size, first = (
            neurons // self.experts,
            [weight for weight in (gate, up) if weight is not None],
        )
        ups = up.new_empty((self.experts, len(first), size, width))
        downs = down.new_empty((self.experts, down.shape[0], size))
        found = []
        for expert, at in enumerate(order.to(up.device).split(size)):
            for place, weight in enumerate(first):
                ups[expert, place] = weight[at]
            downs[expert] = down[:, at]
            own = [None if bias is None else bias[at].detach() for bias in biases[:2]]
            parts, both = ups[expert], None if gate is None else ups[expert].flatten(0, 1)
            made = None if gate is None else parts[0]
            found.append(Expert(made, parts[-1], downs[expert], own[0], own[1], both))
        return found

    @property
    def held_bytes(self) -> int:
        """Bytes of the copies."""
        if self._held is None or self.order is None:
            return 0
        return sum(t.nbytes for expert in self._held[0] for t in expert[:-1] if t is not None)


def _parameters(ffn: FeedForward) -> list[Tensor]:
    """Weights of the projections, and the biases of all but the last."""
    *first, down = ffn.linears
    given = [*(linear.weight for linear in first), *(linear.bias for linear in first), down.weight]
    return [tensor for tensor in given if tensor is not None]


def _average(experts: list[Expert]) -> tuple[Tensor, Tensor]:
    found = [(e.up, e.up_bias) if e.gate is None else (e.gate, e.gate_bias) for e in experts]
    weight = torch.stack([weight.float().mean(0) for weight, _ in found])
    means = [0.0 if bias is None else float(bias.float().mean()) for _, bias in found]
    return weight, torch.tensor(means)


def held_log(log: ExpertLog | None, changes: ChangeLog) -> ExpertLog | None:
    """A copy of the log that says how much the FFNs hold by now."""
    if log is None:
        return None
    made = [getattr(getattr(change, "after", None), "weights", None) for change in changes.entries]
    return log.holding(sum(one.held_bytes for one in made if isinstance(one, ExpertWeights)))
