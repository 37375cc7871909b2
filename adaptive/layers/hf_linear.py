"""Linear layers of a transformers model on the CPU: few rows natively, many of 16 bits widened.

A step of decoding reads every weight for one row, or a few. PyTorch's F.linear reads bfloat16 at
little more than half of what memory gives, and from two rows on at a quarter of it. On CUDA cuBLAS
is near that limit, and nn.Linear is left alone. A prompt has many rows; see `widened_linear`.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from adaptive import _native
from adaptive.layers.autocast import autocast_dtype
from adaptive.layers.state import PatchRecord
from adaptive.layers.switch import Switch
from adaptive.layers.torch_guard import why_not_plain
from adaptive.layers.widened_linear import (
    MIN_ROWS,
    may_have_tiles,
    slow_dtypes,
    widened_linear,
)
from adaptive.ops import skinny_linear
from adaptive.ops.skinny_linear import MAX_ROWS, supports

MIN_WEIGHT_BYTES = 2 << 20
"""Below this a weight stays in a core's cache, and what counts is Python's time."""

MAX_NARROW_ROWS = 4
"""Rows up to which memory is the limit even where the processor has the means for many more."""

SLOW_DTYPES = slow_dtypes()
"""16-bit types for which this processor has no units of its own."""

TILES = may_have_tiles()
"""Whether F.linear may multiply tiles of bfloat16, against which no few rows were measured."""

_WRAPPED = ".base_layer"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class LinearForward:
    """The forward of one patched nn.Linear, set on the instance.

    An object, not a bound method, because it must survive pickling, and because a strong reference
    to the layer would be a cycle that keeps its weights alive. It holds the patch's switch and not
    its record, through which a deepcopy of this layer would reach all others.
    """

    def __init__(self, linear: nn.Linear, switch: Switch) -> None:
        """Know the layer, whose parameters are read anew in every call, and the patch's switch."""
        self._linear = weakref.ref(linear)
        self.switch = switch

    def __getstate__(self) -> tuple[nn.Linear | None, Switch]:
        """Let copies and pickles arrive with the copy of the layer."""
        return self._linear(), self.switch

    def __setstate__(self, state: tuple[nn.Linear, Switch]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, input: Tensor) -> Tensor:
        """Return what the layer's own forward does: the kernel's sums, or the very same."""
        linear = self._linear()
        assert linear is not None  # it is what calls
        stock = torch.compiler.is_compiling() or not self.switch.on
        out = None if stock else fast_linear(input, linear.weight, linear.bias)
        return type(linear).forward(linear, input) if out is None else out


def fast_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """What F.linear returns, sooner; None where ours may not answer or would not be faster."""
    if not _can_run(input, weight, bias):
        return None
    rows = input.reshape(-1, weight.shape[1])
    run = skinny_linear if len(rows) <= most_rows(input.dtype) else widened_linear
    return run(rows, weight, bias).view(*input.shape[:-1], weight.shape[0])


def is_plain(linear: Any) -> bool:
    """Whether this is an nn.Linear that nobody but this module wrapped or watches."""
    if type(linear) is not nn.Linear or is_watched(linear):
        return False
    return isinstance(linear.__dict__.get("forward"), LinearForward | None)


def is_watched(module: nn.Module) -> bool:
    """Whether someone hooked the calls of a module."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def install(root: nn.Module, record: PatchRecord) -> None:
    """Give each linear layer that gains from it a LinearForward, undoably."""
    for name, module in root.named_modules():
        if type(module) is nn.Linear and _gains(name, module):
            record.log.set(root, name, "forward", LinearForward(module, record.switch))


def most_rows(dtype: torch.dtype, *, widens: bool = False) -> int:
    """Rows up to which the kernel is faster than F.linear.

    Measured for AVX2, AVX-512 and AVX-512 with BF16. Fewer where the kernel computes slowly, at the
    baseline, and where oneDNN may compute on 16-bit elements as they are, which a kernel widens:
    all but the linear ones at their highest level, and these (``widens``) at any.
    """
    level = _native.cpu_level()
    if level == "baseline":
        return MAX_NARROW_ROWS
    if dtype == torch.float32 or dtype in SLOW_DTYPES:
        return MAX_ROWS
    dots = dtype == torch.bfloat16 and level == "avx512_bf16" and not TILES and not widens
    return MAX_ROWS if dots else MAX_NARROW_ROWS


def _widens(rows: int, dtype: torch.dtype) -> bool:
    """Whether `widened_linear` is faster than F.linear."""
    return rows >= MIN_ROWS and dtype in SLOW_DTYPES and _native.cpu_level() != "baseline"


def _gains(name: str, linear: nn.Linear) -> bool:
    weight = linear._parameters.get("weight")
    return (
        not name.endswith(_WRAPPED)
        and "forward" not in linear.__dict__
        and type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.nbytes >= MIN_WEIGHT_BYTES
        and supports(linear.in_features, weight.dtype)
    )


def _can_run(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ours may answer: rows in range, plain memory that nobody records, no gradient."""
    if torch.is_grad_enabled() or type(input) is not Tensor or not input.is_cpu:
        return False
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:  # noqa: PLR2004
        return False
    rows = input.numel() // max(weight.shape[1], 1)
    if not 1 <= rows <= most_rows(input.dtype) and not _widens(rows, input.dtype):
        return False
    if not _alike(input, weight, bias):
        return False
    if weight.stride(1) != 1 or autocast_dtype(input) is not None:
        return False
    return why_not_plain((input, weight, bias)) is None


def _alike(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    same = weight.is_cpu and weight.dtype == input.dtype and supports(weight.shape[1], input.dtype)
    if bias is None:
        return same
    return same and bias.is_cpu and bias.dtype == input.dtype and bias.is_contiguous()
