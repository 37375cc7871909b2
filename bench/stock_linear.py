"""What skinny_linear is measured against: F.linear, at the layers of Llama-3.2-1B."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import skinny_linear
from bench.stock import Suite

LAYERS = ((2048, 8192), (2048, 2048), (8192, 2048), (2048, 128256))  # in, out
ROWS = (1, 4, 16, 2, 8)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What nn.Linear calls."""
    return functional.linear(input, weight, bias)


def linear_truth(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in float64, a stretch of the weight at a time to stay small."""
    parts = [input.double() @ part.double().T for part in weight.split(8192)]
    out = torch.cat(parts, dim=1)
    return out if bias is None else out + bias.double()


SUITES = {
    skinny_linear.name: Suite(
        forms={"F.linear": linear},
        truth=linear_truth,
        sweep=[
            {"rows": rows, "in_features": wide, "out_features": out}
            for rows in ROWS
            for wide, out in (LAYERS if rows == 1 else LAYERS[:1])
        ],
        cuda_sweep=[
            {"rows": rows, "in_features": wide, "out_features": out}
            for rows in ROWS[:3]
            for wide, out in LAYERS
        ],
        moved_bytes=lambda input, weight, *_: input.nbytes + weight.nbytes,
    ),
}
"""By name of the op."""
