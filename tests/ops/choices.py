"""Random choices of keys for the ops that read by list."""

import torch

from adaptive.ops.gather_attention import gather_attention

I32 = torch.int32


def lists(batch, kv_heads, entries, seed, most=None):
    """``(indices, counts)`` of random subsets; what follows a list's end is nonsense."""
    rng = torch.Generator().manual_seed(seed)
    most = entries if most is None else min(most, entries)
    indices = torch.full((batch, kv_heads, most), 2**30, dtype=I32)
    counts = torch.randint(0, most + 1, (batch, kv_heads), generator=rng, dtype=I32)
    for row in range(batch):
        for head in range(kv_heads):
            count = int(counts[row, head])
            chosen = torch.randperm(entries, generator=rng)[:count].sort().values
            indices[row, head, :count] = chosen.to(I32)
    return indices, counts


def everything(batch, kv_heads, entries):
    """``(indices, counts)`` that choose every entry."""
    indices = torch.arange(entries, dtype=I32).expand(batch, kv_heads, entries)
    return indices, torch.full((batch, kv_heads), entries, dtype=I32)


def chosen_keys(indices, counts, capacity, page_size=1):
    """Which keys are chosen, ``[batch, kv_heads, capacity]``, bool."""
    taken = torch.zeros(*counts.shape, capacity, dtype=torch.bool)
    for row in range(counts.shape[0]):
        for head in range(counts.shape[1]):
            for entry in indices[row, head, : int(counts[row, head])].tolist():
                taken[row, head, entry * page_size : (entry + 1) * page_size] = True
    return taken


def as_mask(arguments, taken):
    """The mask for decode_attention that leaves the chosen keys alone."""
    group = arguments["query"].shape[1] // arguments["key"].shape[1]
    taken = taken.repeat_interleave(group, 1)[:, :, None]
    mask = arguments["mask"]
    if mask is None:
        return taken
    if mask.dtype == torch.bool:
        return taken & mask
    return mask.expand(*taken.shape[:2], arguments["query"].shape[2], -1).masked_fill(
        ~taken, -torch.inf
    )


def gathered(arguments, indices, counts, **more):
    """gather_attention with a case's arguments."""
    return gather_attention(**arguments, indices=indices, counts=counts, **more)
