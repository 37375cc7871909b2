"""What prefix_row_ffn is measured against: products up to the widest row, and one row at a time."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import prefix_ffn, prefix_row_ffn, skinny_linear
from adaptive.ops.prefix_ffn import Linear
from adaptive.ops.prefix_row_ffn import ACTIVATIONS
from bench.stock import Suite

FFN = {"neurons": 5632, "in_features": 2048, "out_features": 2048}
"""That of docs/token_routing.md; rows take turns with widths of 1/4, 1/2, 3/4 and 1."""


def masked(
    input: Tensor,
    widths: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    linear: Linear = functional.linear,
) -> Tensor:
    """Three products up to the widest row's neurons, and zeros for those a row does not use."""
    function = ACTIVATIONS[activation]
    return prefix_ffn(input, widths, gate, up, down, function, linear=linear)


def by_row(
    input: Tensor, widths: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """Three products for each row, of its own neurons."""
    function = ACTIVATIONS[activation]
    made = []
    for row, width in enumerate(widths.tolist()):
        x = input[row : row + 1]
        hidden = functional.linear(x, up[:width])
        if gate is None:
            hidden = function(hidden)
        else:
            hidden = function(functional.linear(x, gate[:width])) * hidden
        made.append(functional.linear(hidden, down[:, :width]))
    return torch.cat(made)


def skinny(
    input: Tensor, widths: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """The first form through skinny_linear, as a patch does for functions that have no kernel."""
    return masked(input, widths, gate, up, down, activation, skinny_linear)


def truth(
    input: Tensor, widths: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """Every neuron in float64, under the mask."""
    x, function = input.double(), ACTIVATIONS[activation]
    hidden = x @ up.double().T
    hidden = function(hidden) if gate is None else function(x @ gate.double().T) * hidden
    used = torch.arange(len(up)) < widths[:, None]
    return (hidden * used) @ down.double().T


def _bytes(
    input: Tensor, widths: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, _: str
) -> int:
    """Each weight that some row uses, once."""
    row = input.shape[1] * (1 if gate is None else 2) + len(down)
    return input.nbytes + int(widths.max()) * row * up.element_size()


SUITES = {
    prefix_row_ffn.name: Suite(
        forms={
            "F.linear to the widest": masked,
            "F.linear row by row": by_row,
        },
        truth=truth,
        beside={"skinny_linear to the widest": skinny},
        sweep=[
            *({"rows": rows, **FFN} for rows in (4, 8, 16)),
            {"rows": 2, **FFN, "choices": 2},
        ],
        cuda_sweep=[{"rows": rows, **FFN} for rows in (4, 16)],
        moved_bytes=_bytes,
    ),
}
"""By name of the op."""
