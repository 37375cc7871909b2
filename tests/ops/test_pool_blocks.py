"""Laws of pool_blocks: the mean of what counts in each block and of nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES

from adaptive.ops import pool_blocks

I32 = torch.int32


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def source(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def means(data, block_size, first=None, last=None):
    """The same in float64, block by block."""
    batch, heads, tokens, head_dim = data.shape
    made = torch.zeros(batch, heads, -(-tokens // block_size), head_dim, dtype=torch.float64)
    for row in range(batch):
        low = 0 if first is None else first[row]
        high = tokens if last is None else last[row]
        for block in range(made.shape[2]):
            begin, end = max(low, block * block_size), min(high, (block + 1) * block_size)
            if begin < end:
                made[row, :, block] = data[row, :, begin:end].double().mean(1)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_every_head_size(head_dim, dtype, level):
    data = source((2, 2, 70, head_dim), dtype)
    made = pool_blocks(data, 16)
    torch.testing.assert_close(made.double(), means(data, 16), rtol=1e-5, atol=1e-5)


@given(
    st.integers(0, 300),
    st.integers(1, 130),
    st.sampled_from([32, 64, 136]),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_only_what_lies_between_the_offsets_counts(tokens, block_size, head_dim, dtype, more):
    data = source((2, 3, tokens, head_dim), dtype, tokens)
    ends = st.lists(st.integers(0, tokens), min_size=3, max_size=3).map(sorted)
    offsets = torch.tensor([more.draw(ends), more.draw(ends)], dtype=I32)
    made = pool_blocks(data, block_size, offsets)
    position = torch.arange(tokens)
    padding = (position < offsets[:, :1]) | (position >= offsets[:, 2:])
    ruined = data.masked_fill(padding[:, None, :, None], torch.nan)
    assert torch.equal(pool_blocks(ruined, block_size, offsets), made)
    right = means(data, block_size, offsets[:, 0].tolist(), offsets[:, 2].tolist())
    torch.testing.assert_close(made.double(), right, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 200), st.integers(1, 64))
def test_means_of_blocks_weighed_by_their_tokens_are_the_mean_of_all(tokens, block_size):
    data = source((1, 2, tokens, 64), seed=tokens)
    made = pool_blocks(data, block_size)
    sizes = torch.tensor([min(block_size, tokens - n) for n in range(0, tokens, block_size)])
    total = (made * sizes[:, None]).sum(2) / tokens
    torch.testing.assert_close(total, data.mean(2), rtol=1e-4, atol=1e-5)


def test_blocks_of_one_token_are_the_tokens(level):
    data = source((2, 2, 9, 72), torch.bfloat16)
    assert torch.equal(pool_blocks(data, 1), data.float())


def test_whole_numbers_are_averaged_exactly(level):
    data = torch.randint(-64, 64, (1, 2, 512, 64), generator=torch.Generator().manual_seed(1))
    made = pool_blocks(data.to(torch.bfloat16), 128)
    assert torch.equal(made, data.view(1, 2, 4, 128, 64).double().mean(3).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_are_followed(dtype, level):
    data = source((2, 150, 3, 96), dtype)
    made = pool_blocks(data.transpose(1, 2), 64)
    assert torch.equal(made, pool_blocks(data.transpose(1, 2).contiguous(), 64))
    wide = source((2, 3, 150, 104), dtype)[..., :96]
    assert torch.equal(pool_blocks(wide, 64), pool_blocks(wide.contiguous(), 64))


def test_a_row_depends_on_itself_alone():
    data = source((3, 2, 3000, 128), torch.bfloat16)
    whole = pool_blocks(data)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(pool_blocks(data), whole)
    torch.set_num_threads(before)
    assert torch.equal(pool_blocks(data[1:2, 1:]), whole[1:2, 1:])
    assert torch.equal(pool_blocks(data[:, :, 640:]), whole[:, :, 10:])


def int32(*rows):
    return torch.tensor(rows, dtype=I32)


GOOD = {"source": torch.zeros(1, 2, 10, 64), "block_size": 4, "offsets": None}
BAD = {
    "blocks of nothing": ({"block_size": 0}, ValueError, "block_size must be at least 1.*got 0"),
    "negative blocks": ({"block_size": -8}, ValueError, "block_size must be at least 1.*got -8"),
    "huge blocks": ({"block_size": 2**31}, ValueError, "block_size must be .*below 2.31, got 2147"),
    "half a block": ({"block_size": 1.5}, TypeError, "block_size must be a whole number"),
    "source of rank 3": ({"source": torch.zeros(2, 10, 64)}, ValueError, "source must have 4 dim"),
    "source of float64": (
        {"source": torch.zeros(1, 2, 10, 64).double()},
        TypeError,
        "source must be float32 or float16 or bfloat16, got torch.float64",
    ),
    "head_dim of 20": ({"source": torch.zeros(1, 2, 10, 20)}, ValueError, "head_dim of 32..256"),
    "head_dim with gaps": (
        {"source": torch.zeros(1, 2, 10, 128)[..., ::2]},
        ValueError,
        "source must be contiguous in its last dimension, got stride 2",
    ),
    "one offset": ({"offsets": int32([3])}, ValueError, "offsets must have at least 2 entries"),
    "offsets of another batch": (
        {"offsets": int32([0, 5], [0, 5])},
        ValueError,
        "offsets must have size 1 in dimension 0",
    ),
    "offsets of int64": ({"offsets": int32([0, 5]).long()}, TypeError, "offsets must be int32"),
    "an offset beyond the end": (
        {"offsets": int32([0, 11])},
        IndexError,
        r"offsets\[0, 1\] must be in 0\.\.10, not below the one before, got 11",
    ),
    "descending offsets": (
        {"offsets": int32([0, 7, 5])},
        IndexError,
        r"offsets\[0, 2\] must be in 7\.\.10, not below the one before, got 5",
    ),
    "a negative offset": ({"offsets": int32([-1, 5])}, IndexError, r"offsets\[0, 0\].*got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused_by_name(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=f"adaptive::pool_blocks: .*{message}"):
        pool_blocks(**{**GOOD, **changes})
