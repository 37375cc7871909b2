"""Gated FFNs of transformers of which few rows, each with a width of its own, run natively."""

from typing import Any

from torch import Tensor

from adaptive.layers.feed_forward import FeedForward
from adaptive.layers.hf_sparse_ffn import few_rows
from adaptive.ops.prefix_row_ffn import NEURONS_STEP, prefix_row_ffn

_MODULES = ("torch.nn.modules.activation", "transformers.activations")
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}
"""By the name of the class in one of the modules: what the kernel calls the function."""


def fast_prefix(ffn: FeedForward, rows: Tensor, neurons: Tensor) -> Tensor | None:
    """What `prefix_ffn` returns, sooner; None where the kernel may not answer.

    Args:
        ffn: Of plain linear layers.
        rows: What it reads, ``[rows, width]``.
        neurons: How many each row uses, ``[rows]``, int64.
    """
    gate, up, down = ffn.weights
    activation = _native_name(getattr(ffn.module, ffn.parts.activation))
    if gate is None or activation is None or ffn.parts.drop is not None:
        return None
    if any(bias is not None for bias in ffn.biases):
        return None
    if not few_rows(rows, gate, up, down) or len(up) % NEURONS_STEP:
        return None
    if any(tensor.stride(1) != 1 for tensor in (rows, gate, up, down)):
        return None
    return prefix_row_ffn(rows, neurons, gate, up, down, activation)


def _native_name(act_fn: Any) -> str | None:
    """What the kernel calls this function; None: it has none, or someone wrapped or watches it."""
    kind = type(act_fn)
    name = _ACTIVATIONS.get(kind.__name__) if kind.__module__ in _MODULES else None
    if name is None or "forward" in act_fn.__dict__:
        return None
    watched = act_fn._forward_hooks or act_fn._forward_pre_hooks
    return None if watched else name
