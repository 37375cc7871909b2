"""sparse_row_ffn: up and down projections of a gated FFN, of those neurons that are active."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.skinny_linear import DTYPES, MAX_ROWS, check_matrices, supports

__all__ = ["DTYPES", "MAX_ROWS", "sparse_row_ffn", "supports"]


def make_inputs(
    rows: int,
    neurons: int,
    in_features: int,
    out_features: int,
    active: float = 0.05,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments whose results are of the order of 1; ``active``: share of the neurons."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng)

    chosen = torch.rand(rows, neurons, generator=rng) < active
    made = (
        draw(rows, neurons).abs() * chosen,
        draw(rows, in_features),
        draw(neurons, in_features).mul_(in_features**-0.5),
        draw(neurons, out_features).mul_(max(neurons * active, 1.0) ** -0.5),
    )
    return tuple(t.to(device=device, dtype=dtype) for t in made)


def outputs(activations: Tensor, input: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Uninitialised result for these arguments."""
    check_matrices("sparse_row_ffn", activations=activations, input=input, up=up, down=down)
    shape = activations.shape[0], down.shape[1]
    return torch.empty(shape, dtype=activations.dtype, device=activations.device)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        # no rows; no neurons; none active
        {"rows": 0, "neurons": 8, "in_features": 32, "out_features": 32},
        {"rows": 2, "neurons": 0, "in_features": 32, "out_features": 32},
        {"rows": 2, "neurons": 600, "in_features": 32, "out_features": 32, "active": 0.0},
        # the smallest; sizes that are no multiple of any vector, group or part; all active
        {"rows": 1, "neurons": 1, "in_features": 32, "out_features": 32, "active": 1.0},
        {"rows": 1, "neurons": 1030, "in_features": 72, "out_features": 40},
        {"rows": 2, "neurons": 517, "in_features": 40, "out_features": 136, "active": 0.3},
        {"rows": 5, "neurons": 300, "in_features": 1000, "out_features": 88, "active": 0.1},
        {"rows": 3, "neurons": 70, "in_features": 64, "out_features": 2120, "active": 1.0},
        {"rows": 16, "neurons": 1100, "in_features": 96, "out_features": 104, "active": 0.2},
    ],
    models=[
        # Gemma 3n E4B, the layers with sparse activations
        {"rows": 1, "neurons": 16384, "in_features": 2048, "out_features": 2048},
    ],
)
def sparse_row_ffn(activations: Tensor, input: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute ``(activations * (input @ up.T)) @ down`` without the neurons that are 0.

    A gated FFN whose gate leaves most neurons at 0 reads, for 1..16 rows, only those rows of the
    two projections that a neuron of some row needs.

    Args:
        activations: ``[rows, neurons]``, float32, float16 or bfloat16, after the gate's activation
            function; at most 16 rows; any stride between rows.
        input: ``[rows, in_features]``, likewise; what the up projection is applied to. in_features
            a multiple of 8, at least 32.
        up: ``[neurons, in_features]``, likewise: the weight of the up projection.
        down: ``[neurons, out_features]``, likewise: the weight of the down projection,
            transposed, so that what a neuron adds lies together. out_features a multiple of 8, at
            least 32.

    Returns:
        ``[rows, out_features]``, dtype of ``activations``: products and sums are float32, and
        only the result is rounded. A row's result depends on that row alone, bit for bit. What a
        neuron with an activation of 0 has in ``up`` and ``down`` does not count, be it NaN.

    Raises:
        ValueError: A shape, device or memory layout is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        NotImplementedError: An argument requires a gradient; the device has no kernel.
    """
    made = input.new_empty(activations.shape[0], down.shape[1], dtype=torch.float32)
    for row, (own, x) in enumerate(zip(activations.float(), input.float(), strict=True)):
        active = own.nonzero()[:, 0]
        made[row] = (own[active] * (up[active].float() @ x)) @ down[active].float()
    return made.to(activations.dtype)
