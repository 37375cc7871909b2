"""F.scaled_dot_product_attention through decode_attention: the same answers, told which way."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from adaptive import _native
from adaptive.layers import torch_sdpa
from adaptive.layers.torch_sdpa import attention, why_stock

EPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _small_calls_count(monkeypatch):
    """Tests are small: let the kernel answer where PyTorch is as fast, too."""
    monkeypatch.setattr(torch_sdpa, "MIN_UNGROUPED_KEYS", 0)
    monkeypatch.setattr(torch_sdpa, "MAX_UNGROUPED_TOKENS", 16)


def native_calls():
    return _native.calls().get("decode_attention:cpu", 0)


def assert_as_good_as_stock(found, query, key, value, **options):
    """Error against float64 at most twice that of PyTorch in the same precision."""
    mask = options.pop("attn_mask", None)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    tensors = (query, key, value)
    gold = F.scaled_dot_product_attention(*(t.double() for t in tensors), wide, **options)
    stock = F.scaled_dot_product_attention(*tensors, mask, **options)
    assert found.shape == stock.shape
    assert found.dtype == stock.dtype
    error = (found.double() - gold).abs().max().item() if found.numel() else 0.0
    allowed = (stock.double() - gold).abs().max().item() if found.numel() else 0.0
    assert error <= 2 * allowed + 4 * EPS[query.dtype], (error, allowed)


@st.composite
def calls(draw):
    """Arguments that the native path takes: ranks, groups, layouts, masks, scales, dtypes."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    tokens, head_dim = draw(st.integers(1, 16)), draw(st.sampled_from([32, 40, 64]))
    is_causal = draw(st.booleans())
    keys = draw(st.integers(tokens if is_causal else 1, 80))
    per_head = draw(st.booleans())
    group = group if per_head else 1
    heads = (kv_heads * group,) if per_head else ()

    def tensor(heads, tokens):
        made = torch.randn(batch, tokens, *heads, head_dim, generator=generator).to(dtype)
        made = made.transpose(1, 2) if heads else made
        return made if draw(st.booleans()) else made.contiguous()

    query = tensor(heads, tokens)
    key, value = (tensor((kv_heads,) if per_head else (), keys) for _ in range(2))
    options = {"is_causal": is_causal, "scale": draw(st.sampled_from([None, 0.3, -1.0]))}
    if group > 1:
        options["enable_gqa"] = True
    if not is_causal and draw(st.booleans()):
        full = (batch, *heads, tokens, keys)
        shape = [size if draw(st.booleans()) else 1 for size in full]
        shape[-2:] = full[-2:]  # PyTorch's CPU kernels refuse other broadcasts at times
        mask = torch.rand(*shape[draw(st.integers(0, len(full) - 2)) :], generator=generator)
        kind = draw(st.sampled_from(["bool", "same", "float"]))
        if kind == "bool":
            mask = mask < 0.7
        else:
            mask = (4 * mask).to(dtype if kind == "same" else torch.float32)
        options["attn_mask"] = mask
    return (query, key, value), options


@given(calls())
def test_attention_equals_pytorch(call):
    tensors, options = call
    before = native_calls()
    found = attention(*tensors, **options)
    assert native_calls() == before + 1
    assert_as_good_as_stock(found, *tensors, **options)


def heads(*sizes, dtype=torch.float32):
    return torch.randn(*sizes, 64, dtype=dtype)


@pytest.mark.parametrize("keys", [1, 5, 90])
@pytest.mark.parametrize("tokens", [1, 5])
def test_is_causal_is_aligned_top_left(tokens, keys):
    query, key = heads(1, 2, tokens), heads(1, 2, keys)
    found = attention(query, key, key, is_causal=True)
    expected = F.scaled_dot_product_attention(query, key, key, is_causal=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:, :, 0], key[:, :, 0])  # the first query sees one key


def test_a_query_without_any_key_finds_zeros():
    query, key = heads(1, 2, 3), heads(1, 2, 70)
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[1] = False
    for given_mask in (mask, torch.zeros(3, 70).masked_fill(~mask, -torch.inf)):
        found = attention(query, key, key, given_mask)
        assert_as_good_as_stock(found, query, key, key, attn_mask=given_mask)
        assert found[:, :, 1].eq(0).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_without_heads_a_mask_belongs_to_the_batch(batch):
    query, key = heads(3, 2), heads(3, 70)
    mask = torch.rand(batch, 2, 70) < 0.5
    before = native_calls()
    found = attention(query, key, key, mask)
    assert native_calls() == before + 1
    assert_as_good_as_stock(found, query, key, key, attn_mask=mask)


def test_an_empty_batch_and_a_cache_read_in_place():
    assert attention(heads(0, 2, 1), heads(0, 2, 9), heads(0, 2, 9)).shape == (0, 2, 1, 64)
    cache = torch.full((1, 2, 4096, 64), torch.nan)
    cache[:, :, :70] = heads(1, 2, 70)
    query, key = heads(1, 2, 1), cache[:, :, :70]
    assert_as_good_as_stock(attention(query, key, key), query, key, key)


