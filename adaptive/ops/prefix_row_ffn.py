"""prefix_row_ffn: an FFN of a few rows, each of which uses some of the first neurons, natively."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops._op import op
from adaptive.ops.skinny_linear import MAX_ROWS, check_matrices, supports

__all__ = ["MAX_ROWS", "NEURONS_STEP", "prefix_row_ffn", "supports"]

NEURONS_STEP = 8

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def make_inputs(  # noqa: PLR0913
    rows: int,
    neurons: int,
    in_features: int,
    out_features: int,
    choices: int = 4,
    least: int = 1,
    gated: bool = True,
    activation: str = "silu",
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments whose results are of the order of 1.

    Rows take turns with ``choices`` widths, of ``least`` and more of as many equal parts.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=rng).mul_(scale).to(device=device, dtype=dtype)

    parts = torch.arange(rows) % choices + least
    widths = (parts * neurons // choices).clamp_max(neurons)
    x = draw(rows, in_features)
    gate, up = (draw(neurons, in_features, scale=in_features**-0.5) for _ in range(2))
    down = draw(out_features, neurons, scale=2 * max(neurons, 1) ** -0.5)
    return x, widths.to(device), gate if gated else None, up, down, activation


def outputs(
    input: Tensor,
    widths: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str = "silu",
) -> Tensor:
    """Uninitialised result for these arguments."""
    check_matrices("prefix_row_ffn", input=input, up=up, down=down)
    return torch.empty((input.shape[0], down.shape[0]), dtype=input.dtype, device=input.device)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        # no rows; no neurons; nothing out; no row uses any
        {"rows": 0, "neurons": 8, "in_features": 32, "out_features": 3},
        {"rows": 2, "neurons": 0, "in_features": 32, "out_features": 3},
        {"rows": 2, "neurons": 8, "in_features": 32, "out_features": 0},
        {"rows": 2, "neurons": 64, "in_features": 32, "out_features": 5, "choices": 9, "least": 0},
        # the smallest; sizes that are no multiple of any vector, tile or chunk; every kind of tile
        {"rows": 1, "neurons": 8, "in_features": 32, "out_features": 1, "choices": 1},
        {"rows": 2, "neurons": 136, "in_features": 72, "out_features": 33, "choices": 2},
        {"rows": 3, "neurons": 200, "in_features": 40, "out_features": 21, "choices": 3},
        {"rows": 5, "neurons": 1000, "in_features": 88, "out_features": 70, "choices": 7,
         "gated": False, "activation": "gelu_tanh"},
        {"rows": 7, "neurons": 328, "in_features": 1000, "out_features": 9, "choices": 5,
         "least": 0, "activation": "gelu_tanh"},
        {"rows": 11, "neurons": 72, "in_features": 64, "out_features": 130, "choices": 1,
         "activation": "relu"},
        {"rows": 16, "neurons": 520, "in_features": 96, "out_features": 131, "choices": 16},
    ],
    models=[
        # Llama-3.2-1B with the widths of MatFormer's Mix'n'Match
        {"rows": 4, "neurons": 8192, "in_features": 2048, "out_features": 2048},
    ],
)  # fmt: skip
def prefix_row_ffn(
    input: Tensor,
    widths: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str = "silu",
) -> Tensor:
    """Compute ``down(activation(gate(x)) * up(x))`` of each row's first neurons, for 0..16 rows.

    What `prefix_ffn` does for few rows where it can: each weight that a row uses is read once, and
    multiplied with the rows that use it.

    Args:
        input: ``[rows, in_features]``, float32, float16 or bfloat16; at most 16 rows; in_features
            a multiple of 8, at least 32; any stride between rows.
        widths: Neurons of each row, ``[rows]``, int64, in 0..neurons. 0: the row gets zeros. On
            CUDA, where nobody waits for them, what is out of range is taken for the nearest in it.
        gate: ``[neurons, in_features]``, dtype of ``input``, any stride between rows; None: a plain
            FFN, ``down(activation(up(x)))``.
        up: ``[neurons, in_features]``, likewise; neurons a multiple of 8.
        down: ``[out_features, neurons]``, likewise.
        activation: ``silu``, ``gelu_tanh`` (GELU in its tanh form) or ``relu``.

    Returns:
        ``[rows, out_features]``, dtype of ``input``: products, activations and sums are float32,
        and only the result is rounded. A row's result depends on that row alone, bit for bit, if
        weights are finite. Of neurons from the widest row's on, up to a multiple of 8, nothing
        is read.

    Raises:
        ValueError: A shape, device, memory layout or option is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A width is out of range, on the CPU.
        NotImplementedError: An argument requires a gradient; the device has no kernel.
    """
    x, function = input.float(), ACTIVATIONS[activation]
    hidden = x @ up.float().T
    hidden = function(hidden) if gate is None else function(x @ gate.float().T) * hidden
    used = torch.arange(len(up), device=input.device) < widths[:, None]
    return (hidden.masked_fill(~used, 0) @ down.float().T).to(input.dtype)
