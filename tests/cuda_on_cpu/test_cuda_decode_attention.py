"""The CUDA kernels of decode_attention, run on the CPU, against the formula in float64."""

import mmap

import pytest
import torch
from simulated import assert_close, plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(dtype, *, batch=2, kv_heads=2, group=2, query_tokens=1, capacity=150, head_dim=64):
    """Query, key and value of these sizes."""
    generator = torch.Generator().manual_seed(hash((group, query_tokens, capacity, head_dim)))
    sizes = (
        (batch, kv_heads * group, query_tokens, head_dim),
        (batch, kv_heads, capacity, head_dim),
        (batch, kv_heads, capacity, head_dim),
    )
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.fixture
def chosen():
    return torch.tensor([4, 1, 1])


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def check(decode, *tensors, **options):
    out, lse = decode(*tensors, **options)
    assert_close(out, lse, *tensors, **options)
    return out


@every_dtype
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8])
def test_group_ratios(decode, dtype, group):
    check(decode, *inputs(dtype, group=group, query_tokens=2, batch=1))


@every_dtype
@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 96, 128, 160, 256])
def test_head_dims(decode, dtype, head_dim):
    check(decode, *inputs(dtype, head_dim=head_dim, batch=1), lengths=int32(131))


@every_dtype
@pytest.mark.parametrize(("query_tokens", "group"), [(1, 1), (2, 4), (5, 7), (16, 2), (16, 5)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_query_tokens(decode, dtype, query_tokens, group, causal):
    """One to eighty rows per KV head: one, two and four tiles of rows, one and two blocks."""
    tensors = inputs(dtype, query_tokens=query_tokens, group=group, batch=1, capacity=90)
    check(decode, *tensors, causal=causal)


@every_dtype
@pytest.mark.parametrize("query_tokens", [1, 5])
def test_ragged_lengths_around_the_tile_size(decode, dtype, query_tokens):
    """Includes an empty row, and rows shorter than the query: early queries see nothing."""
    lengths = int32(0, 1, 3, 63, 64, 65, 130)
    tensors = inputs(dtype, batch=len(lengths), kv_heads=1, query_tokens=query_tokens, capacity=130)
    out = check(decode, *tensors, lengths=lengths)
    assert torch.equal(out[0], torch.zeros_like(out[0]))


@every_dtype
@pytest.mark.parametrize("query_tokens", [1, 5])
def test_rows_of_a_larger_cache(decode, dtype, query_tokens, chosen):
    """Bit by bit those of copies; one that the cache has not makes its row NaN."""
    query, key, value = inputs(dtype, batch=5, query_tokens=query_tokens)
    lengths = int32(150, 64, 7)
    want = decode(query[:3], key[chosen], value[chosen], lengths=lengths)
    made = decode(query[:3], key, value, lengths=lengths, cache_rows=chosen)
    assert_close(*made, query[:3], key[chosen], value[chosen], lengths=lengths)
    assert all(torch.equal(*pair) for pair in zip(made, want, strict=True))
    for wrong in (-1, 5):
        rows = torch.tensor([4, wrong, 1])
        out, lse = decode(query[:3], key, value, lengths=lengths, cache_rows=rows)
        assert out[1].isnan().all()
        assert lse[1].isnan().all()
        assert torch.equal(out[::2], want[0][::2])


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
def test_splits(decode, dtype, multiprocessors):
    """Many splits of a short row: most are empty, and their workspace stays NaN."""
    decode.set_device(multiprocessors)
    tensors = inputs(dtype, batch=2, kv_heads=1, capacity=1000)
    check(decode, *tensors, lengths=int32(1000, 65))
    assert (decode.splits == 1) == (multiprocessors == 1)
    assert decode.splits <= 1000 // 32 + 1


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize(
    ("block_kib", "kib"), [(99, 100), (163, 164), (227, 228)], ids=["sm_89", "sm_80", "sm_90"]
)
def test_shared_memory_of_real_devices(decode, dtype, head_dim, block_kib, kib):
    decode.set_device(4, block_kib, kib)
    tensors = inputs(dtype, batch=1, kv_heads=1, head_dim=head_dim, group=4, query_tokens=16)
    check(decode, *tensors)


def test_splits_fill_a_large_gpu(decode):
    """132 multiprocessors, two blocks each, 8 KV heads of 32k: every slot has work, in one wave."""
    decode.set_device(132)
    query = torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16)
    cache = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16).expand(1, 8, 32768, 128)
    decode(query, cache, cache, lengths=int32(0))
    assert 0.9 * 264 <= 8 * decode.splits <= 264


