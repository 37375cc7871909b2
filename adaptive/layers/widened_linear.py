"""Linear layers of 16-bit weights with many rows, on processors that multiply only float32.

Without matrix units PyTorch's F.linear takes several times as long in 16 bits as in float32
(`python -m bench.prompts` shows whole prompts with and without this). So the weights are widened, a
slice that stays in the cache at a time, and multiplied by the float32 product, which is at the
floor. Nothing is kept: memory grows by one slice and the input. Sums are float32 throughout and are
rounded once, so the error is no larger than F.linear's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SLICE_BYTES = 16 << 20
"""Of widened weights: about what the last level of cache holds, and enough for the product."""

MIN_ROWS = 32
"""Rows from which widening costs less than it gains."""

MIN_FEATURES = 64


def _capabilities() -> dict[str, Any]:
    """What an x86-64 processor can, by name. Empty elsewhere, and for torch 2.11, which is mute."""
    tell = getattr(torch.cpu, "get_capabilities", dict)
    can: dict[str, Any] = tell()
    return can if can.get("architecture") == "x86_64" else {}


def may_have_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (AMX), or nobody tells."""
    return bool(_capabilities().get("amx_bf16", True))


def slow_dtypes() -> frozenset[torch.dtype]:
    """16-bit types that this processor has no units for."""
    can = _capabilities()
    if not can:  # not measured elsewhere, or unknown: careful then
        return frozenset()
    units = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16"),
    }
    return frozenset(t for t, names in units.items() if not any(can.get(n) for n in names))


def widened_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What F.linear computes, in float32.

    Args:
        input: ``[rows, in_features]``, 16-bit.
        weight: ``[out_features, in_features]``, of the same dtype.
        bias: ``[out_features]``, likewise; or None.

    Returns:
        ``[rows, out_features]``, in the dtype of the input.
    """
    features, width = weight.shape
    step = max(MIN_FEATURES, SLICE_BYTES // (4 * max(width, 1)))
    wide = input.float()
    out = input.new_empty((input.shape[0], features))
    for begin in range(0, features, step):
        part = slice(begin, begin + step)
        own = None if bias is None else bias[part].float()
        out[:, part] = functional.linear(wide, weight[part].float(), own)
    return out
