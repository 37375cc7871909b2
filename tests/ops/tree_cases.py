"""Token trees for the tests of attention and of verifying, and what their nodes see."""

import torch

SHAPES = ("chain", "roots", "random", "comb")


def parents_of(shape, batch, nodes, seed=0):
    """``[batch, nodes]``, int64: a chain, nothing but roots, random, or twins on a chain."""
    node = torch.arange(nodes).expand(batch, -1)
    if shape == "chain":
        return (node - 1).contiguous()
    if shape == "roots":
        return torch.full_like(node, -1).contiguous()
    if shape == "comb":
        return (node // 2 * 2 - 2).clamp(min=-1).contiguous()
    chance = torch.rand(batch, nodes, generator=torch.Generator().manual_seed(seed))
    return ((node + 1) * chance).floor().long() - 1


def seen_by_nodes(parents, tokens, mask=None):
    """Which keys each node sees, ``[batch, 1, nodes, tokens]``, bool, found by walking up."""
    batch, nodes = parents.shape
    seen = torch.zeros(batch, 1, nodes, tokens, dtype=torch.bool)
    seen[..., : tokens - nodes] = True
    for row in range(batch):
        for node in range(nodes):
            up = node
            while up >= 0:
                seen[row, 0, node, tokens - nodes + up] = True
                up = int(parents[row, up])
    return seen if mask is None else seen & mask[:, None, None]
