"""What the attention paths for plain PyTorch share: when to keep away, and what time to count."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptive.layers.state import LayerState
from adaptive.ops import recorded

_PLAIN = (Tensor, nn.Parameter)


def why_not_plain(tensors: Sequence[Tensor | None]) -> str | None:
    """Why these tensors must stay with PyTorch's own operators; None if they need not.

    A native kernel reads memory. It is invisible to whoever records operations or puts another
    meaning on tensors: gradients, `torch.func`, tracing, dispatch modes, tensor subclasses.
    """
    if not torch.compiler.is_compiling() and recorded():
        return "operations are recorded"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.is_nested:
            return "tensor subclass"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "gradient"
    return None


def seconds_since(start: float, state: LayerState, query: Tensor) -> float:
    """Time since ``start``; 0 on CUDA, where it would say nothing without a synchronisation."""
    state.record.timed = query.is_cpu
    return time.perf_counter() - start if query.is_cpu else 0.0
