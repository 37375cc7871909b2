"""Choice of tokens, and the way there and back: route, gather, combine, in PyTorch's operators."""

import torch
from torch import Tensor


def route_tokens(
    scores: Tensor,
    *,
    threshold: float | None = None,
    capacity: float | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens of each row.

    Args:
        scores: ``[batch, tokens]``, float32, no NaN.
        threshold: Tokens with at least this score are chosen.
        capacity: Or the best share of the valid tokens of each row, rounded down, at least one; of
            equal scores the earlier token's.
        valid: Which tokens may be chosen, ``[batch, tokens]``, bool; None: all.

    Returns:
        ``(tokens, counts, slots)``: ``[batch, tokens]``, the chosen positions ascending, then -1;
        ``[batch]``; and ``[batch, tokens]``, the place in ``tokens``, or -1. All int32.
    """
    size = scores.shape[1]
    if capacity is None:
        chosen = scores >= (0.0 if threshold is None else threshold)
        chosen = chosen if valid is None else chosen & valid
    else:
        room = torch.full_like(scores[:, 0], size) if valid is None else valid.sum(1)
        most = (room.double() * capacity + 1e-9).floor().clamp(min=1).minimum(room)
        order = scores.argsort(dim=1, descending=True, stable=True)
        if valid is not None:  # those that may be chosen come first, whatever the others score
            last = (~valid).gather(1, order).int().argsort(dim=1, stable=True)
            order = order.gather(1, last)
        ranks = torch.arange(size, device=scores.device).expand_as(order)
        chosen = torch.zeros_like(ranks).scatter(1, order, ranks) < most[:, None]
        chosen = chosen if valid is None else chosen & valid
    counts = chosen.sum(1)
    places = chosen.cumsum(1) - 1
    slots = places.masked_fill(~chosen, -1)
    index = torch.arange(size, device=scores.device).expand_as(slots)
    tokens = torch.full_like(slots, -1)
    tokens = tokens.masked_scatter(
        torch.arange(size, device=scores.device) < counts[:, None], index[chosen]
    )
    return tokens.int(), counts.int(), slots.int()


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
