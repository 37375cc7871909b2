"""The way of chosen tokens there and back, for any dtype and in place: gather and combine."""

import torch
from torch import Tensor

from adaptive.ops.route_tokens import route_tokens


def gather_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the states at ``tokens``, zeros where -1.

    Args:
        hidden: ``[batch, tokens, width]``.
        tokens: ``[batch, chosen]``.

    Returns:
        ``[batch, chosen, width]``.
    """
    index = tokens.long().clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index).masked_fill(tokens[..., None] < 0, 0)


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
    if weights is not None:
        update = update * weights[..., None].to(update.dtype)
    row, place = (tokens >= 0).nonzero(as_tuple=True)
    # No token is chosen twice, so nothing is added up in an order that could vary.
    at = (row, tokens[row, place].long())
    hidden[at] = hidden[at] + update[row, place].to(hidden.dtype)
    return hidden


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
