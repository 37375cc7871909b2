"""What training loops of routers share: settings, a model that stands still, loss and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.layers.changes import ChangeLog
from adaptive.layers.evaluating import evaluating
from adaptive.train._batch import Batch


def check_steps(steps: object) -> None:
    """Raise unless it is a whole number from 1 on."""
    if type(steps) is not int or steps < 1:
        raise ValueError(f"adaptive: steps must be a whole number from 1 on, got {steps!r}")


def check_number(name: str, number: Any, fits: Callable[[float], bool], rule: str) -> None:
    """Raise unless it is a number that ``fits``; ``rule`` says which ones do."""
    known = isinstance(number, int | float) and not isinstance(number, bool)
    if not known or not fits(number):
        raise ValueError(f"adaptive: {name} must {rule}, got {number!r}")


def check_strength(strength: object) -> None:
    """Raise unless it is a finite number from 0 on."""
    check_number("strength", strength, lambda x: 0 <= x < math.inf, "be 0 or more")


def check_rate(rate: object) -> None:
    """Raise unless the learning rate is None or a finite number above 0."""
    if rate is not None:
        check_number("learning_rate", rate, lambda x: 0 < x < math.inf, "be positive, or None")


def check_last(layer: int, total: int) -> None:
    """Raise unless the last layer that learns is one of the model's."""
    if layer >= total:
        raise ValueError(f"adaptive: layers must be below the model's {total} layers, got {layer}")


@contextmanager
def still(root: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Run modules by these forwards inside the block; afterwards the model is as before.

    No parameter of the model gets a gradient, and nothing of it drops out.
    """
    wanted = [parameter for parameter in root.parameters() if parameter.requires_grad]
    log = ChangeLog()
    with evaluating(root):
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            for name, forward in forwards.items():
                log.set(root, name, "forward", forward)
            yield
        finally:
            log.undo(root)
            for parameter in wanted:
                parameter.requires_grad_(True)


def next_token_loss(root: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of the tokens that are learned, in nats."""
    logits = root(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.places]
    return functional.cross_entropy(logits.float(), batch.targets)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    """Take one step down the gradient of ``loss``.

    Raises:
        FloatingPointError: It is not finite.
    """
    found = float(loss.detach())
    if not math.isfinite(found):
        raise FloatingPointError(f"adaptive: the loss must be finite, got {found} at step {step}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
