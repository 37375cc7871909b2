"""Laws of block_sparse_attention: the listed blocks, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES
from window_cases import attend, blank_unseen, close, qkv

from adaptive.ops import block_sparse_attention, local_attention

SIZES = (16, 32, 64, 128)


def draw_lists(batch, lists, query_tokens, tokens, size, seed=0):
    """Lists of random length and blocks; entries after the count are out of range."""
    rng = torch.Generator().manual_seed(seed)
    rows, blocks = -(-query_tokens // size), -(-tokens // size)
    noise = torch.rand(batch, lists, rows, blocks, generator=rng)
    counts = torch.randint(0, blocks + 1, (batch, lists, rows), generator=rng).int()
    listed = torch.arange(blocks) < counts[..., None]
    order = noise.argsort(-1)
    taken = torch.zeros(noise.shape, dtype=torch.bool).scatter(3, order, listed)
    indices = torch.where(taken, torch.arange(blocks), 2**30).sort(-1).values.int()
    return indices, counts


def every_block(batch, lists, query_tokens, tokens, size):
    """Lists that name all blocks."""
    rows, blocks = -(-query_tokens // size), -(-tokens // size)
    indices = torch.arange(blocks, dtype=torch.int32).expand(batch, lists, rows, blocks)
    return indices.contiguous(), torch.full((batch, lists, rows), blocks, dtype=torch.int32)


def seen_by(indices, counts, heads, query_tokens, tokens, size, causal=True):
    """Which keys each query sees, ``[batch, heads, query_tokens, tokens]``, list by list."""
    batch, lists, rows, _ = indices.shape
    seen = torch.zeros(batch, heads, query_tokens, tokens, dtype=torch.bool)
    for row in range(batch):
        for head in range(heads):
            own = head * lists // heads
            for block in range(rows):
                for chosen in indices[row, own, block, : counts[row, own, block]].tolist():
                    queries = slice(block * size, (block + 1) * size)
                    seen[row, head, queries, chosen * size : (chosen + 1) * size] = True
    if causal:
        place = torch.arange(tokens - query_tokens, tokens)[:, None]
        seen &= torch.arange(tokens) <= place
    return seen


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(SIZES),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
)
def test_only_what_is_listed_counts(tokens, count, size, lists, causal, dtype, seed):
    count = min(count, tokens)
    query, key, value = qkv(tokens, count, dtype=dtype, seed=seed)
    indices, counts = draw_lists(2, lists, count, tokens, size, seed)
    seen = seen_by(indices, counts, 4, count, tokens, size, causal)
    key, value = blank_unseen(key, value, seen)
    made = block_sparse_attention(query, key, value, indices, counts, size, causal=causal)
    close(made, attend(query, key, value, seen), dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_blocks_are_dense_attention(size, dtype, level):
    query, key, value = qkv(333, 250, head_dim=64, dtype=dtype)
    made = block_sparse_attention(
        query, key, value, *every_block(2, 2, 250, 333, size), size, softcap=3.0
    )
    right = local_attention(query, key, value, softcap=3.0)
    for left, other in zip(made, right, strict=True):
        # Tiles of keys start where blocks do, so sums may be cut at other places.
        eps = torch.finfo(left.dtype).eps
        torch.testing.assert_close(left, other, rtol=max(1e-5, eps), atol=max(1e-5, eps / 8))


@given(st.sampled_from(SIZES), st.integers(0, 2**16))
def test_disjoint_lists_merge_to_their_union(size, seed):
    """By log-sum-exp, whatever the cut."""
    query, key, value = qkv(200, seed=seed)
    blocks = -(-200 // size)
    rng = torch.Generator().manual_seed(seed)
    first = torch.rand(2, 2, blocks, blocks, generator=rng) < 0.5
    parts = []
    for taken in (first, ~first):
        indices = torch.where(taken, torch.arange(blocks), 2**30).sort(-1).values.int()
        counts = taken.sum(3).int()
        parts.append(block_sparse_attention(query, key, value, indices, counts, size))
    whole = local_attention(query, key, value)
    lse = torch.stack([part[1] for part in parts])
    merged = torch.logsumexp(lse, 0)
    out = sum((part[0] * (part[1] - merged).exp()[..., None]) for part in parts)
    torch.testing.assert_close(merged, whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-5)


def test_an_empty_list_gives_zeros(level):
    query, key, value = qkv(150)
    indices, counts = every_block(2, 2, 150, 150, 64)
    counts[:, :, 1] = 0
    out, lse = block_sparse_attention(query, key, value, indices, counts)
    assert (out[:, :, 64:128] == 0).all()
    assert (lse[:, :, 64:128] == -torch.inf).all()
    assert lse[:, :, :64].isfinite().all()


def test_lists_per_head_are_lists_per_kv_head_repeated():
    query, key, value = qkv(300, heads=6, kv_heads=2)
    indices, counts = draw_lists(2, 2, 300, 300, 32)
    shared = block_sparse_attention(query, key, value, indices, counts, 32)
    own = block_sparse_attention(
        query, key, value, indices.repeat_interleave(3, 1), counts.repeat_interleave(3, 1), 32
    )
    for left, right in zip(shared, own, strict=True):
        assert torch.equal(left, right)


def test_offsets_cut_what_is_listed():
    query, key, value = qkv(200)
    indices, counts = draw_lists(2, 2, 200, 200, 64)
    offsets = torch.tensor([[0, 100, 200], [30, 150, 170]], dtype=torch.int32)
    seen = seen_by(indices, counts, 4, 200, 200, 64)
    for row, cuts in enumerate(offsets.tolist()):
        number = torch.bucketize(torch.arange(200), torch.tensor(cuts), right=True)
        inside = (number > 0) & (number < 3)
        seen[row] &= (number[:, None] == number) & inside[:, None]
    made = block_sparse_attention(query, key, value, indices, counts, offsets=offsets)
    close(made, attend(query, key, value, seen))


def test_threads_change_no_bit():
    query, key, value = qkv(600, head_dim=64, dtype=torch.bfloat16)
    indices, counts = draw_lists(2, 2, 600, 600, 64)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(block_sparse_attention(query, key, value, indices, counts)[0])
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])


def changed(index, value):
    def change(good):
        indices = good["indices"].clone()
        indices[index] = value
        return indices

    return change


BAD = {
    "block_size 24": ({"block_size": 24}, ValueError, "block_size must be 16, 32, 64 or 128"),
    "a block out of range": (
        {"indices": changed((1, 0, 2, 2), 3)},
        IndexError,
        r"indices\[1, 0, 2, 2\] must be in 0\.\.2, got 3",
    ),
    "a negative block": (
        {"indices": changed((0, 1, 0, 0), -1)},
        IndexError,
        r"indices\[0, 1, 0, 0\] must be in 0\.\.2, got -1",
    ),
    "a block twice": (
        {"indices": changed((0, 0, 1, 1), 0)},
        IndexError,
        r"indices\[0, 0, 1, 1\] must be more than the one before, 0, got 0",
    ),
    "a count beyond": (
        {"counts": lambda g: g["counts"] + 1},
        IndexError,
        r"counts\[0, 0, 0\] must be in 0\.\.3, got 4",
    ),
    "lists of other heads": (
        {"indices": lambda g: g["indices"].repeat_interleave(3, 1)},
        ValueError,
        "indices must have a list for each of 2 KV heads or 4 heads",
    ),
    "too few query blocks": (
        {"indices": lambda g: g["indices"][:, :, :2]},
        ValueError,
        r"indices must have size 3 in dimension 2",
    ),
    "indices int64": ({"indices": lambda g: g["indices"].long()}, TypeError, "must be int32"),
    "no counts": ({"counts": None}, TypeError, "counts must be a strided torch.Tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, message = BAD[name]
    query, key, value = qkv(150)
    indices, counts = every_block(2, 2, 150, 150, 64)
    good = {"query": query, "key": key, "value": value, "indices": indices, "counts": counts}
    given_ = {**good, **{k: v(good) if callable(v) else v for k, v in changes.items()}}
    with torch.no_grad(), pytest.raises(error, match=message):
        block_sparse_attention(**given_)
