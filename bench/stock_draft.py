"""What the ops on drafted tokens are measured against: PyTorch compositions of the same result."""

import torch
from torch import Tensor

from adaptive.ops import verify_draft
from bench.stock import Suite


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


SUITES = {
    verify_draft.name: Suite(
        forms={"level by level": walk_levels, "cumprod of equals": leading},
        truth=lambda *a: verify_draft.reference(*a)[0].double(),
        sweep=[
            {"batch": batch, "nodes": nodes, "tree": tree}
            for batch in (1, 32)
            for nodes, tree in ((8, False), (64, True))
        ],
    ),
}
"""By name of the op."""
