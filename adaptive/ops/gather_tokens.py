"""gather_tokens: the hidden states of listed tokens, one after another."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops._token_gradient import gather_backward, setup_gather


def make_lists(batch: int, tokens: int, chosen: int, rng: torch.Generator) -> Tensor:
    """Distinct positions in ascending order, of each row a random number, then -1."""
    listed = torch.full((batch, chosen), -1, dtype=torch.int32)
    for row in listed:
        count = int(torch.randint(chosen // 2, chosen + 1, (), generator=rng))
        row[:count] = torch.randperm(tokens, generator=rng)[:count].sort().values
    return listed


def make_inputs(
    batch: int,
    tokens: int,
    width: int,
    chosen: int,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random hidden states, and a list as route_tokens makes it."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, width, generator=rng).to(device, dtype)
    return hidden, make_lists(batch, tokens, chosen, rng).to(device)


def outputs(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Uninitialised rows for these arguments."""
    check_shapes("gather_tokens", hidden, tokens)
    return hidden.new_empty((hidden.shape[0], tokens.shape[1], hidden.shape[2]))


def check_shapes(name: str, hidden: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless these are ``[batch, tokens, width]`` and ``[batch, chosen]``."""
    for argument, tensor, rank in (("hidden", hidden, 3), ("tokens", tokens, 2)):
        if tensor.dim() != rank:
            raise ValueError(
                f"adaptive::{name}: {argument} must have {rank} dimensions, "
                f"got shape {list(tensor.shape)}"
            )


SIZES: list[dict[str, Any]] = [
    {"batch": 0, "tokens": 8, "width": 16, "chosen": 2},
    {"batch": 2, "tokens": 8, "width": 16, "chosen": 0},
    {"batch": 1, "tokens": 1, "width": 1, "chosen": 1},
    # rows that are no whole vectors; more than one turn of a block; more rows than tokens in it
    {"batch": 3, "tokens": 9, "width": 37, "chosen": 5},
    {"batch": 2, "tokens": 33, "width": 72, "chosen": 33},
    {"batch": 2, "tokens": 5, "width": 2056, "chosen": 4},
    {"batch": 2, "tokens": 400, "width": 64, "chosen": 300},
]


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=SIZES,
    models=[
        # Mixture-of-Depths at an eighth of a prompt; half of one
        {"batch": 1, "tokens": 2048, "width": 2048, "chosen": 256},
        {"batch": 1, "tokens": 2048, "width": 2048, "chosen": 1024},
    ],
    gradient=(setup_gather, gather_backward),
)
def gather_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Copy the hidden states of listed tokens together, for a layer that computes these alone.

    Args:
        hidden: ``[batch, tokens, width]``, float32, float16 or bfloat16, any strides but the last.
        tokens: Positions in each row, as ``route_tokens`` lists them, ``[batch, chosen]``, int32,
            any stride between rows: each -1 for none, or in 0..tokens-1 and listed once in its row.
            The order is free.

    Returns:
        ``[batch, chosen, width]``, in the dtype of ``hidden``: its rows, unchanged; zeros where
        ``tokens`` is -1. Differentiable in ``hidden``.

    Raises:
        ValueError: A shape, device or memory layout is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A position is out of range or listed twice. On CUDA the row of one that is out
            of range is NaN instead, and one that is listed twice is copied twice.
        NotImplementedError: The device has no kernel.
    """
    listed = tokens.long().clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, listed).masked_fill(tokens[..., None] < 0, 0)
