"""What the ops on drafted tokens are measured against: PyTorch compositions of the same result."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import decode_attention, tree_attention, verify_draft, verify_samples
from adaptive.ops.tree_attention import ancestors
from bench.stock import Suite, fold
from bench.stock_sparse import in_store


def walk_levels(
    drafted: Tensor, choices: Tensor, parents: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """A step of the walk at a time, for all rows and nodes at once; stops when no row goes on."""
    batch, nodes = drafted.shape
    node = torch.arange(nodes, device=drafted.device)
    before = (node - 1).expand(batch, -1) if parents is None else parents
    real = node < (nodes if lengths is None else lengths[:, None])
    accepted = torch.zeros(batch, dtype=torch.int64, device=drafted.device)
    here = torch.full_like(accepted, -1)
    choice = choices[:, 0]
    tokens = [choice]
    while True:
        fits = real & (before == here[:, None]) & (drafted == choice[:, None])
        found, first = fits.max(1)
        if not found.any():
            break
        accepted += found
        here = torch.where(found, first, nodes)
        choice = torch.where(found, choices.gather(1, first[:, None] + 1)[:, 0], -1)
        tokens.append(choice)
    torch.stack(tokens, 1)
    return accepted


def leading(drafted: Tensor, choices: Tensor, *trees: Tensor | None) -> Tensor:
    """Lists: compare, and count the leading equal ones. Trees: as `walk_levels`."""
    if any(t is not None for t in trees):
        return walk_levels(drafted, choices, *trees)
    accepted = (drafted == choices[:, :-1]).cumprod(1).sum(1)
    position = torch.arange(choices.shape[1], device=drafted.device)
    choices.masked_fill(position > accepted[:, None], -1)
    return accepted


def tree_mask(key: Tensor, parents: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of nodes by tokens, ``[batch, 1, nodes, tokens]``, bool."""
    batch, nodes = parents.shape
    seen = torch.ones(batch, 1, nodes, key.shape[2], dtype=torch.bool, device=key.device)
    seen[..., key.shape[2] - nodes :] = ancestors(parents)[:, None]
    return seen if mask is None else seen & mask[:, None, None]


def tree_sdpa(
    query: Tensor, key: Tensor, value: Tensor, parents: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Make the mask, then scaled_dot_product_attention(enable_gqa=True)."""
    seen = tree_mask(key, parents, mask)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=True
    )


def tree_folded(
    query: Tensor, key: Tensor, value: Tensor, parents: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Make the mask, fold the query group, two matmuls and a softmax."""
    group = query.shape[1] // key.shape[1]
    unseen = ~tree_mask(key, parents, mask).repeat(1, 1, group, 1)
    scores = torch.matmul(fold(query, key) * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    weights = torch.softmax(scores.masked_fill_(unseen, -torch.inf), -1)
    return torch.matmul(weights, value).view(query.shape)


def tree_truth(
    query: Tensor, key: Tensor, value: Tensor, parents: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention under the mask in float64."""
    return tree_folded(query.double(), key.double(), value.double(), parents, mask)


def as_chain(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """As many query tokens one after the other: what a drafted list costs."""
    return decode_attention(query, key, value)[0]


def sample_gathered(
    drafted: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Gather and compare, then the residual of one row, its cumulative sum and a search."""
    nodes = drafted.shape[1]
    listed = drafted[..., None]
    chance, wanted = (t.gather(2, listed)[..., 0] for t in (draft, target[:, :nodes]))
    kept = uniforms[:, :nodes] * chance < wanted
    if lengths is not None:
        kept &= torch.arange(nodes, device=drafted.device) < lengths[:, None]
    accepted = kept.cumprod(1).sum(1)
    row = torch.arange(len(drafted), device=drafted.device)
    left = target[row, accepted]
    rejected = accepted < (nodes if lengths is None else lengths)
    beside = draft[row, accepted.clamp(max=nodes - 1)] * rejected[:, None]
    sums = (left - beside).clamp_(min=0).cumsum(1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, uniforms[:, -1:] * sums[:, -1:], right=True)
    place = torch.arange(nodes + 1, device=drafted.device)
    tokens = torch.cat([drafted, drawn], 1)
    torch.where(place < accepted[:, None], tokens, -1).scatter_(1, accepted[:, None], drawn)
    return accepted


def sample_bytes(drafted: Tensor, draft: Tensor, target: Tensor, *_: object) -> int:
    """Bytes of the two rows of probabilities that the last token is drawn from."""
    return len(drafted) * 2 * target.shape[2] * target.element_size()


SUITES = {
    tree_attention.name: Suite(
        forms={"mask + SDPA": tree_sdpa, "mask + folded matmuls": tree_folded},
        truth=tree_truth,
        cuda_sweep=[
            {
                "batch": batch,
                "heads": 32,
                "kv_heads": 8,
                "capacity": tokens,
                "head_dim": 128,
                "nodes": 16,
            }
            for batch, tokens in ((1, 32768), (8, 32768), (1, 4096))
        ],
        beside={"decode_attention of a list": as_chain},
        place=in_store,
    ),
    verify_draft.name: Suite(
        forms={"level by level": walk_levels, "cumprod of equals": leading},
        truth=lambda *a: verify_draft.reference(*a)[0].double(),
        sweep=[
            {"batch": batch, "nodes": nodes, "tree": tree}
            for batch in (1, 32)
            for nodes, tree in ((8, False), (64, True))
        ],
    ),
    verify_samples.name: Suite(
        forms={"gather + cumsum + searchsorted": sample_gathered},
        truth=lambda *a: verify_samples.reference(*a)[0].double(),
        moved_bytes=sample_bytes,
    ),
}
"""By name of the op."""
