"""Which FFNs of transformers leave most neurons at 0, and what of them runs as it stands.

Only classes whose forward is known line by line: Gemma3nTextMLP, the same in all versions that are
supported. Its gate and its choice of neurons run as the model's own code, so exactly the neurons
that stock computes with are computed with here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.autocast import autocast_dtype
from adaptive.layers.hf_linear import is_plain, most_rows
from adaptive.layers.sparse_ffn import SparseFfnForward, SparseFfnLog
from adaptive.layers.state import PatchRecord
from adaptive.layers.torch_guard import why_not_plain
from adaptive.ops.sparse_row_ffn import supports

MIN_SPARSITY = 0.75
"""Share of the neurons that the model means to leave at 0, from which on leaving them out pays."""

_CLASS = "Gemma3nTextMLP", "transformers.models.gemma3n.modeling_gemma3n"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Gemma3nForward(SparseFfnForward):
    """The forward of one patched Gemma3nTextMLP."""

    def takes(self, ffn: Any, hidden_states: Tensor) -> bool:
        """Whether rows are few, memory is plain, nobody wants a gradient or watches the parts."""
        if not _is_plain(ffn):
            return False
        return few_rows(hidden_states, *(getattr(ffn, name).weight for name in _PROJECTIONS))

    def activations(self, ffn: Any, rows: Tensor) -> Tensor:
        """As Gemma3nTextMLP computes them."""
        activations: Tensor = ffn.act_fn(ffn._gaussian_topk(ffn.gate_proj(rows)))
        return activations


def install(root: nn.Module, record: PatchRecord) -> None:
    """Give each FFN that gains from it a Gemma3nForward, undoably."""
    names = [name for name, module in root.named_modules() if _gains(module)]
    if not names:
        return
    record.switch.sparse_ffn = SparseFfnLog(layers=len(names))
    for name in names:
        forward = Gemma3nForward(root.get_submodule(name), record.switch)
        record.log.set(root, name, "forward", forward)


def _gains(module: Any) -> bool:
    kind = type(module)
    if (kind.__name__, kind.__module__) != _CLASS or "forward" in module.__dict__:
        return False
    sparsity = getattr(module, "activation_sparsity", None)
    if not isinstance(sparsity, float) or sparsity < MIN_SPARSITY or not _is_plain(module):
        return False
    weight = module.up_proj.weight
    if not weight.is_cpu or not supports(weight.shape[1], weight.dtype):
        return False
    return bool((module.act_fn(torch.zeros(1)) == 0).all())  # else zeros of the gate add something


def _is_plain(ffn: Any) -> bool:
    """Whether the projections are linear layers without bias that nobody wrapped or watches."""
    linears = [getattr(ffn, name) for name in _PROJECTIONS]
    return all(is_plain(linear) and linear.bias is None for linear in linears)


def few_rows(hidden_states: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether a kernel may run this gated FFN: few rows, plain memory, no gradient wanted."""
    if torch.is_grad_enabled() or type(hidden_states) is not Tensor or not hidden_states.is_cpu:
        return False
    if hidden_states.dim() == 0 or hidden_states.shape[-1] == 0:
        return False
    rows = hidden_states.numel() // hidden_states.shape[-1]
    if not 1 <= rows <= most_rows(hidden_states.dtype, widens=True):
        return False
    if autocast_dtype(hidden_states) is not None or not _fit(hidden_states, gate, up, down):
        return False
    return why_not_plain((hidden_states, gate, up, down)) is None


def _fit(hidden_states: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether these weights are a gated FFN that the kernel computes."""
    neurons, width = up.shape
    shapes = gate.shape == up.shape and down.shape[1] == neurons
    if not shapes or hidden_states.shape[-1] != width or up.stride(1) != 1:
        return False
    return all(
        weight.is_cpu and weight.dtype == hidden_states.dtype and supports(size, weight.dtype)
        for weight, size in ((gate, width), (up, width), (down, down.shape[0]))
    )
