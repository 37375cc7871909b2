"""Laws of sum_tokens: what is chosen and nothing else, added up in float32."""

import pytest
import torch
from choices import chosen_keys, everything, lists
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES

from adaptive.ops import sum_tokens


def source(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_every_head_size(head_dim, dtype, level):
    data = source((2, 3, 70, head_dim), dtype)
    indices, counts = lists(2, 3, 70, head_dim)
    taken = chosen_keys(indices, counts, 70)[..., None]
    right = data.double().masked_fill(~taken, 0).sum(2)
    made = sum_tokens(data, indices, counts)
    torch.testing.assert_close(made.double(), right, rtol=1e-5, atol=1e-5)


@given(
    st.integers(1, 2100),
    st.sampled_from([32, 64, 136]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
)
def test_only_what_is_chosen_counts(capacity, head_dim, dtype, seed):
    data = source((2, 2, capacity, head_dim), dtype, seed)
    indices, counts = lists(2, 2, capacity, seed)
    taken = chosen_keys(indices, counts, capacity)[..., None]
    made = sum_tokens(data, indices, counts)
    assert torch.equal(made, sum_tokens(data.masked_fill(~taken, torch.nan), indices, counts))
    right = data.double().masked_fill(~taken, 0).sum(2)
    torch.testing.assert_close(made.double(), right, rtol=1e-5, atol=1e-4)


def test_whole_numbers_are_added_exactly(level):
    data = torch.randint(-64, 64, (1, 2, 5000, 64), generator=torch.Generator().manual_seed(1))
    made = sum_tokens(data.to(torch.bfloat16), *everything(1, 2, 5000))
    assert torch.equal(made, data.sum(2).float())


def test_strides_are_followed():
    data = source((2, 50, 3, 64), torch.float16)
    choice = lists(2, 3, 50, 3)
    made = sum_tokens(data.transpose(1, 2), *choice)
    assert torch.equal(made, sum_tokens(data.transpose(1, 2).contiguous(), *choice))


def test_the_number_of_threads_changes_no_bit():
    data, choice = source((2, 3, 9000, 128), torch.bfloat16), lists(2, 3, 9000, 5)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(sum_tokens(data, *choice))
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
