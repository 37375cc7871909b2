"""Takes hold of a causal LM while it trains: drops layers for rows, and reads out every exit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.adapters import Family
from adaptive.layers.changes import ChangeLog
from adaptive.train._batch import Batch

_AXES_WITH_BATCH = 2
"""A tensor of fewer axes has no axis for the batch: positions in a cache, lengths."""


@contextmanager
def held(model: nn.Module, family: Family) -> Iterator[Exits]:
    """Hold ``model`` for training; afterwards, after errors too, it is as it was but trained.

    That is its forwards and the mode of each module; the config is not touched.

    Args:
        model: A causal LM of ``family`` that is not patched.
        family: Says where its layers, norm and base are.
    """
    modes = {module: module.training for module in model.modules()}
    log = ChangeLog()
    try:
        yield Exits(model, family, log)
    finally:
        log.undo(model)
        for module, training in modes.items():
            module.training = training


class Exits:
    """A model whose layers can be skipped for rows of a batch, and whose every layer is an exit.

    An exit is the model's own last norm and head behind an earlier layer; whatever the model does
    to its logits (a scale, a soft cap) it does to those of an exit, because it is asked to: its
    own forward runs on the exit's state in place of the base's output.
    """

    def __init__(self, model: nn.Module, family: Family, log: ChangeLog) -> None:
        base = family.base_name(model)
        root = family.layers_name(model)
        self._model = model
        self._norm = model.get_submodule(f"{base}.{family.norm}")
        self._base = _Base(model.get_submodule(base))
        log.set(model, base, "forward", self._base)
        self._layers = [_Layer(layer) for layer in model.get_submodule(root).children()]
        for index, layer in enumerate(self._layers):
            log.set(model, f"{root}.{index}", "forward", layer)
            log.hook(model, f"{root}.{index}", "_forward_hooks", layer.see)

    def losses(self, batch: Batch) -> list[float]:
        """Return the loss of the exit after each layer, with all layers, in eval mode."""
        self._model.eval()
        with torch.no_grad():
            states = self._run(batch, [None] * len(self._layers), range(len(self._layers)))
            return [self._loss(state, batch).item() for state in states]

    def gradients(
        self, batch: Batch, weights: Sequence[float], kept: Sequence[Tensor | None]
    ) -> dict[int, float]:
        """Add the gradients of the weighted loss of the exits to those of the parameters.

        The logits of one exit at a time are in memory: each exit's own backward runs at once, down
        to the state after its layer, and one backward through the layers takes them all.

        Args:
            batch: What to learn.
            weights: Of the exit after each layer; one of weight 0 is not computed.
            kept: For each layer the rows that it runs for, ascending; None: all.

        Returns:
            The loss of each exit that was computed, not weighted.
        """
        self._model.train()
        wanted = [layer for layer, weight in enumerate(weights) if weight > 0]
        found, roots, slopes = [], [], []
        with torch.enable_grad():
            for layer, state in zip(wanted, self._run(batch, kept, wanted), strict=True):
                leaf = state.detach().requires_grad_(state.requires_grad)
                loss = self._loss(leaf, batch)
                found.append(loss.detach())
                if loss.requires_grad:
                    (weights[layer] * loss).backward()
                if leaf.grad is not None:
                    roots.append(state)
                    slopes.append(leaf.grad)
            if roots:
                torch.autograd.backward(roots, slopes)
        return dict(zip(wanted, torch.stack(found).tolist(), strict=True))

    def _run(
        self, batch: Batch, kept: Sequence[Tensor | None], wanted: Sequence[int]
    ) -> list[Tensor]:
        """Run the base and return the states after the ``wanted`` layers."""
        for layer, rows in zip(self._layers, kept, strict=True):
            layer.kept, layer.state = rows, None
        self._base.run(batch.inputs)
        states = [self._layers[index].state for index in wanted]
        for layer in self._layers:
            layer.state = None
        if any(state is None for state in states):
            raise RuntimeError("adaptive: the model did not run each of its layers")
        return [state for state in states if state is not None]

    def _loss(self, state: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy of the tokens to learn, predicted from the state of a layer."""
        self._base.instead = self._norm(
            state.flatten(0, 1).index_select(0, batch.places.to(state.device))[None]
        )
        try:
            logits = self._model(return_dict=True).logits[0]
        finally:
            self._base.instead = None
        return functional.cross_entropy(logits.float(), batch.targets.to(logits.device))


class _Base:
    """The forward of the base, on the instance: its own, or an output that holds a given state."""

    def __init__(self, base: nn.Module) -> None:
        self._module, self._own = base, base.forward
        self._kind: Any = None
        self.instead: Tensor | None = None

    def run(self, inputs: Mapping[str, Tensor]) -> None:
        """Run the base and all its layers, and remember of what kind its output is."""
        options = {"use_cache": False, "output_attentions": False, "output_hidden_states": False}
        self._kind = type(self._module(**inputs, **options, return_dict=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.instead is None:
            return self._own(*args, **kwargs)
        return self._kind(last_hidden_state=self.instead)


class _Layer:
    """The forward of a layer, on the instance: runs for the rows that are kept alone."""

    def __init__(self, layer: nn.Module) -> None:
        self._own = layer.forward
        self._in_tuple = False
        self.kept: Tensor | None = None
        self.state: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        kept = self.kept
        if kept is None:
            after = self._hidden(self._own(*args, **kwargs))
        elif not len(kept):
            after = before
        else:
            kept = kept.to(before.device)
            of_rows = _rows((args, kwargs), kept, len(before))
            some = self._hidden(self._own(*of_rows[0], **of_rows[1]))
            after = before.index_copy(0, kept, some.to(before.dtype))
        return (after,) if self._in_tuple else after

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Keep the state after the layer, as the next layer gets it: other hooks have run."""
        self.state = output[0] if self._in_tuple else output

    def _hidden(self, output: Any) -> Tensor:
        """The state in a layer's output; layers of older versions of transformers return tuples.

        A layer that no row runs for must know: so all layers run for all rows before the first is
        dropped, when the exits are measured.
        """
        self._in_tuple = isinstance(output, tuple)
        hidden: Tensor = output[0] if self._in_tuple else output
        return hidden


def _rows(value: Any, kept: Tensor, batch: int) -> Any:
    """Return ``value`` with the ``kept`` rows of each tensor in it whose first axis is the batch.

    What is shared by the rows, such as a mask or positions with a first axis of 1, stays as it is;
    a batch of one row never comes here, as it is kept or dropped whole.
    """
    if isinstance(value, Tensor):
        per_row = value.dim() >= _AXES_WITH_BATCH and len(value) == batch
        return value.index_select(0, kept.to(value.device)) if per_row else value
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, kept, batch) for item in value)
    if isinstance(value, dict):
        return {key: _rows(item, kept, batch) for key, item in value.items()}
    return value
