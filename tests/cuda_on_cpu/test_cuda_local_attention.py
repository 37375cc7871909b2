"""The CUDA kernels of local and block-sparse attention, run on the CPU, against float64."""

import mmap
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_cases import DTYPES, LISTS, ORDER, check, expected, inputs, poison, seen

from adaptive.ops import block_sparse_attention, local_attention

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
some_dtypes = pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
BAD = 2**31 - 1


def same(made, right):
    return all(torch.equal(a, b) for a, b in zip(made, right, strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@every_dtype
@pytest.mark.parametrize("number", range(len(local_attention.edges)))
def test_edges_of_local_attention(local, dtype, number):
    drawn = local_attention.make_inputs(**local_attention.edges[number], dtype=dtype, device="cpu")
    check(local, dict(zip(ORDER, drawn, strict=True)))


@every_dtype
@pytest.mark.parametrize("number", range(len(block_sparse_attention.edges)))
def test_edges_of_block_sparse_attention(local, dtype, number):
    drawn = block_sparse_attention.make_inputs(
        **block_sparse_attention.edges[number], dtype=dtype, device="cpu"
    )
    check(local, dict(zip(LISTS, drawn, strict=True)))


@st.composite
def cases(draw):
    """Sizes of a small problem in which windows, sinks, sequences and lists may all take part."""
    tokens = draw(st.integers(1, 170))
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9]))
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "batch": 2,
        "heads": group,
        "kv_heads": 1,
        "tokens": tokens,
        "query_tokens": draw(st.integers(1, tokens)),
        "head_dim": draw(st.sampled_from([32, 40, 64, 72])),
        "window": draw(st.one_of(st.none(), st.integers(1, tokens + 2))),
        "windows": draw(st.booleans()),
        "sinks": draw(st.one_of(st.just(0), st.integers(0, tokens + 2))),
        "sequences": draw(st.integers(0, 4)),
        "block_size": draw(st.sampled_from([0, 0, 16, 32, 64, 128])),
        "chosen": draw(st.integers(0, 11)),
        "per_head": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "causal": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=60, deadline=None)
@given(sizes=cases(), multiprocessors=st.sampled_from([1, 100]), seed=st.sampled_from([0, 1]))
def test_any_case_is_right_and_reads_what_is_seen(local_shared, sizes, multiprocessors, seed):
    """NaN in every key and value that no query sees, and behind each list."""
    local = local_shared
    local.set_device(multiprocessors)
    local.set_seed(seed)
    check(local, poison(inputs(**sizes)))


@some_dtypes
@pytest.mark.parametrize("multiprocessors", [1, 100])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 10])
def test_groups(local, dtype, group, multiprocessors):
    """Many heads in a block, or many tokens: with few multiprocessors blocks are large."""
    local.set_device(multiprocessors)
    sizes = {
        "heads": group,
        "kv_heads": 1,
        "tokens": 160,
        "query_tokens": 140,
        "window": 30,
        "sinks": 3,
    }
    check(local, poison(inputs(dtype, **sizes)))


BAD_DATA = {
    "offset below 0": ("offsets", (1, 0), -1),
    "offset behind the tokens": ("offsets", (1, 3), 151),
    "offset far behind": ("offsets", (1, 3), BAD),
    "offsets descend": ("offsets", (1, 2), 20),
    "window 0": ("windows", 1, 0),
    "window below 0": ("windows", 1, -BAD - 1),
    "block below 0": ("indices", (1, 0, 1, 0), -1),
    "block behind the tokens": ("indices", (1, 0, 1, 4), 10),
    "block far behind": ("indices", (1, 0, 1, 4), BAD),
    "blocks repeat": ("indices", (1, 0, 1, 3), 2),
    "count below 0": ("counts", (1, 0, 1), -1),
    "count above the room": ("counts", (1, 0, 1), 6),
    "count far above": ("counts", (1, 0, 1), BAD),
}
"""What is written where; everything that depends on it must be NaN, and nothing else."""


@some_dtypes
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_on_the_device_makes_nan_of_what_depends_on_it(local, dtype, name):
    argument, place, value = BAD_DATA[name]
    lists = {"block_size": 16, "chosen": 5} if argument in ("indices", "counts") else {}
    named = inputs(
        dtype, tokens=150, sequences=3, windows=argument == "windows", causal=False, **lists
    )
    named["offsets"] = int32((0, 30, 120, 150), (0, 50, 70, 150))
    if lists:
        named["indices"][:] = int32(0, 2, 4, 5, 9)
        named["counts"][:] = 5
    right = local(**named)
    named[argument][place] = value
    made = local(**named)
    bad = torch.zeros(right[1].shape, dtype=torch.bool)
    if argument == "offsets":
        bad[1] = True
    elif argument == "windows":
        bad[:, 1] = True
    else:
        bad[1, :2, 16:32] = True
    assert made[0][bad].isnan().all()
    assert made[1][bad].isnan().all()
    assert same([t[~bad] for t in made], [t[~bad] for t in right])
    assert not made[0][~bad].isnan().any()


def test_windows_and_sinks_may_be_far_larger_than_the_tokens(local):
    named = inputs(DTYPES[0], tokens=70, windows=True)
    named["windows"][:] = BAD
    right = check(local, named)
    assert same(local(**{**named, "windows": None, "window": 1, "sinks": BAD}), right)


