"""What sparse_row_ffn is measured against: dense products, and torch's own of selected rows."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import skinny_linear, sparse_row_ffn
from bench.stock import Suite

E4B = {"neurons": 16384, "in_features": 2048, "out_features": 2048}
"""A layer of Gemma 3n E4B."""

_dense: dict[str, tuple[Tensor, Tensor]] = {}


def dense_down(down: Tensor) -> Tensor:
    """The weight as nn.Linear has it, made once for each cell, in no variant's time."""
    held = _dense.get("down")
    if held is None or held[0] is not down:
        held = _dense["down"] = down, down.t().contiguous()
    return held[1]


def linear(activations: Tensor, input: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What the model runs: every neuron, most of them times 0."""
    return functional.linear(activations * functional.linear(input, up), dense_down(down))


def skinny(activations: Tensor, input: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same through skinny_linear, as a patch does where nothing is sparse."""
    return skinny_linear(activations * skinny_linear(input, up), dense_down(down))


def selected(activations: Tensor, input: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Copies of the rows that some input row needs, then two products."""
    needed = activations[0] if len(activations) == 1 else activations.abs().amax(0)
    active = needed.nonzero()[:, 0]
    products = functional.linear(input, up.index_select(0, active))
    weighed = activations.index_select(1, active) * products
    return weighed @ down.index_select(0, active)


def truth(activations: Tensor, input: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense product in float64, a stretch of the neurons at a time to stay small."""
    made = torch.zeros(len(input), down.shape[1], dtype=torch.float64)
    parts = (t.split(2048, axis) for t, axis in ((activations, 1), (up, 0), (down, 0)))
    for own, up_part, down_part in zip(*parts, strict=True):
        made += (own.double() * (input.double() @ up_part.double().T)) @ down_part.double()
    return made


def _bytes(activations: Tensor, input: Tensor, up: Tensor, down: Tensor) -> int:
    active = int((activations != 0).any(0).sum())
    row = (up.shape[1] + down.shape[1]) * up.element_size()
    return activations.nbytes + input.nbytes + active * row


SUITES = {
    sparse_row_ffn.name: Suite(
        forms={
            "F.linear of all neurons": linear,
            "index_select + matmuls": selected,
        },
        truth=truth,
        beside={"skinny_linear of all neurons": skinny},
        sweep=[
            *({"rows": rows, **E4B} for rows in (1, 4, 16, 2, 8)),
            {"rows": 1, **E4B, "active": 0.25},
        ],
        cuda_sweep=[{"rows": rows, **E4B} for rows in (1, 4, 16)],
        moved_bytes=_bytes,
    ),
}
"""By name of the op."""
