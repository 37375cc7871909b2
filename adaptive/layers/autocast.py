"""What torch.autocast does to products, and how to keep it from them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would make of the tensor's device here; None outside autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def in_own_dtype(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast leaves products in the dtype of their factors.

    For scores that decide what runs: in 16 bits many of them are equal that are not, and another
    choice is made than outside autocast.
    """
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
