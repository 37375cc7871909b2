"""Keeps the steps of a patched model that were set up for some shape, graphs included."""

from collections.abc import Callable
from typing import Any

from torch import nn

from adaptive.layers.cuda_graph import Captured

MOST = 2
"""Steps that are kept: each has a KV cache of its own, and on CUDA a graph."""

_ADAPTED = "base_layer"  # where an adapter of PEFT keeps the module that it replaced


class Held:
    """A step that was set up.

    Attributes:
        step: A `StaticStep`.
        key: What it was made for.
        run: Does the step: the step itself, or its graph.
    """

    def __init__(self, step: Any, key: object, capture: Callable[..., Any] | None) -> None:
        """Capture the step, if it is to be; ``capture`` is `Captured` or takes its place."""
        self.step = step
        self.key = key
        self.run: Callable[[], None] = step.step if capture is None else capture(step.step)


class StaticSteps:
    """The steps used last. Copies and pickles of the model begin without."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._held: list[Held] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave caches and graphs out of copies, which have weights of their own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def held_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(int(held.step.held_bytes) for held in self._held)

    def find(self, key: object, tokens: int) -> Held | None:
        """A step for ``key`` with memory for ``tokens`` tokens a row, not for far more."""
        for held in self._held:
            if held.key == key and tokens <= held.step.capacity <= 2 * tokens + CAPACITY_STEP:
                self._held.remove(held)
                self._held.append(held)
                return held
        return None

    def make_room(self) -> None:
        """Drop the step used longest ago, before there is one more than are kept."""
        del self._held[: len(self._held) - MOST + 1]

    def add(self, held: Held) -> None:
        """Keep a step."""
        self._held.append(held)


CAPACITY_STEP = 256
"""Capacities are multiples of this, so that calls of similar lengths share a step."""


def capacity_for(tokens: int) -> int:
    """The capacity of a step for ``tokens`` tokens a row."""
    return -(-tokens // CAPACITY_STEP) * CAPACITY_STEP


def weights_of(model: nn.Module) -> object:
    """What a graph of the model's steps would run: it is another graph where this differs.

    The memory of the weights, and what stands around the modules. Adapters are switched on and off
    by flags of theirs, so where there are any it equals nothing.
    """
    if any(_ADAPTED in module._modules for module in model.modules()):
        return object()
    tensors = [(t.data_ptr(), t.dtype, t.shape) for t in (*model.parameters(), *model.buffers())]
    modules = [
        (
            id(module),
            module.training,
            id(module.__dict__.get("forward")),
            *module._forward_pre_hooks,  # numbers that no two hooks share
            *module._forward_hooks,
        )
        for module in model.modules()
    ]
    return tensors, modules


CAPTURE: dict[str, Callable[..., Any]] = {"cuda": Captured}
"""How steps are captured, by kind of device; others run them as they are."""
