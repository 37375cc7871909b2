"""The CUDA kernels of gather_attention, run on the CPU, against the formula in float64."""

import mmap

import pytest
import torch
from simulated import assert_close

from adaptive.ops import gather_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = (
    "query", "key", "value", "indices", "counts", "lengths", "mask",
    "extra_key", "extra_value", "extra_bias", "scale", "softcap", "causal", "page_size",
)  # fmt: skip


def inputs(dtype, *, seed=0, **sizes):
    """Named arguments of these sizes, as the op's own make_inputs draws them."""
    full = {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 150, "head_dim": 64, "chosen": 40}
    drawn = gather_attention.make_inputs(**{**full, **sizes}, dtype=dtype, device="cpu", seed=seed)
    return dict(zip(NAMES, drawn, strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def dense(named):
    """Query, key, value and mask with which dense attention gives the same; by plain loops.

    Keys that were not chosen hold zeros: what they held must not matter.
    """
    query, key, value = named["query"], named["key"].clone(), named["value"].clone()
    batch, heads, tokens, _ = query.shape
    kv_heads, capacity = key.shape[1:3]
    lengths = named["lengths"]
    bias = torch.full((batch, heads, tokens, capacity), -torch.inf)
    for b in range(batch):
        length = capacity if lengths is None else int(lengths[b])
        for h in range(kv_heads):
            taken = torch.zeros(capacity, dtype=torch.bool)
            for page in named["indices"][b, h, : int(named["counts"][b, h])].tolist():
                taken[page * named["page_size"] : (page + 1) * named["page_size"]] = True
            taken[length:] = False
            key[b, h, ~taken] = value[b, h, ~taken] = 0
            group = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
            for t in range(tokens):
                seen = taken.clone()
                if named["causal"]:
                    seen[max(length - tokens + t + 1, 0) :] = False
                bias[b, group, t] = torch.where(seen, 0.0, -torch.inf)
    mask = named["mask"]
    if mask is not None:
        mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        bias = bias + mask
    if named["extra_bias"] is not None:
        extra = named["extra_bias"].repeat_interleave(heads // kv_heads, 1)[:, :, None]
        bias = torch.cat([bias, extra.expand(-1, -1, tokens, -1)], 3)
        key = torch.cat([key, named["extra_key"]], 2)
        value = torch.cat([value, named["extra_value"]], 2)
    return query, key, value, bias


def run(sparse, named):
    return sparse.gather(**named)


def check(sparse, named):
    out, lse = run(sparse, named)
    if lse.numel() == 0:
        return out, lse
    query, key, value, bias = dense(named)
    options = {"mask": bias, "causal": False, "scale": named["scale"], "softcap": named["softcap"]}
    assert_close(out, lse, query, key, value, **options)
    return out, lse


@every_dtype
@pytest.mark.parametrize("number", range(len(gather_attention.edges)))
def test_edges(sparse, dtype, number):
    check(sparse, inputs(dtype, **gather_attention.edges[number]))


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
@pytest.mark.parametrize("extra", [0, 5])
def test_splits(sparse, dtype, multiprocessors, extra):
    """One split and many, most of them empty: a list may be far shorter than its room."""
    sparse.set_device(multiprocessors)
    named = inputs(dtype, kv_heads=1, capacity=700, chosen=600, extra=extra)
    named["counts"] = int32(600, 3)[:, None]
    check(sparse, named)
    assert sparse.one_split == (multiprocessors == 1)


@every_dtype
@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
def test_pages_are_their_tokens(sparse, dtype, page_size):
    """The same tokens as pages and as a list; the last page is cut by the capacity."""
    pages = torch.tensor([0, 1, 149 // page_size])
    named = inputs(dtype, batch=1, kv_heads=1, page_size=page_size, extra=2, query_tokens=3)
    named["indices"], named["counts"] = pages.int()[None, None], int32(len(pages))[None]
    paged = check(sparse, named)
    tokens = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
    tokens = tokens[tokens < 150]
    named["indices"], named["counts"] = tokens.int()[None, None], int32(len(tokens))[None]
    listed = check(sparse, {**named, "page_size": 1})
    for a, b in zip(paged, listed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_dtype
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_tokens", "group"), [(2, 4), (5, 7), (16, 5)])
def test_query_tokens(sparse, dtype, query_tokens, group, causal):
    """By position in the cache: the latest chosen keys are too late for the first queries."""
    named = inputs(dtype, batch=2, heads=group, kv_heads=1, query_tokens=query_tokens, chosen=70)
    named["lengths"] = int32(150, 60)
    named["indices"][:, :, -8:] = torch.arange(142, 150)
    named["indices"][1, :, :50] = torch.arange(12, 62)
    named["indices"] = named["indices"].sort(-1).values.contiguous()
    for head in named["indices"].flatten(0, 1):
        head.copy_(torch.cat([head.unique(), int32(*[0] * (70 - len(head.unique())))]))
    named["counts"] = int32(*(int((i.diff() > 0).sum()) + 1 for i in named["indices"][:, 0]))[
        :, None
    ]
    check(sparse, {**named, "causal": causal})


@every_dtype
@pytest.mark.parametrize("extra", [1, 16, 17, 33, 64])
def test_extra_tokens(sparse, dtype, extra):
    """Seen by every query, whatever lengths and mask say; a bias of -inf leaves one out."""
    named = inputs(
        dtype, kv_heads=1, extra=extra, query_tokens=3, mask="bool", ragged=True, chosen=9
    )
    named["lengths"] = int32(150, 0)
    named["counts"] = int32(9, 0)[:, None]
    named["extra_bias"][0, 0, 0] = -torch.inf
    expected = check(sparse, named)
    named["extra_key"][0, 0, 0] = named["extra_value"][0, 0, 0] = torch.nan
    actual = run(sparse, named)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_dtype
@pytest.mark.parametrize("mask", [None, "bool", "add"])
def test_what_was_not_chosen_is_not_read(sparse, dtype, mask):
    """NaN in every other key and value, and in the list behind its count."""
    named = inputs(dtype, query_tokens=2, mask=mask, extra=3, ragged=True)
    named["lengths"] = int32(150, 77)
    expected = check(sparse, named)
    taken = dense({**named, "mask": None})[3][:, ::2, -1, :150] == 0
    for name in ("key", "value"):
        named[name][~taken] = torch.nan
    for row, count in zip(named["indices"].flatten(0, 1), named["counts"].flatten(), strict=True):
        row[count:] = 2**31 - 1
    actual = run(sparse, named)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


BAD_LISTS = {
    "negative": (3, -5),
    "too large": (-1, 150),
    "far too large": (-1, 2**31 - 1),
    "twice the same": (20, None),
    "descending": (32, 0),
    "negative first": (0, -1),
}
"""What is written over entry i of a list of 40; None: its neighbour."""


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["one split", "many splits"])
@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_makes_its_head_nan_alone(sparse, dtype, multiprocessors, name):
    sparse.set_device(multiprocessors)
    named = inputs(dtype, chosen=40, extra=2)
    named["counts"][:] = 40
    expected = run(sparse, named)
    at, entry = BAD_LISTS[name]
    named["indices"][1, 0, at] = named["indices"][1, 0, at - 1] if entry is None else entry
    out, lse = run(sparse, named)
    assert out[1, :2].isnan().all()
    assert lse[1, :2].isnan().all()
    out[1, :2], lse[1, :2] = expected[0][1, :2], expected[1][1, :2]
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["one split", "many splits"])
def test_a_bad_count_or_length_makes_its_rows_nan(sparse, dtype, multiprocessors):
    sparse.set_device(multiprocessors)
    named = inputs(dtype, batch=4, kv_heads=1, capacity=200, chosen=90)
    named["counts"] = int32(-1, 90, 91, 7)[:, None]
    out, lse = run(sparse, named)
    assert torch.equal(
        out.isnan().all(-1), torch.tensor([1, 0, 1, 0])[:, None, None].expand(4, 4, 1) == 1
    )
    assert torch.equal(lse.isnan(), out.isnan().all(-1))
    named["counts"][:] = 7
    out, lse = run(sparse, {**named, "lengths": int32(200, 201, -1, 0)})
    assert torch.equal(lse[:, 0, 0].isnan(), torch.tensor([0, 1, 1, 0]) == 1)
    assert out[1:3].isnan().all()
    assert not out[::3].isnan().any()


@every_dtype
def test_layouts(sparse, dtype):
    """Token-major and odd pitches, of the cache, the extra tokens, the lists and the counts."""
    named = inputs(dtype, query_tokens=2, extra=3, head_dim=40)
    expected = run(sparse, named)
    for name in ("key", "extra_key", "value", "extra_value"):
        tensor = named[name]
        odd = torch.full((*tensor.shape[:-1], 43), torch.nan, dtype=dtype)
        named[name] = odd[..., :40].copy_(tensor)
        if "key" in name:
            named[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    named["extra_bias"] = named["extra_bias"].transpose(1, 2).contiguous().transpose(1, 2)
    named["indices"] = named["indices"].transpose(0, 1).contiguous().transpose(0, 1)
    named["counts"] = named["counts"].t().contiguous().t()
    actual = run(sparse, named)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize(("block_kib", "kib"), [(99, 100), (163, 164)], ids=["sm_89", "sm_80"])
def test_shared_memory_of_real_devices(sparse, dtype, head_dim, block_kib, kib):
    sparse.set_device(4, block_kib, kib)
    check(sparse, inputs(dtype, batch=1, kv_heads=1, head_dim=head_dim, query_tokens=16, extra=2))


@every_dtype
@pytest.mark.parametrize("seed", [1, 2])
def test_results_do_not_depend_on_the_order_of_threads(sparse, dtype, seed):
    named = inputs(dtype, query_tokens=5, capacity=400, chosen=300, extra=3, mask="bool")
    expected = run(sparse, named)
    sparse.set_seed(seed)
    actual = run(sparse, named)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_dtype
def test_offsets_past_32_bits(sparse, dtype):
    """Twelve keys, 2^28 elements apart, in memory that is never touched in between."""
    stride, capacity = 2**28, 12
    size = stride * (capacity - 1) + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    flat = torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)
    named = inputs(dtype, batch=1, heads=1, kv_heads=1, capacity=capacity, chosen=9)
    expected = run(sparse, named)
    far = flat.as_strided((1, 1, capacity, 64), (0, 0, stride, 1)).copy_(named["key"])
    actual = run(sparse, {**named, "key": far})
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_refusals_name_the_argument(sparse):
    named = inputs(torch.bfloat16, capacity=1000, chosen=900)
    with pytest.raises(RuntimeError, match=r"adaptive::gather_attention: workspace must hold \d+"):
        run(sparse, {**named, "short_workspace": 4})
    with pytest.raises(RuntimeError, match="page_size must be a power of two up to 64, got 3"):
        run(sparse, {**named, "page_size": 3})
    extra = {"extra_bias": torch.zeros(2, 2, 65)}
    extra |= dict.fromkeys(("extra_key", "extra_value"), torch.zeros(2, 2, 65, 64).bfloat16())
    with pytest.raises(RuntimeError, match="extra_key must have at most 64 tokens, got 65"):
        run(sparse, {**named, **extra})
