"""Watches how much each layer, or its attention or MLP, changes what the layer puts out."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.adapters import Family
from adaptive.layers.pooling import pool_weights
from adaptive.train._batch import read_all
from adaptive.train._learning import still
from adaptive.train._routers import modules_of

See = Callable[[int, Tensor, Tensor, Tensor], None]
"""Gets a layer's number, what its router reads ``[batch, tokens, width]``, cosines of what the
layer puts out with the unit and without it ``[batch, tokens]``, float32, and the weights of the
tokens in the mean of their sequence ``[batch, tokens]``, 0 for padding."""


def watch_layers(
    root: nn.Module,
    family: Family,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    unit: str,
    layers: Sequence[int],
    see: See,
) -> None:
    """Run every batch once through the whole model, and show each of the ``layers`` to ``see``.

    Without a block there is what it got. Without its attention or MLP a layer is run again, and the
    unit adds nothing: right wherever norms and residuals are, at the price of a second run.
    """
    blocks, norms = modules_of(root, family, "block")
    units = blocks if unit == "block" else modules_of(root, family, unit)[0]
    watched: list[_LayerForward] = []
    forwards: dict[str, Any] = {}
    for index in layers:
        part = None
        if unit != "block":
            part = forwards[units[index]] = _UnitForward(root.get_submodule(units[index]))
        layer = _LayerForward(root.get_submodule(blocks[index]), index, norms[index], part, see)
        forwards[blocks[index]] = layer
        watched.append(layer)
    device = next(root.parameters()).device
    with still(root, forwards), torch.no_grad():
        for batch in read_all(batches, device):
            for layer in watched:
                layer.mask = batch.inputs.get("attention_mask")
            root(**batch.inputs, use_cache=False)


class _UnitForward:
    """The forward of a layer's attention or MLP, which can be made to add nothing."""

    def __init__(self, module: nn.Module) -> None:
        """Know the module, but hold no strong reference."""
        self._module = weakref.ref(module)
        self._first = _first(module)
        self.reads = torch.empty(0)
        self._nothing: Any = None
        self._muted = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module and note what it reads; or return zeros in the form of its output."""
        if self._muted:
            return self._nothing
        module = self._module()
        assert module is not None  # it is what calls
        self.reads = args[0] if args else kwargs[self._first]
        out = type(module).forward(module, *args, **kwargs)
        zeros = torch.zeros_like(_made(out))
        self._nothing = (zeros, *out[1:]) if isinstance(out, tuple) else zeros
        return out

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Let the module add nothing inside the block."""
        self._muted = True
        try:
            yield
        finally:
            self._muted, self._nothing = False, None


class _LayerForward:
    """The forward of a layer, which shows what its unit changed."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        norm: nn.Module | None,
        unit: _UnitForward | None,
        see: See,
    ) -> None:
        """Know the layer, the norm of its input, and its unit; None: the whole of it."""
        self._module = weakref.ref(module)
        self._norm = None if norm is None else weakref.ref(norm)
        self._first = _first(module)
        self._index, self._unit, self._see = index, unit, see
        self.mask: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and show what it would have put out without the unit beside it."""
        module, unit = self._module(), self._unit
        assert module is not None  # it is what calls
        hidden: Tensor = args[0] if args else kwargs[self._first]
        out = type(module).forward(module, *args, **kwargs)
        if unit is None:
            norm = None if self._norm is None else self._norm()
            reads, without = hidden if norm is None else norm(hidden), hidden
        else:
            reads = unit.reads
            with unit.muted():
                without = _made(type(module).forward(module, *args, **kwargs))
        cosines = torch.cosine_similarity(_made(out).float(), without.float(), dim=-1)
        self._see(self._index, reads, cosines, pool_weights(hidden, self.mask, "mean"))
        return out


def _first(module: nn.Module) -> str:
    """Name of the argument that holds the states."""
    return list(inspect.signature(type(module).forward).parameters)[1]


def _made(out: Any) -> Tensor:
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made
