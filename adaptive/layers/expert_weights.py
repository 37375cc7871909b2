"""The weights of a gated FFN, expert by expert: a copy in another order, or where they are."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive.layers.changes import ChangeLog
from adaptive.layers.expert_log import ExpertLog
from adaptive.layers.fingerprint import SAMPLES

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Expert(NamedTuple):
    """Some neurons of an FFN.

    Attributes:
        gate: ``[neurons, width]``.
        up: Likewise.
        down: ``[width, neurons]``.
        gate_bias: ``[neurons]``, or None.
        up_bias: Likewise.
        both: ``gate`` and ``up`` where they lie one after the other, ``[2 * neurons, width]``;
            else None.
    """

    gate: Tensor
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
        router: Weight and bias, float32; None: the mean of each expert's gates.
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

    def of(self, ffn: Any) -> tuple[list[Expert], Tensor, Tensor]:
        """Experts without gradients; and the router, ``[experts, width]`` and ``[experts]``."""
        given = [tensor for tensor in _parameters(ffn) if tensor is not None]
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

    def split(self, ffn: Any) -> list[Expert]:
        """The experts, made of the parameters by operators that gradients go through."""
        gate, up, down, *biases = _parameters(ffn)
        assert gate is not None
        assert up is not None
        assert down is not None
        size = gate.shape[0] // self.experts
        found = []
        for start in range(0, gate.shape[0], size):
            if self.order is None:
                at: Any = slice(start, start + size)
            else:
                at = self.order[start : start + size].to(gate.device)
            own = [None if bias is None else bias[at] for bias in biases]
            found.append(Expert(gate[at], up[at], down[:, at], own[0], own[1]))
        return found

    def _copied(self, ffn: Any, order: Tensor) -> list[Expert]:
        """The experts in two blocks of memory: large ones are mapped in large pages."""
        gate, up, down, *biases = (
            None if tensor is None else tensor.detach() for tensor in _parameters(ffn)
        )
        assert gate is not None
        assert up is not None
        assert down is not None
        neurons, width = gate.shape
        size = neurons // self.experts
        both = gate.new_empty((self.experts, 2, size, width))
        downs = down.new_empty((self.experts, down.shape[0], size))
        found = []
        for expert, at in enumerate(order.to(gate.device).split(size)):
            both[expert, 0] = gate[at]
            both[expert, 1] = up[at]
            downs[expert] = down[:, at]
            own = [None if bias is None else bias[at] for bias in biases]
            parts = both[expert]
            made = Expert(parts[0], parts[1], downs[expert], own[0], own[1], parts.flatten(0, 1))
            found.append(made)
        return found

    @property
    def held_bytes(self) -> int:
        """Bytes of the copies."""
        if self._held is None or self.order is None:
            return 0
        return sum(t.nbytes for expert in self._held[0] for t in expert[:-1] if t is not None)


def _parameters(ffn: Any) -> list[Tensor | None]:
    """Weights of the three projections, and the biases of the first two."""
    linears: list[nn.Linear] = [getattr(ffn, name) for name in PROJECTIONS]
    return [*(linear.weight for linear in linears), *(linear.bias for linear in linears[:2])]


def _average(experts: list[Expert]) -> tuple[Tensor, Tensor]:
    weight = torch.stack([expert.gate.float().mean(0) for expert in experts])
    means = [0.0 if e.gate_bias is None else float(e.gate_bias.float().mean()) for e in experts]
    return weight, torch.tensor(means)


def held_log(log: ExpertLog | None, changes: ChangeLog) -> ExpertLog | None:
    """A copy of the log that says how much the FFNs hold by now."""
    if log is None:
        return None
    made = [getattr(getattr(change, "after", None), "weights", None) for change in changes.entries]
    return log.holding(sum(one.held_bytes for one in made if isinstance(one, ExpertWeights)))
