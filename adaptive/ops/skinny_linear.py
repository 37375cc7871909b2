"""skinny_linear: a linear layer of a few rows, at the speed of reading its weight."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.quantize_weight import dequantize_weight, quantize_weight

MAX_ROWS = 16
MIN_IN_FEATURES, IN_FEATURES_STEP = 32, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(in_features: int, dtype: torch.dtype) -> bool:
    """Whether the native kernels take rows of this many features and this dtype."""
    in_range = in_features >= MIN_IN_FEATURES and in_features % IN_FEATURES_STEP == 0
    return in_range and dtype in DTYPES


def check_matrices(op: str, **arguments: Any) -> None:
    """Raise unless each argument is a tensor of two dimensions, whose sizes an output needs."""
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"adaptive::{op}: {name} must be a strided torch.Tensor with data on cpu "
                f"or cuda, got {type(tensor).__name__}"
            )
        if tensor.dim() != 2:  # noqa: PLR2004
            raise ValueError(
                f"adaptive::{op}: {name} must have 2 dimensions, got shape {list(tensor.shape)}"
            )


def widened(weight: Tensor, weight_scales: Tensor | None) -> Tensor:
    """The weight in float32."""
    return weight.float() if weight_scales is None else dequantize_weight(weight, weight_scales)


def make_inputs(
    rows: int,
    in_features: int,
    out_features: int,
    bias: bool = False,
    group: int = 0,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments whose results are of the order of 1; with ``group``, of int8 weights."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng)

    weight = draw(out_features, in_features).mul_(in_features**-0.5)
    made = draw(rows, in_features), weight, draw(out_features) if bias else None
    plain = tuple(t if t is None else t.to(device=device, dtype=dtype) for t in made)
    if not group:
        return plain
    quantized, scales = quantize_weight(weight, group)
    return plain[0], quantized.to(device), plain[2], scales.to(device)


def outputs(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scales: Tensor | None = None
) -> Tensor:
    """Uninitialised result for these arguments."""
    check_matrices("skinny_linear", input=input, weight=weight)
    return torch.empty((input.shape[0], weight.shape[0]), dtype=input.dtype, device=input.device)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        # nothing in, nothing out
        {"rows": 0, "in_features": 64, "out_features": 8},
        {"rows": 2, "in_features": 64, "out_features": 0},
        # the smallest; sizes that are no multiple of any vector or tile; every kind of row tile
        {"rows": 1, "in_features": 32, "out_features": 1, "bias": True},
        {"rows": 1, "in_features": 2048, "out_features": 70},
        {"rows": 2, "in_features": 40, "out_features": 65, "bias": True},
        {"rows": 3, "in_features": 1000, "out_features": 33},
        {"rows": 7, "in_features": 72, "out_features": 130, "bias": True},
        {"rows": 16, "in_features": 576, "out_features": 517},
        # int8 weights: one group and many, and every kind of row tile
        {"rows": 1, "in_features": 32, "out_features": 1, "bias": True, "group": 32},
        {"rows": 2, "in_features": 2048, "out_features": 70, "group": 64},
        {"rows": 7, "in_features": 96, "out_features": 130, "bias": True, "group": 32},
        {"rows": 11, "in_features": 384, "out_features": 35, "bias": True, "group": 128},
        {"rows": 16, "in_features": 576, "out_features": 131, "group": 64},
    ],
    models=[
        # Llama-3.2-1B: attention, up, down, head
        {"rows": 1, "in_features": 2048, "out_features": 2048},
        {"rows": 1, "in_features": 2048, "out_features": 8192},
        {"rows": 1, "in_features": 8192, "out_features": 2048},
        {"rows": 1, "in_features": 2048, "out_features": 128256},
    ],
)
def skinny_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scales: Tensor | None = None
) -> Tensor:
    """Multiply 0..16 rows by a weight that is read once, as ``F.linear`` does.

    Decoding one token moves every weight of the model through the processor for a few additions
    each, so what counts is how fast memory is read.

    Args:
        input: ``[rows, in_features]``, float32, float16 or bfloat16; at most 16 rows; in_features
            a multiple of 8, at least 32; any stride between rows.
        weight: ``[out_features, in_features]``, dtype of ``input``, or int8 with
            ``weight_scales``; any stride between rows.
        bias: ``[out_features]``, dtype of ``input``, contiguous. None: none is added.
        weight_scales: ``[out_features, in_features / group]``, float32, any stride between rows:
            what the int8 weights of each group of columns are multiplied with, as
            `quantize_weight` makes them; group is a power of two from 32 on. None: nothing.

    Returns:
        ``[rows, out_features]``, dtype of ``input``, summed in float32 with the bias and rounded
        once. A row's result depends on that row alone, bit for bit. Elements of bfloat16 and
        sums of their products below 1.2e-38 count as 0 where the processor multiplies that type
        itself (`cpu_level()` is "avx512_bf16").

    Raises:
        ValueError: A shape, device or memory layout is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        NotImplementedError: An argument requires a gradient; the device has no kernel.
    """
    out = input.float() @ widened(weight, weight_scales).T
    if bias is not None:
        out = out + bias.float()
    return out.to(input.dtype)