@every_dtype
def test_layouts(local, dtype):
    """Token-major and odd pitches of all tensors, strided offsets, lists and counts."""
    named = inputs(dtype, tokens=90, head_dim=40, sequences=2, block_size=16, chosen=4)
    right = local(**named)
    for name in ("query", "key", "value"):
        tensor = named[name]
        odd = torch.full((*tensor.shape[:-1], 43), torch.nan, dtype=dtype)
        named[name] = odd[..., :40].copy_(tensor)
        if name == "key":
            named[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("indices", "counts"):
        named[name] = named[name].transpose(0, 1).contiguous().transpose(0, 1)
    named["offsets"] = torch.cat([named["offsets"]] * 2, 1)[:, :3]
    assert same(local(**named), right)
    out = torch.full((2, 90, 4, 43), torch.nan, dtype=dtype)
    assert same(local(**named, out=out[..., :40].transpose(1, 2)), right)
    assert out[..., 40:].isnan().all()
    wide = torch.full((2, 90, 4, 48), torch.nan, dtype=dtype)
    assert same(local(**named, out=wide[..., :40].transpose(1, 2)), right)
    assert wide[..., 40:].isnan().all()


@every_dtype
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize(("block_kib", "kib"), [(99, 100), (163, 164)], ids=["sm_89", "sm_80"])
def test_shared_memory_of_real_devices(local, dtype, head_dim, block_kib, kib):
    local.set_device(1, block_kib, kib)
    check(local, inputs(dtype, batch=1, heads=8, tokens=80, head_dim=head_dim, window=40))


@every_dtype
def test_results_do_not_depend_on_the_order_of_threads(local, dtype):
    local.set_device(1)
    named = inputs(dtype, tokens=300, window=90, sinks=20, sequences=2)
    right = local(**named)
    for seed in (1, 2):
        local.set_seed(seed)
        assert same(local(**named), right)


def sparse_memory(shape, dtype):
    """A tensor in a file of holes, and the number of bytes that exist of it."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    file = os.memfd_create("keys")
    os.ftruncate(file, size)
    tensor = torch.frombuffer(mmap.mmap(file, size), dtype=dtype).view(shape)
    return tensor, lambda: os.fstat(file).st_blocks * 512


@some_dtypes
@pytest.mark.parametrize("listed", [False, True], ids=["window", "list"])
def test_what_is_not_seen_is_not_read(local, dtype, listed):
    """Reading a hole makes a page: 2^21 keys, few of them seen, and no page more afterwards."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("needs memory files")
    named = inputs(dtype, batch=1, kv_heads=1, heads=2, tokens=400, query_tokens=20)
    tokens = 1 << 21
    more = {"window": 200, "sinks": 5}
    held = torch.cat([torch.arange(5), torch.arange(tokens - 219, tokens)])
    if listed:
        blocks = torch.tensor([1, 7000, 7001, tokens // 64 - 1])
        more = {"indices": blocks.int()[None, None, None], "counts": int32(4)[None, None]}
        more["block_size"] = 64
        held = (blocks[:, None] * 64 + torch.arange(64)).flatten()
    small = {**named, "key": named["key"][:, :, : len(held)]}
    small["value"] = named["value"][:, :, : len(held)]
    large, sizes = dict(named), []
    for name in ("key", "value"):
        large[name], size = sparse_memory((1, 1, tokens, 64), dtype)
        large[name][:, :, held] = small[name]
        sizes.append(size)
    before = [size() for size in sizes]
    made = local(**{**large, **more})
    assert [size() for size in sizes] == before
    mask = torch.ones(1, 2, 20, len(held), dtype=torch.bool).tril(len(held) - 20)
    if not listed:
        mask &= torch.ones(20, len(held), dtype=torch.bool).triu(5)
        mask[..., :5] = True
    exact, exact_lse = expected(small, mask)
    torch.testing.assert_close(made[0].double(), exact, rtol=4e-3, atol=1e-4)
    torch.testing.assert_close(made[1].double(), exact_lse, rtol=1e-5, atol=1e-5)


@every_dtype
def test_offsets_past_32_bits(local, dtype):
    """Twelve keys, 2^28 elements apart, in memory that is never touched in between."""
    stride, tokens = 2**28, 12
    size = stride * (tokens - 1) + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    flat = torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)
    named = inputs(dtype, batch=1, heads=1, kv_heads=1, tokens=tokens)
    right = local(**named)
    for name in ("key", "value", "query"):
        far = flat.as_strided((1, 1, tokens, 64), (0, 0, stride, 1)).copy_(named[name])
        assert same(local(**{**named, name: far}), right)
    far = flat.as_strided((1, 1, tokens, 64), (0, 0, stride, 1))
    assert same(local(**named, out=far), right)


def test_refusals_name_the_argument(local):
    named = inputs(DTYPES[0], tokens=20)
    short = {name: named[name][..., :60] for name in ("query", "key", "value")}
    with pytest.raises(RuntimeError, match=r"adaptive::local_attention: head_dim must .* got 60"):
        local(**{**named, **short})
    long = named["key"].new_empty(1).expand(2, 2, 2**30 + 1, 64)
    with pytest.raises(RuntimeError, match=r"key must have at most 2.30 tokens on CUDA"):
        local(**{**named, "key": long, "value": long})


def test_the_oracle_sees_what_it_should():
    """By hand: 6 tokens in sequences of 2 and 3, then padding; window 2, one sink."""
    named = inputs(DTYPES[0], batch=1, heads=1, kv_heads=1, tokens=6, window=2, sinks=1)
    named["offsets"] = int32(0, 2, 5)[None]
    assert seen(named)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
