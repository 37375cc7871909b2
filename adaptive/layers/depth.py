"""Runs a part of a model's layers inside its own forward: some of them, or some of their modules.

The layers of a patched model get a `LayerForward` each. It runs the layer, unless a `Depth` that
all of them share says that the pass now running starts after it or ends before it. What a model
does around its layers (embedding, positions, masks, norm, head) stays the model's own code, so this
works for every family, and a pass that runs all layers is the stock pass.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import get_ident
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.state import PatchRecord

Skips = tuple[frozenset[int], frozenset[int]]
"""Layers whose attention is skipped, and layers whose MLP is."""


class KeysKept(Exception):  # noqa: N818 - no error: it ends a layer that has done its part
    """Raised by attention that was called for the keys and values it adds to the cache alone."""


@dataclass
class Depth:
    """Which layers the pass now running runs; all of them, unless it is `active`.

    Attributes:
        layers: Of the model.
        active: Whether the pass runs a part of the layers.
        begin: First layer that runs.
        end: Layer after the last one that runs.
        entering: Hidden states that layer ``begin`` gets, ``[batch, tokens, width]``; None: those
            of the pass.
        before: Hidden states that layer ``end - 1`` got; None before it ran.
        leaving: Hidden states that it gave.
        keys_only: Whether layers that run only add keys and values to the cache, and pass the
            hidden states on.
        static: Whether passes are those of static steps, whose cache says no length.
        skips: Modules that give zeros instead of running.
        seconds: Time in attention and in MLPs so far; None: not measured.
        clock: What that is measured by.
        owner: Thread that generates; None: none does.
    """

    layers: int
    active: bool = False
    begin: int = 0
    end: int = 0
    entering: Tensor | None = None
    before: Tensor | None = None
    leaving: Tensor | None = None
    keys_only: bool = False
    static: bool = False
    skips: Skips = (frozenset(), frozenset())
    seconds: list[float] | None = None
    clock: Callable[[], float] = perf_counter
    owner: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Let copies belong to nobody."""
        return {**self.__dict__, "owner": None}

    @contextmanager
    def owned(self, policy: str) -> Iterator[None]:
        """Let the passes inside the block be this thread's; those of others run all layers.

        Raises:
            RuntimeError: They are another thread's already.
        """
        if self.elsewhere:
            raise RuntimeError(
                f"adaptive: {policy}: another thread is generating with this model, whose layers "
                "have one state; generate after it, or with a copy.deepcopy of the model"
            )
        before, self.owner = self.owner, get_ident()
        try:
            yield
        finally:
            self.owner = before

    @property
    def elsewhere(self) -> bool:
        """Whether what this says is meant for the passes of another thread."""
        return self.owner is not None and self.owner != get_ident()

    @contextmanager
    def run(self, begin: int, end: int, entering: Tensor | None = None) -> Iterator[None]:
        """Let passes inside the block run the layers ``begin`` to ``end - 1``."""
        self.active, self.begin, self.end, self.entering = True, begin, end, entering
        self.before = self.leaving = None
        try:
            yield
        finally:
            self.active, self.entering, self.keys_only = False, None, False

    @contextmanager
    def skipping(self, skips: Skips) -> Iterator[None]:
        """Let passes inside the block run all layers without the modules ``skips``."""
        self.skips = skips
        try:
            yield
        finally:
            self.skips = (frozenset(), frozenset())

    @contextmanager
    def timing(self, clock: Callable[[], float]) -> Iterator[list[float]]:
        """Measure the time in attention and in MLPs inside the block, in seconds of ``clock``."""
        self.clock = clock
        self.seconds = [0.0, 0.0]
        try:
            yield self.seconds
        finally:
            self.seconds = None

    def take(self) -> Tensor:
        """Return what the last layer of the pass gave, and forget it."""
        state, self.leaving = self.leaving, None
        assert state is not None  # the pass ran
        return state


class ModuleForward:
    """A forward set on one module of a layer; like `LinearForward`, it holds no strong reference.

    Attributes:
        index: Number of the layer.
        depth: Shared by the layers of the model.
        wrapped: Whether the module returns a tuple; None before it ran.
        parts: How long that tuple is.
    """

    def __init__(self, module: nn.Module, index: int, depth: Depth) -> None:
        """Know the module, the number of its layer, and what tells which layers run."""
        self._module = weakref.ref(module)
        self.index = index
        self.depth = depth
        self.parts: int | None = None

    def __getstate__(self) -> tuple[nn.Module | None, int, Depth]:
        """Let copies and pickles arrive with the copy of the module."""
        return self._module(), self.index, self.depth

    def __setstate__(self, state: tuple[nn.Module, int, Depth]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _run(self, hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._module()
        assert module is not None  # it is what calls
        out = type(module).forward(module, *(() if hidden is None else (hidden,)), *args, **kwargs)
        if self.parts is None and not torch.compiler.is_compiling():
            self.parts = len(out) if isinstance(out, tuple) else 0
        return out

    def _as_returned(self, hidden: Tensor) -> Any:
        """``hidden`` in the form in which the module returns its output."""
        if not self.parts:
            return hidden
        return (hidden, *([None] * (self.parts - 1)))


class LayerForward(ModuleForward):
    """The forward of one decoder layer."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, or pass the hidden states on."""
        depth = self.depth
        if not depth.active or depth.elsewhere:
            return self._run(hidden_states, args, kwargs)
        if not depth.begin <= self.index < depth.end:
            return self._as_returned(hidden_states)
        if self.index == depth.begin and depth.entering is not None:
            hidden_states = depth.entering
        if depth.keys_only:
            with suppress(KeysKept):
                self._run(hidden_states, args, kwargs)
            return self._as_returned(hidden_states)
        out = self._run(hidden_states, args, kwargs)
        if self.index == depth.end - 1:
            depth.before = hidden_states
            depth.leaving = out[0] if isinstance(out, tuple) else out
        return out


class SublayerForward(ModuleForward):
    """The forward of a layer's attention or MLP, which adds to the hidden states.

    Attributes:
        kind: 0 for attention, 1 for an MLP: where `Depth.skips` lists it.
    """

    kind = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or return zeros of the shape of its input."""
        if self.index not in self.depth.skips[self.kind] or self.depth.elsewhere:
            seconds = self.depth.seconds
            if seconds is None:
                return self._run(None, args, kwargs)
            start = self.depth.clock()
            out = self._run(None, args, kwargs)
            seconds[self.kind] += self.depth.clock() - start
            return out
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return self._as_returned(torch.zeros_like(hidden))


class MLPForward(SublayerForward):
    """The forward of a layer's MLP."""

    kind = 1


def install(
    root: nn.Module,
    record: PatchRecord,
    layers: tuple[str, ...],
    sublayers: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> Depth:
    """Give each layer a LayerForward, undoably, and return what tells which of them run.

    Args:
        root: The patched model.
        record: Its record.
        layers: Dotted names of the layers, in execution order.
        sublayers: Names of their attention modules and of their MLPs, where those may be skipped.
    """
    depth = Depth(layers=len(layers), end=len(layers))
    attention, mlps = sublayers
    for kind, names in (
        (LayerForward, layers),
        (SublayerForward, attention),
        (MLPForward, mlps),
    ):
        for index, name in enumerate(names):
            forward = kind(root.get_submodule(name), index, depth)
            record.log.set(root, name, "forward", forward)
    return depth
