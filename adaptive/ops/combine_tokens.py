"""combine_tokens: brings what a layer computed for listed tokens back to their hidden states."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops._token_gradient import combine_backward, setup_combine
from adaptive.ops.gather_tokens import SIZES, check_shapes, gather_tokens, make_lists


def make_inputs(
    batch: int,
    tokens: int,
    width: int,
    chosen: int,
    weighted: bool = False,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random hidden states and updates, and a list as route_tokens makes it."""
    rng = torch.Generator().manual_seed(seed)
    hidden, update = (
        torch.randn(batch, rows, width, generator=rng).to(device, dtype)
        for rows in (tokens, chosen)
    )
    weights = torch.rand(batch, chosen, generator=rng).to(device) if weighted else None
    return hidden, update, make_lists(batch, tokens, chosen, rng).to(device), weights


def outputs(
    hidden: Tensor, update: Tensor, tokens: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Uninitialised hidden states for these arguments."""
    check_shapes("combine_tokens", hidden, tokens)
    return hidden.new_empty(hidden.shape)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[*SIZES, *({**sizes, "weighted": True} for sizes in SIZES[2:])],
    models=[{**sizes, "weighted": True} for sizes in gather_tokens.models],
    gradient=(setup_combine, combine_backward),
)
def combine_tokens(
    hidden: Tensor, update: Tensor, tokens: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Add weighted rows to the hidden states of listed tokens; all others stay as they are.

    ``combine_tokens.into(hidden, hidden=hidden, update=...)`` does it in place, which touches the
    listed rows alone; autograd knows nothing of that form.

    Args:
        hidden: ``[batch, tokens, width]``, float32, float16 or bfloat16, any strides but the last.
        update: What to add, ``[batch, chosen, width]``, dtype of ``hidden``, any strides but the
            last.
        tokens: Where to, ``[batch, chosen]``, as for ``gather_tokens``. What stands beside a -1 is
            not read.
        weights: Factors of the updates, ``[batch, chosen]``, float32, any stride between rows.
            None: 1.

    Returns:
        ``[batch, tokens, width]``, in the dtype of ``hidden``, contiguous: ``hidden + weight *
        update`` in float32, rounded once, where a token is listed, ``hidden`` elsewhere.
        Differentiable in ``hidden``, ``update`` and ``weights``.

    Raises:
        ValueError: A shape, device or memory layout is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A position is out of range or listed twice. On CUDA one that is out of range is
            passed over instead, and of updates to the same token some may be lost.
        NotImplementedError: The device has no kernel.
    """
    batch, length, width = hidden.shape
    factor = torch.ones_like(tokens, dtype=torch.float32) if weights is None else weights
    here = tokens[..., None] >= 0
    added = (update.float() * factor[..., None]).masked_fill(~here, 0)
    listed = torch.where(here, tokens[..., None], length).long().expand(-1, -1, width)
    sums = torch.cat([hidden.float(), hidden.new_zeros((batch, 1, width)).float()], 1)
    return sums.scatter_add(1, listed, added)[:, :length].to(hidden.dtype).contiguous()