def masks(batch, heads, query_tokens, capacity):
    """Masks by name: full and broadcast, bool and added, and rows that they empty."""
    generator = torch.Generator().manual_seed(3)
    left = torch.arange(capacity) >= torch.tensor([70, 5])[:batch, None]
    random = torch.rand(batch, heads, query_tokens, capacity, generator=generator) > 0.3
    bias = torch.randn(batch, heads, query_tokens, capacity, generator=generator)
    empty = random.clone()
    empty[0, 1] = False
    return {
        "left padding": left[:, None, None],
        "full": random,
        "empty rows": empty,
        "bias per key": bias[:1, :1, :1],
        "bias": bias,
        "huge bias": torch.where(left, 0.0, torch.finfo(torch.float32).min)[:, None, None],
        "everything huge": torch.full((1, 1, 1, capacity), torch.finfo(torch.float32).min),
        "infinite bias": torch.where(random, bias, -torch.inf),
        "strided keys": bias.repeat_interleave(2, -1)[..., ::2],
    }


@every_dtype
@pytest.mark.parametrize("name", masks(1, 2, 1, 1))
def test_masks(decode, dtype, name):
    tensors = inputs(dtype, query_tokens=3, capacity=140)
    mask = masks(2, 4, 3, 140)[name]
    check(decode, *tensors, mask=mask, lengths=int32(140, 101))


@every_dtype
def test_softcap_and_scale(decode, dtype):
    check(decode, *inputs(dtype, batch=1), softcap=2.0, scale=0.7)


@every_dtype
def test_large_scores_do_not_overflow(decode, dtype):
    query, key, value = inputs(dtype, batch=1)
    out, lse = decode(query * 100, key * 10, value)
    exact, exact_lse = plain((query * 100).double(), (key * 10).double(), value.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-3)


def layouts(tensor):
    """The same values in other memory: [batch, token, head, dim], a pitch, a slice, odd offsets."""
    batch, heads, tokens, head_dim = tensor.shape
    pitch = torch.full((batch, heads, tokens, head_dim + 24), torch.nan).to(tensor.dtype)
    odd = torch.full((batch, heads, tokens, head_dim + 3), torch.nan).to(tensor.dtype)
    longer = torch.full((batch, heads, tokens + 9, head_dim), torch.nan).to(tensor.dtype)
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return {
        "token major": tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "pitch": pitch[..., :head_dim].copy_(tensor),
        "odd pitch": odd[..., :head_dim].copy_(tensor),
        "slice": longer[:, :, 4:-5].copy_(tensor),
        "odd offset": flat[1:].view(tensor.shape).copy_(tensor),
        "shared head": tensor[:, :1].expand(-1, heads, -1, -1),
    }


@every_dtype
@pytest.mark.parametrize("name", layouts(torch.zeros(1, 1, 1, 8)))
def test_layouts(decode, dtype, name):
    query, key, value = inputs(dtype, query_tokens=2, capacity=100, head_dim=40)
    query, key, value = (layouts(t)[name] for t in (query, key, value))
    out = torch.full((2, 2, 4, 40), torch.nan).transpose(1, 2)
    out, lse = decode(query, key, value, out=out)
    assert_close(out, lse, query, key, value)


