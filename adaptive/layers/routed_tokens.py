"""The way of chosen tokens there and back: gather and combine, in place, with gradients or not."""

import torch
from torch import Tensor

from adaptive.layers.torch_guard import why_not_plain
from adaptive.ops import combine_tokens as combine_op
from adaptive.ops import gather_tokens as gather_op
from adaptive.ops import route_tokens
from adaptive.ops.decode_attention import supports


def gather_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the states at ``tokens``, zeros where -1.

    Args:
        hidden: ``[batch, tokens, width]``.
        tokens: ``[batch, chosen]``.

    Returns:
        ``[batch, chosen, width]``.
    """
    if _native(hidden):
        return gather_op(hidden, tokens.int())
    batch, length, width = hidden.shape
    # As rows of one matrix: `gather` reads an index for every feature, and is ten times as slow.
    starts = torch.arange(0, batch * length, length, device=tokens.device)
    index = starts[:, None] + tokens.long().clamp(min=0)
    found = hidden.flatten(0, 1).index_select(0, index.flatten()).view(*tokens.shape, width)
    return found.masked_fill(tokens[..., None] < 0, 0)


def combine_tokens(
    hidden: Tensor, update: Tensor, tokens: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Add ``weights * update`` to the states at ``tokens``, in place, and return ``hidden``.

    Args:
        hidden: ``[batch, tokens, width]``.
        update: ``[batch, chosen, width]``.
        tokens: ``[batch, chosen]``; -1: nothing is added.
        weights: ``[batch, chosen]``; None: ones.
    """
    factors = () if weights is None else (weights,)
    if update.dtype == hidden.dtype and _native(hidden, update, *factors):
        factor = None if weights is None else weights.float()
        lists = tokens.int()
        combine_op.into(hidden, hidden=hidden, update=update, tokens=lists, weights=factor)
        return hidden
    if weights is not None:
        update = update * weights[..., None].to(update.dtype)
    row, place = (tokens >= 0).nonzero(as_tuple=True)
    # No token is chosen twice, so nothing is added up in an order that could vary.
    at = (row, tokens[row, place].long())
    hidden[at] = hidden[at] + update[row, place].to(hidden.dtype)
    return hidden


def _native(hidden: Tensor, *others: Tensor) -> bool:
    """Whether the kernels may take these states: no gradient is needed, nobody records."""
    return (
        hidden.device.type in gather_op.native
        and supports(64, hidden.dtype)
        and all(tensor.stride(-1) == 1 for tensor in (hidden, *others))
        and why_not_plain((hidden, *others)) is None
    )


def best_tokens(logits: Tensor, capacity: float, valid: Tensor | None) -> Tensor:
    """Say which tokens a capacity takes, ``[batch, tokens]``, bool.

    Args:
        logits: ``[batch, tokens]``.
        capacity: Share of the tokens of each row, as `route_tokens`.
        valid: Which are not padding, ``[batch, tokens]``, bool; None: all.
    """
    scores = logits.detach().sigmoid()
    chosen, _, _ = route_tokens(scores, threshold=None, capacity=capacity, valid=valid)
    taken = torch.zeros_like(logits, dtype=torch.bool)
    row, place = (chosen >= 0).nonzero(as_tuple=True)
    taken[row, chosen[row, place].long()] = True
    return taken


def rows_in_use(tensor: Tensor, rows: Tensor, used: int) -> Tensor:
    """The first ``used`` slots of these rows: a view where they are neighbours, else a copy."""
    tensor = tensor[:, :, :used]
    count = len(rows)
    if count == len(tensor):
        return tensor
    first = int(rows[0])
    if int(rows[-1]) - first == count - 1:
        return tensor[first : first + count]
    return tensor.index_select(0, rows)
