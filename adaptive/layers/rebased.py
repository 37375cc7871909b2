"""Attention to first tokens whose positions are counted within what is kept.

StreamingLLM (Xiao et al. 2023, arXiv:2309.17453, section 3.2) gives the tokens that it keeps the
positions 0, 1, 2, ... Between a query and its window that changes no distance; only the first
tokens move up to the window. Cached keys have their rotation in them already, and stay as they are:
it is the query that is turned back, by as many positions as lie between, when it looks at them.
"""

from typing import Any

import torch
from torch import Tensor

from adaptive.layers.pattern import Pattern
from adaptive.layers.rotation import Rotation
from adaptive.layers.sparse_attention import Inputs
from adaptive.ops import decode_attention
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS

PIECE = 512
"""Query tokens of a long call that are turned at once: float32 copies of them stay in cache."""


def add_sinks(
    rotation: Rotation,
    inputs: Inputs,
    pattern: Pattern,
    window: int,
    sinks: int,
    near: tuple[Tensor, Tensor],
    dropped: Tensor | int = 0,
    kv_heads: Tensor | None = None,
) -> Tensor:
    """Join attention to a window with attention to the sinks before it.

    Args:
        rotation: Of the layer.
        inputs: The queries of local heads; keys and values.
        pattern: Where the sequences in ``key`` begin and end.
        window: Tokens that a query sees, its own included.
        sinks: First tokens of each sequence that it sees besides.
        near: Output and log-sum-exp of attention to the window alone.
        dropped: Tokens that are missing between sinks and window: of each row, ``[batch, 1]``, or
            of all.
        kv_heads: Numbers of the local heads among those of ``key``; None: all are.

    Returns:
        ``[batch, heads, query_tokens, head_dim]``, float32.
    """
    query, key, value = inputs[:3]
    queries = query.shape[2]
    first = (key[:, :, :sinks], value[:, :, :sinks])
    even = pattern.offsets is None and isinstance(dropped, int)
    begin = pattern.tokens - queries
    if even and begin - sinks + 1 >= window:
        seen = None
    else:
        places, starts, ends = pattern.limits(len(query), queries, query.device)
        slots, owners = _slots(pattern, sinks, query.device)
        mine = (owners[:, None] == starts[..., None]) & (ends > starts)[..., None]
        seen = (mine & (places[..., None] - slots[:, None] >= window))[:, None]
        if pattern.offsets is not None:
            index = slots[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3])
            first = (key.gather(2, index), value.gather(2, index))
    last = sinks + window - 1  # the position of a query, once something has been dropped
    if even:
        angles = rotation.angles_back(begin + int(dropped) - last, queries, query.device)
    else:
        away = places - starts + dropped - last
        angles = rotation.angles(-away.clamp(min=0))
    if kv_heads is not None:
        first = (first[0][:, kv_heads], first[1][:, kv_heads])
    options: dict[str, Any] = {"scale": inputs.scale, "softcap": inputs.softcap, "causal": False}
    if queries <= MAX_QUERY_TOKENS:
        turned = rotation.turn(query, angles)
        turned = turned if query.dtype == turned.dtype else turned.to(query.dtype)
        far = decode_attention(turned, *first, mask=seen, **options)
        return _merged(near, far, seen is not None)
    out = torch.empty_like(near[0], dtype=torch.float32)
    for start in range(0, queries, PIECE):
        rows = slice(start, start + PIECE)
        turned = rotation.turn(query[:, :, rows], (angles[0][:, :, rows], angles[1][:, :, rows]))
        # A product with a few keys: PyTorch's own is as fast as any, and takes float32 queries.
        far = decode_attention.reference(
            turned, *first, mask=None if seen is None else seen[:, :, rows], **options
        )
        out[:, :, rows] = _merged((near[0][:, :, rows], near[1][:, :, rows]), far, True)
    return out


def _slots(pattern: Pattern, sinks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the sinks of all sequences of a row, and where the sequence of each begins.

    Returns:
        Two int64 tensors ``[batch or 1, sequences * sinks]``; empty sequences begin at -1.
    """
    first = torch.arange(sinks, device=device)
    if pattern.offsets is None:
        return first[None], torch.zeros_like(first)[None]
    cuts = pattern.offsets.long()
    starts = cuts[:, :-1]
    slots = (starts[..., None] + first).flatten(1).clamp(max=pattern.tokens - 1)
    owners = torch.where(cuts.diff(dim=1) > 0, starts, -1)
    return slots, owners.repeat_interleave(sinks, 1)


def _merged(
    near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], some_see_nothing: bool
) -> Tensor:
    """Attention to two disjoint sets of keys as if they were one."""
    share = torch.sigmoid(far[1] - near[1])
    if some_see_nothing:  # far, and then perhaps near, which would be NaN
        share = torch.where(far[1] == -torch.inf, 0, share)
    return torch.lerp(near[0].float(), far[0], share[..., None])