@every_dtype
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=["bool", "added"])
def test_poison_outside_the_keys_has_no_effect(decode, dtype, mask_dtype):
    """NaN beyond the length, and in keys that the mask hides from every query."""
    query, key, value = inputs(dtype, query_tokens=2, capacity=150)
    lengths = int32(71, 150)
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    mask[1, ..., 3:20] = False
    if mask_dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected = decode(query, key, value, lengths=lengths, mask=mask)
    for tensor in (key, value):
        tensor[0, :, 71:] = torch.nan
        tensor[1, :, 3:20] = torch.nan
    actual = decode(query, key, value, lengths=lengths, mask=mask)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["one split", "many splits"])
def test_a_length_out_of_range_makes_its_row_nan(decode, dtype, multiprocessors):
    decode.set_device(multiprocessors)
    tensors = inputs(dtype, batch=4, kv_heads=1, capacity=300)
    out, lse = decode(*tensors, lengths=int32(-1, 300, 301, 7))
    assert out[[0, 2]].isnan().all()
    assert lse[[0, 2]].isnan().all()
    good = [1, 3]
    assert_close(out[good], lse[good], *(t[good] for t in tensors), lengths=int32(300, 7))


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["one split", "many splits"])
def test_what_other_rows_hold_changes_no_bit(decode, dtype, multiprocessors):
    decode.set_device(multiprocessors)
    tensors = inputs(dtype, batch=3, query_tokens=2, capacity=300)
    before = decode(*tensors, lengths=int32(200, 300, 7))
    moved = [t[[2, 0, 1]] * t.new_tensor([9, 1, 9]).view(3, 1, 1, 1) for t in tensors]
    after = decode(*moved, lengths=int32(0, 200, 130))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[0], b[1])


@every_dtype
def test_nan_in_a_key_reaches_its_row_alone(decode, dtype):
    query, key, value = inputs(dtype, kv_heads=1)
    key[0, 0, 40] = torch.nan
    out, _ = decode(query, key, value)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@every_dtype
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_any_order_of_threads_gives_the_same_bits(decode, dtype, seed):
    tensors = inputs(dtype, query_tokens=5, group=4, capacity=260)
    decode.set_device(8)
    options = {"lengths": int32(260, 33), "mask": masks(2, 8, 5, 260)["full"]}
    expected = decode(*tensors, **options)
    decode.set_seed(seed)
    actual = decode(*tensors, **options)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_dtype
def test_offsets_past_32_bits(decode, dtype):
    """Twelve keys, 2^28 elements apart, in memory that is never touched in between."""
    stride, capacity, head_dim = 2**28, 12, 64
    size = stride * (capacity - 1) + head_dim
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    flat = torch.frombuffer(memory, dtype=dtype)
    key = flat.as_strided((1, 1, capacity, head_dim), (0, 0, stride, 1))
    query, near_key, value = inputs(dtype, batch=1, kv_heads=1, capacity=capacity)
    key.copy_(near_key)
    expected = decode(query, near_key, value)
    actual = decode(query, key, value)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("empty", ["batch", "query_tokens"])
def test_nothing_to_do(decode, empty):
    out, lse = decode(*inputs(torch.bfloat16, **{empty: 0}))
    assert out.numel() == lse.numel() == 0


@every_dtype
def test_a_cache_without_capacity_gives_zeros(decode, dtype):
    out, lse = decode(*inputs(dtype, capacity=0), lengths=int32(0, 0))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()


def test_refusals_name_the_argument(decode):
    tensors = inputs(torch.bfloat16, capacity=1000)
    with pytest.raises(RuntimeError, match=r"adaptive::decode_attention: workspace must hold \d+"):
        decode(*tensors, short_workspace=4)
    with pytest.raises(RuntimeError, match=r"head_dim must be a multiple of 8 up to 256, got 44"):
        decode(*inputs(torch.bfloat16, head_dim=44))
    query, key, value = inputs(torch.bfloat16, capacity=1)
    long = (t.expand(-1, -1, 2**30 + 1, -1) for t in (key, value))
    with pytest.raises(RuntimeError, match=r"capacity must be at most 2\^30 on CUDA"):
        decode(query, *long)
