"""What the tests of the ops that route tokens share."""

import torch


def normal(*shape, dtype=torch.float32, seed=0):
    """Normal values of the dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def listed(rows):
    """Positions as the ops take them."""
    return torch.tensor(rows, dtype=torch.int32)


def spread(tensor, before, after):
    """The same elements with NaN before and after them in the last two dimensions."""
    sizes = [*tensor.shape[:-2], *(n + before + after for n in tensor.shape[-2:])]
    made = torch.full(sizes, torch.nan, dtype=tensor.dtype)
    for dim in (-2, -1):
        made = made.narrow(dim, before, tensor.shape[dim])
    return made.copy_(tensor)