QUERY, KEY, MASK = heads(2, 4, 3), heads(2, 4, 70), torch.randn(3, 70)


@pytest.mark.parametrize(
    ("tokens", "keys", "kv_heads", "dtype", "native"),
    [
        (1, 2048, 4, torch.float32, True),
        (1, 2047, 4, torch.float32, False),
        (1, 64, 4, torch.bfloat16, True),
        (2, 64, 4, torch.bfloat16, False),
        (1, 64, 2, torch.float32, True),
        (8, 2048, 4, torch.float32, True),
        (9, 2048, 4, torch.float32, False),
        (9, 2048, 2, torch.float32, True),
    ],
)
def test_the_kernel_stays_away_where_pytorch_is_as_fast(
    monkeypatch, tokens, keys, kv_heads, dtype, native
):
    monkeypatch.undo()
    query, key = heads(1, 4, tokens, dtype=dtype), heads(1, kv_heads, keys, dtype=dtype)
    before = native_calls()
    found = attention(query, key, key, enable_gqa=True)
    assert native_calls() == before + native
    if not native:
        assert why_stock(query, key, key, None, 0.0, False, True) == "PyTorch is as fast"
        expected = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        assert torch.equal(found, expected)


STOCK = {
    "long query": ("query tokens", (heads(2, 4, 17), KEY, KEY), {}),
    "dropout": ("dropout", (QUERY, KEY, KEY), {"dropout_p": 0.5}),
    "float64": ("head_dim or dtype", (QUERY.double(), KEY.double(), KEY.double()), {}),
    "head size": ("head_dim or dtype", (QUERY[..., :20], KEY[..., :20], KEY[..., :20]), {}),
    "value size": ("shape", (QUERY, KEY, KEY[..., :32]), {}),
    "batch of one": ("shape", (QUERY, KEY[:1], KEY[:1]), {}),
    "no keys": ("shape", (QUERY, KEY[:, :, :0], KEY[:, :, :0]), {}),
    "causal, few keys": ("shape", (QUERY, KEY[:, :, :2], KEY[:, :, :2]), {"is_causal": True}),
    "mask and causal": ("mask", (QUERY, KEY, KEY), {"attn_mask": MASK, "is_causal": True}),
    "strided": ("memory layout", (QUERY, KEY.mT.contiguous().mT, KEY), {}),
    "five axes": ("number of dimensions", (QUERY[None], KEY[None], KEY[None]), {}),
    "gradient": ("gradient", (QUERY.clone().requires_grad_(), KEY, KEY), {}),
    "meta": ("device", (QUERY.to("meta"), KEY.to("meta"), KEY.to("meta")), {}),
}


@pytest.mark.parametrize("case", STOCK)
def test_other_calls_go_to_pytorch_and_the_reason_is_told(case):
    reason, tensors, options = STOCK[case]
    gqa = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    before = native_calls()
    with torch.enable_grad():
        assert why_stock(*tensors, **{**gqa, **options}) == reason
        torch.manual_seed(0)
        found = attention(*tensors, **options)
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(*tensors, **options)
    assert native_calls() == before
    assert found.requires_grad == expected.requires_grad
    if not found.is_meta:
        assert torch.equal(found, expected) or found.isnan().equal(expected.isnan())


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        ((QUERY, KEY, KEY), {"attn_mask": torch.ones(3, 71)}),
        ((QUERY, KEY, KEY), {"attn_mask": torch.ones(3, 70, dtype=torch.int32)}),
        ((QUERY, KEY.half(), KEY), {}),
        ((QUERY[0, 0, 0], KEY, KEY), {}),
    ],
    ids=["mask size", "mask dtype", "dtypes", "one axis"],
)
def test_bad_calls_raise_the_errors_of_pytorch(tensors, options):
    with pytest.raises((RuntimeError, ValueError, IndexError)) as stock:
        F.scaled_dot_product_attention(*tensors, **options)
    with pytest.raises(type(stock.value)) as ours:
        attention(*tensors, **options)
    assert str(ours.value) == str(stock.value)


def test_transforms_and_recorders_see_the_operator():
    before = native_calls()
    batched = torch.vmap(attention)(QUERY[:, None], KEY[:, None], KEY[:, None])
    torch.testing.assert_close(batched[:, 0], attention(QUERY, KEY, KEY))
    assert native_calls() == before + 1
    traced = torch.jit.trace(attention, (QUERY, KEY, KEY))
    other = torch.randn_like(QUERY)
    torch.testing.assert_close(traced(other, KEY, KEY), attention(other, KEY, KEY))


def test_autocast_returns_what_pytorch_returns():
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(QUERY, KEY, KEY)
        found = attention(QUERY, KEY, KEY)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
