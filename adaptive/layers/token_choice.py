"""Which tokens of an encoder go on, by what its class token attends to, and what the rest become.

Pure functions of tensors. Where a gradient is wanted, or no kernel takes the arguments, PyTorch's
operators compute the same.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive.ops.decode_attention import supports
from adaptive.ops.gather_tokens import gather_tokens
from adaptive.ops.route_tokens import route_tokens
from adaptive.ops.score_tokens import score_tokens


def class_attention(
    query: Tensor, key: Tensor, lengths: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of the first token to each one, averaged over heads: linear in the tokens.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: Likewise.
        lengths: Real tokens of each row, ``[batch]``, int32; None: all.
        scale: Of the scores; None: ``1 / sqrt(head_dim)``.

    Returns:
        ``[batch, tokens]``, float32; 0 for padding. Differentiable.
    """
    first = query[:, :, :1]
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    fits = query.dtype == key.dtype and supports(query.shape[3], query.dtype)
    strides = key.stride(3) == query.stride(3) == 1
    if not learns and fits and strides and query.device.type in score_tokens.native:
        each, _ = score_tokens(first, key, lengths, scale=scale, causal=False)
        return each.clamp(min=0).mean(1)  # keys that are not seen have -inf
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    scores = (first.float() * scale) @ key.float().transpose(2, 3)
    if lengths is not None:
        hidden = torch.arange(key.shape[2], device=key.device) >= lengths[:, None]
        hidden = hidden & (lengths > 0)[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        empty = (lengths > 0).float()[:, None]
        return scores.softmax(-1)[:, :, 0].mean(1) * empty
    return scores.softmax(-1)[:, :, 0].mean(1)


def redundancy(key: Tensor, protect: int) -> Tensor:
    """The highest cosine of each token's key, averaged over heads, with that of an earlier one.

    Tokens before ``protect`` count for no other; the first behind them has -1, the least cosine.

    Args:
        key: ``[batch, heads, tokens, head_dim]``.
        protect: Tokens at the start that always stay.

    Returns:
        ``[batch, tokens]``, float32.
    """
    unit = torch.nn.functional.normalize(key.detach().float().mean(1), dim=-1)
    place = torch.arange(unit.shape[1], device=unit.device)
    earlier = (place < place[:, None]) & (place >= protect)
    cosine = unit @ unit.transpose(1, 2)
    # an extra column, so that every token has something to be compared with
    cosine = torch.nn.functional.pad(cosine.masked_fill(~earlier, -1.0), (0, 1), value=-1.0)
    return cosine.amax(-1)


def best_tokens(
    scores: Tensor, protect: int, kept: Sequence[int], lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Choose the tokens with the highest scores of each row; of equal ones the first.

    Args:
        scores: ``[batch, tokens]``, float32, not NaN.
        protect: Tokens at the start that always stay.
        kept: How many each row keeps, these included.
        lengths: Real tokens of each row, ``[batch]``, int32; None: all, and all rows keep as many.

    Returns:
        ``(tokens, slots)``: positions of the tokens that stay, ascending, then -1, ``[batch,
        most]``, int32; and the place of each token among them, -1 for those that do not, ``[batch,
        tokens]``, int32.
    """
    route = route_tokens if scores.device.type in route_tokens.native else route_tokens.reference
    place = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.detach().masked_fill(place < protect, math.inf)
    if lengths is None:
        tokens, _, slots = route(scores, None, kept[0])
        return tokens[:, : kept[0]], slots
    scores = scores.masked_fill(place >= lengths[:, None], -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    room = torch.tensor(kept, device=scores.device)[:, None]
    stays = torch.zeros_like(scores).scatter(1, order, (place < room).float())
    tokens, _, slots = route(stays, 0.5)
    return tokens[:, : max(kept)], slots


def gathered(states: Tensor, tokens: Tensor) -> Tensor:
    """The states of listed tokens, ``[batch, most, width]``; zeros where the list has -1."""
    native = states.device.type in gather_tokens.native and supports(64, states.dtype)
    run = gather_tokens if native else gather_tokens.reference
    return run(states if states.stride(2) == 1 else states.contiguous(), tokens)


def fused(states: Tensor, weights: Tensor, gone: Tensor, mean: bool) -> Tensor:
    """The sum of the tokens that go, by weight; or their mean.

    Args:
        states: ``[batch, tokens, width]``.
        weights: ``[batch, tokens]``, float32.
        gone: Which tokens go, ``[batch, tokens]``, bool. The others are not looked at.
        mean: Divide by the sum of the weights. All 0: each weighs as much.

    Returns:
        ``[batch, width]``, in the dtype of ``states``; summed in float32.
    """
    weights = weights.masked_fill(~gone, 0)
    if mean:
        nothing = weights.sum(1, keepdim=True) == 0
        weights = torch.where(nothing, gone.float(), weights)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    seen = states.float().masked_fill(~gone[..., None], 0)
    return torch.bmm(weights[:, None], seen)[:, 0].to(states.dtype)
