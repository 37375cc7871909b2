"""The CUDA kernels of pool_blocks, run on the CPU, against means in float64."""

import pytest
import torch
from local_cases import DTYPES

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [
    (0, 2, 8, 64, 64),
    (2, 0, 8, 64, 64),
    (2, 2, 0, 64, 64),
    (1, 1, 1, 128, 64),
    (2, 3, 129, 40, 64),
    (2, 2, 127, 256, 64),
    (1, 2, 9, 72, 1),
    (1, 2, 300, 32, 1000),
    (3, 2, 200, 136, 16),
]
"""Batch, heads, tokens, head_dim and block_size."""


def source_of(dtype, batch, heads, tokens, head_dim):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, heads, tokens, head_dim, generator=generator).to(dtype)


def means(source, block_size, bounds):
    """By slices: the tokens of [first, last) of each row count."""
    batch, heads, tokens, head_dim = source.shape
    made = torch.zeros(batch, heads, -(-tokens // block_size), head_dim, dtype=torch.float64)
    for row, (first, last) in enumerate(bounds):
        for block in range(made.shape[2]):
            begin, end = max(first, block * block_size), min(last, (block + 1) * block_size)
            if begin < end:
                made[row, :, block] = source[row, :, begin:end].double().mean(1)
    return made


@every_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_means(local, dtype, sizes):
    *shape, block_size = sizes
    source = source_of(dtype, *shape)
    right = means(source, block_size, [(0, shape[2])] * shape[0])
    torch.testing.assert_close(local.pool(source, block_size).double(), right, rtol=2e-6, atol=2e-6)


@every_dtype
def test_padding_does_not_count_and_is_not_read(local, dtype):
    source = source_of(dtype, 4, 2, 150, 64)
    bounds = [(0, 150), (20, 120), (64, 64), (149, 150)]
    right = means(source, 32, bounds)
    for row, (first, last) in enumerate(bounds):
        source[row, :, :first] = source[row, :, last:] = torch.nan
    cuts = torch.tensor([[first, last - 1, last] for first, last in bounds], dtype=torch.int32)
    padded = torch.cat([cuts, cuts], 1)[:, :3]  # rows of another pitch
    torch.testing.assert_close(local.pool(source, 32, padded).double(), right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bad", [(-1, 9), (0, 151), (2**31 - 1, 2**31 - 1), (90, 80)], ids=str)
def test_bad_offsets_make_their_row_nan_alone(local, bad):
    source = source_of(DTYPES[0], 2, 2, 150, 64)
    made = local.pool(source, 64, torch.tensor([(0, 150), bad], dtype=torch.int32))
    assert made[1].isnan().all()
    assert torch.equal(made[0], local.pool(source, 64)[0])


@every_dtype
def test_layouts_and_the_order_of_threads(local, dtype):
    source = source_of(dtype, 2, 3, 130, 40)
    right = local.pool(source)
    odd = torch.full((2, 3, 130, 43), torch.nan, dtype=dtype)
    odd[..., :40] = source
    token_major = source.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (odd[..., :40], token_major, source):
        assert torch.equal(local.pool(given), right)
        local.set_seed(1)


def test_refusals_name_the_argument(local):
    with pytest.raises(RuntimeError, match=r"adaptive::pool_blocks: head_dim must .* got 60"):
        local.pool(source_of(DTYPES[0], 1, 1, 5, 60))
