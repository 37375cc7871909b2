"""merge_tokens: the tokens of a row that are most alike become one."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op

_NO_COSINE = -2.0  # stands for NaN: below every cosine
_AXES = 3


def make_inputs(  # noqa: PLR0913
    batch: int,
    tokens: int,
    width: int = 64,
    metric_width: int = 64,
    removed: int = 0,
    sized: bool = False,
    ragged: bool = False,
    counted: bool = False,
    protect: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random tokens; with ``ragged`` some rows have padding, of other tokens by far."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, width, generator=rng)
    metric = torch.randn(batch, tokens, metric_width, generator=rng)
    sizes = torch.randint(1, 5, (batch, tokens), generator=rng).float() if sized else None
    lengths = counts = None
    if ragged:
        lengths = torch.randint(0, tokens + 1, (batch,), generator=rng).int()
        padding = torch.arange(tokens) >= lengths[:, None]
        hidden[padding] = metric[padding] = 1e4
    if counted:
        counts = torch.randint(0, tokens, (batch,), generator=rng).int()
    made = (hidden.to(dtype), metric.to(dtype), removed, sizes, lengths, counts, protect)
    return tuple(t.to(device) if isinstance(t, Tensor) else t for t in made)


def most_pairs(tokens: int, protect: int = 1) -> int:
    """How many pairs may merge in a row of so many tokens."""
    sources = len(range(protect + protect % 2, tokens, 2))
    return sources if tokens > protect + 1 - protect % 2 else 0


def outputs(
    hidden: Tensor,
    metric: Tensor,
    removed: int,
    sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    counts: Tensor | None = None,
    protect: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``out``, ``out_sizes`` and ``groups`` for these arguments."""
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"adaptive::merge_tokens: hidden must be a torch.Tensor, got {type(hidden).__name__}"
        )
    if hidden.dim() != _AXES:
        raise ValueError(
            f"adaptive::merge_tokens: hidden must have 3 dimensions, got shape {list(hidden.shape)}"
        )
    batch, tokens, width = hidden.shape
    if type(removed) is not int:
        raise TypeError(
            f"adaptive::merge_tokens: removed must be a whole number, got {type(removed).__name__}"
        )
    if not 0 <= removed <= tokens:
        raise ValueError(
            "adaptive::merge_tokens: removed must be at least 0 and at most about half the "
            f"tokens, got {removed}"
        )
    kept = tokens - removed
    return (
        hidden.new_empty((batch, kept, width)),
        hidden.new_empty((batch, kept), dtype=torch.float32),
        hidden.new_empty((batch, tokens), dtype=torch.int64),
    )


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"batch": 0, "tokens": 8, "removed": 2},
        {"batch": 2, "tokens": 0},
        {"batch": 2, "tokens": 1},
        {"batch": 2, "tokens": 5, "removed": 2, "sized": True},
        {"batch": 2, "tokens": 17, "width": 40, "metric_width": 8, "removed": 8, "protect": 0},
        {"batch": 3, "tokens": 70, "metric_width": 88, "removed": 13, "sized": True},
        {"batch": 5, "tokens": 33, "removed": 7, "sized": True, "ragged": True},
        {"batch": 5, "tokens": 40, "removed": 6, "ragged": True, "counted": True, "protect": 2},
        # more tokens than a block has threads
        {"batch": 2, "tokens": 300, "width": 8, "metric_width": 32, "removed": 90, "protect": 5},
    ],
    models=[
        {"batch": 32, "tokens": 197, "width": 768, "removed": 13},
        {"batch": 32, "tokens": 577, "width": 1024, "removed": 23},
    ],
)
def merge_tokens(
    hidden: Tensor,
    metric: Tensor,
    removed: int,
    sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    counts: Tensor | None = None,
    protect: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the most similar tokens of each row, by bipartite soft matching.

    Token Merging (Bolya et al. 2023, arXiv:2210.09461, section 3). The real tokens from
    ``protect`` on are split by their positions: each at an even one looks for the one at an odd
    position whose ``metric`` has the highest cosine with its own, and the pairs with the highest
    cosines merge. Several may merge into one. Of equal cosines the lowest position is first; NaN
    is below every cosine. All tokens keep their order.

    Args:
        hidden: Tokens, ``[batch, tokens, width]``; float32, float16 or bfloat16; width a multiple
            of 8.
        metric: What tells how alike they are, ``[batch, tokens, metric_width]``, in the same
            dtype; a multiple of 8 features. Keys, averaged over heads, in the paper.
        removed: How many tokens fewer the result has, at most the pairs that may merge in a row
            without padding: about half of its tokens.
        sizes: How many original tokens each one stands for, ``[batch, tokens]``, contiguous,
            float32, above 0. None: one each.
        lengths: The first so many tokens of each row are real, ``[batch]``, int32, each in
            0..tokens; the others are padding, and not read. None: all are real.
        counts: Pairs that merge in each row, ``[batch]``, int32, at least 0. A row merges at most
            the pairs that it has, and at least as many as it must to fit the result. None:
            ``removed``.
        protect: Tokens at the start of each row that never merge, such as a class token.

    Returns:
        ``(out, out_sizes, groups)``. ``out``: ``[batch, tokens - removed, width]``, in the dtype of
        ``hidden``: the mean of the members of each token, weighted by sizes, summed in float32 and
        rounded once; a token that stands alone keeps its bits; zeros for padding. ``out_sizes``:
        the sums of their sizes, float32; 0 for padding. ``groups``: ``[batch, tokens]``, int64:
        which token of the result each one is part of; -1 for padding.

    Raises:
        ValueError: A shape, device, range or memory layout is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A length or count is out of range. On CUDA the nearest in range is taken.
    """
    batch, tokens, width = hidden.shape
    kept, device = tokens - removed, hidden.device
    place = torch.arange(tokens, device=device)
    full = torch.full((batch,), tokens, device=device)
    length = full if lengths is None else lengths.long().clamp(0, tokens)
    real = place < length[:, None]
    free = real & (place >= protect)
    source, target = free & (place % 2 == 0), free & (place % 2 == 1)

    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    unit = torch.nn.functional.normalize(metric.to(wide), dim=-1)
    cosine = (unit @ unit.transpose(1, 2)).nan_to_num(_NO_COSINE)
    cosine = cosine.masked_fill(~target[:, None], -torch.inf)
    if tokens:
        best, found = cosine.max(-1)
    else:
        best, found = cosine.new_zeros(batch, 0), place.expand(batch, 0)
    best = best.masked_fill(~source, -torch.inf)
    possible = torch.where(target.any(1), source.sum(1), 0)
    asked = torch.full_like(length, removed) if counts is None else counts.long()
    pairs = torch.maximum(asked, length - kept).clamp(min=0).minimum(possible)
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    goes = source & (rank < pairs[:, None])

    slot = (real & ~goes).long().cumsum(1) - 1
    groups = torch.where(goes, slot.gather(1, found), slot).masked_fill(~real, -1)
    into = groups.masked_fill(~real, kept)  # padding goes to a slot that is cut off
    ones = torch.ones(batch, tokens, device=device)
    weight = (ones if sizes is None else sizes).masked_fill(~real, 0.0)
    rows = into[..., None].expand(-1, -1, width)
    clean = hidden.to(wide).masked_fill(~real[..., None], 0.0)
    empty = weight.new_zeros(batch, kept + 1)
    total = empty.scatter_add(1, into, weight)[:, :kept].contiguous()
    members = empty.scatter_add(1, into, torch.ones_like(weight))[:, :kept, None]
    summed = clean.new_zeros(batch, kept + 1, width).scatter_add(1, rows, clean * weight[..., None])
    alone = clean.new_zeros(batch, kept + 1, width).scatter_add(1, rows, clean)
    mean = summed[:, :kept] / total[..., None].masked_fill(members == 0, 1.0)
    out = torch.where(members == 1, alone[:, :kept], mean).to(hidden.dtype)
    return out, total, groups


def unmerge_tokens(merged: Tensor, groups: Tensor) -> Tensor:
    """Give each original token the state of the one that it became part of.

    Args:
        merged: ``[batch, kept, width]``.
        groups: ``[batch, tokens]``, int64, as `merge_tokens` returns it; -1 gives zeros.

    Returns:
        ``[batch, tokens, width]``, in the dtype of ``merged``.
    """
    index = groups.clamp(min=0)[..., None].expand(-1, -1, merged.shape[2])
    return merged.gather(1, index).masked_fill_((groups < 0)[..., None], 0)
