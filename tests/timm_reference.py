"""Token merging and pruning on a vision transformer of timm, row by row, in PyTorch's operators.

Nothing of the package is used but the policies' numbers. Tokens are lists of the places of their
members, and attention is written out from the weights.
"""

import math

import torch
from torch.nn.functional import cosine_similarity


def attended(attention, x, sizes):
    """What attention makes of ``x``, ``[tokens, width]``; keys and weights averaged over heads."""
    tokens, _ = x.shape
    split = attention.qkv(x).view(tokens, 3, attention.num_heads, -1).permute(1, 2, 0, 3)
    query, key, value = attention.q_norm(split[0]), attention.k_norm(split[1]), split[2]
    scores = query @ key.transpose(1, 2) / math.sqrt(key.shape[2])
    weights = (scores + torch.tensor(sizes).log()).softmax(-1)  # equation 6 of arXiv:2210.09461
    made = (weights @ value).transpose(0, 1).reshape(tokens, -1)
    return attention.proj(made), key.mean(0), weights.mean(0)


def merge(states, members, keys, removed, protect):
    """Bipartite soft matching, section 3: even places look for odd ones, the best pairs merge."""
    free = range(protect, len(states))
    targets = [place for place in free if place % 2]
    pairs = []
    for place in (place for place in free if place % 2 == 0):
        alike = [float(cosine_similarity(keys[place], keys[other], dim=0)) for other in targets]
        best = max(range(len(targets)), key=lambda i: (alike[i], -i))
        pairs.append((-alike[best], place, targets[best]))
    into = {source: target for _, source, target in sorted(pairs)[:removed]}
    groups = {place: [place] for place in range(len(states)) if place not in into}
    for source, target in into.items():
        groups[target].append(source)
    made = []
    for group in groups.values():
        sizes = torch.tensor([float(len(members[place])) for place in group])
        made.append((states[group] * sizes[:, None]).sum(0) / sizes.sum())
    joined = [[one for place in group for one in members[place]] for group in groups.values()]
    return torch.stack(made), joined


def prune(states, members, weights, keep, protect):
    """EViT, arXiv:2202.07800, section 3.2: the best go on, and the mean of the rest behind them."""
    order = sorted(range(protect, len(states)), key=lambda place: (-float(weights[place]), place))
    kept = math.ceil(keep * len(order) - 1e-9)
    stay, gone = [*range(protect), *sorted(order[:kept])], sorted(order[kept:])
    shares = weights[gone] / weights[gone].sum()
    states = torch.cat((states[stay], (shares[:, None] * states[gone]).sum(0, keepdim=True)))
    return states, [members[p] for p in stay] + [[one for p in gone for one in members[p]]]


def reduced(model, states, policy):
    """States behind a model's norm, ``[batch, tokens, width]``, from those before its blocks."""
    rows = []
    last = len(model.blocks) - 1
    cuts = policy.reducing_layers(len(model.blocks))
    for row in states:
        x, members = row, [[place] for place in range(len(row))]
        for number, block in enumerate(model.blocks):
            sizes = [float(len(one)) for one in members]
            sizes = sizes if hasattr(policy, "r") else [1.0] * len(sizes)
            if hasattr(block, "ls1"):
                made, keys, weights = attended(block.attn, block.norm1(x), sizes)
                x = x + block.ls1(made)
                x = x + block.ls2(block.mlp(block.norm2(x)))
            else:  # ResPostBlock
                made, keys, weights = attended(block.attn, x, sizes)
                x = x + block.norm1(made)
                x = x + block.norm2(block.mlp(x))
            if number == last or number not in cuts:
                continue
            if hasattr(policy, "r"):
                x, members = merge(x, members, keys, policy.r, model.num_prefix_tokens)
            else:
                x, members = prune(x, members, weights[0], policy.keep, model.num_prefix_tokens)
        whole = torch.empty_like(row)
        for state, group in zip(x, members, strict=True):
            whole[group] = state
        rows.append(whole)
    return model.norm(torch.stack(rows))
