"""What ops on int8 weights are measured against: stock forms on the weight before rounding."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import exit_confidence, skinny_linear
from adaptive.ops.skinny_linear import widened
from bench.stock import Suite
from bench.stock_exit import LLAMA_1B, numbers, one_exp, separate
from bench.stock_exit import truth as exit_truth
from bench.stock_linear import LAYERS, linear_truth

GROUP = 64
LAYER, HEAD = LAYERS[0], LAYERS[3]

_made: dict[str, tuple[Tensor, torch.dtype, Any]] = {}


def wide(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``, made once for each cell, in no variant's time."""
    held = _made.get("wide")
    if held is None or held[0] is not weight or held[1] != dtype:
        _made["wide"] = weight, dtype, widened(weight, scales).to(dtype)
    made: Tensor = _made["wide"][2]
    return made


def by_row(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight in int8 with one factor for each row, as PyTorch's own product takes it."""
    held = _made.get("row")
    if held is None or held[0] is not weight or held[1] != dtype:
        whole = widened(weight, scales)
        factor = whole.abs().amax(1) / 127
        rounded = (whole / factor[:, None]).round().to(torch.int8)
        _made["row"] = weight, dtype, (rounded, factor.to(dtype))
    made: tuple[Tensor, Tensor] = _made["row"][2]
    return made


def linear_wide(input: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """What nn.Linear calls, on the weight before it was rounded to 8 bits."""
    return functional.linear(input, wide(weight, scales, input.dtype), bias)


def linear_int8_by_row(
    input: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor
) -> Tensor:
    """PyTorch's weight-only int8 product: a factor for each row, so another rounding."""
    return torch._weight_int8pack_mm(input, *by_row(weight, scales, input.dtype))


def skinny_wide(input: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """The same op on the weight before it was rounded to 8 bits."""
    return skinny_linear(input, wide(weight, scales, input.dtype), bias)


def int8_truth(input: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """The product with the rounded weight in float64."""
    return linear_truth(input, widened(weight, scales), bias)


def exit_on(form: Any, dtype: torch.dtype | None = None) -> Any:
    """A form of exit_confidence on the wide weight."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        made = wide(weight, options[-1], dtype or hidden.dtype)
        result: Tensor = form(hidden, made, bias, *options[:-1])
        return result

    return run


def exit_wide(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """The same op on the wide weight."""
    return numbers(exit_confidence(hidden, weight, bias, scale, softcap))


def _bytes(input: Tensor, weight: Tensor, *rest: Any) -> int:
    return input.nbytes + weight.nbytes + int(rest[-1].nbytes)


LINEAR_INT8 = Suite(
    forms={"F.linear, not quantised": linear_wide},
    truth=int8_truth,
    beside={
        "skinny_linear, not quantised": skinny_wide,
        "torch._weight_int8pack_mm": linear_int8_by_row,
    },
    sweep=[
        {"rows": rows, "in_features": wide_, "out_features": out, "group": GROUP}
        for (wide_, out), every in ((LAYER, (1, 2, 4, 8, 16)), (HEAD, (1, 8)))
        for rows in every
    ],
    cuda_sweep=[
        {"rows": rows, "in_features": wide_, "out_features": out, "group": GROUP}
        for wide_, out in (LAYER, HEAD)
        for rows in (1, 4, 16)
    ],
    moved_bytes=_bytes,
)

EXIT_INT8 = Suite(
    forms={
        "F.linear + topk + logsumexp + entropy, not quantised": exit_on(separate),
        "F.linear + topk + one exp, not quantised": exit_on(one_exp),
    },
    truth=exit_on(exit_truth, torch.float32),
    beside={"exit_confidence, not quantised": exit_on(exit_wide)},
    sweep=[{"rows": 1, "width": LLAMA_1B[0], "vocab": LLAMA_1B[1], "group": GROUP}],
    moved_bytes=_bytes,
    pick=numbers,
)

SUITES = {skinny_linear.name: (LINEAR_INT8,), exit_confidence.name: (EXIT_INT8,)}
"""By name of the op, beside its suite for weights that are not quantised."""
