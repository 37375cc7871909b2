"""A block in which nothing of a model drops out."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let all modules evaluate inside the block; each is afterwards as it was, come what may."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()  # inside: a model may have an eval of its own, and Ctrl-C comes at any time
        yield
    finally:
        for module, training in modes.items():
            module.training = training
