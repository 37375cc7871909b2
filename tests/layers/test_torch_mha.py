"""nn.MultiheadAttention without projecting the memory: the same answers, told which way."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptive
from adaptive import _native
from adaptive.layers.memory_attention import MAX_NATIVE_ROWS

EPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
MEMORY = 100


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def native_calls():
    return _native.calls().get("decode_attention:cpu", 0)


def answered(handle):
    """Calls of each layer that stock did not answer."""
    return [layer.native_calls + layer.torch_calls for layer in handle.report().layers]


def attention(width=128, heads=2, seed=0, **options):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(width, heads, **options).eval()
    for name, parameter in module.named_parameters():
        if "bias" in name:  # zero by default, which would hide a mistake
            nn.init.normal_(parameter)
    return module


def inputs(tokens=1, memory=MEMORY, width=128, batch=2, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, tokens, width).to(dtype), torch.randn(batch, memory, width).to(dtype)


def assert_as_good_as_stock(module, arguments, options):
    """Patched error against float64 at most twice the stock error; dtypes and shapes the same."""
    gold = copy.deepcopy(module).double()
    wide = [a.double() for a in arguments]
    if arguments[2] is arguments[1]:
        wide[2] = wide[1]
    masks = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in options.items()
    }
    expected, stock = gold(*wide, **masks), module(*arguments, **options)
    with adaptive.patch(module) as handle:
        found = module(*arguments, **options)
        assert answered(handle) == [1]
        assert handle.report().layers[0].stock_calls == {}
    eps = EPS[arguments[0].dtype]
    for ours, theirs, truth in zip(found, stock, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.isnan().equal(theirs.isnan())
        error = (ours.double() - truth).nan_to_num().abs().max()
        allowed = (theirs.double() - truth).nan_to_num().abs().max()
        assert error <= 2 * allowed + 4 * eps * (1 + truth.nan_to_num().abs().max())


@st.composite
def calls(draw):
    """A module and a call that patch() takes: layouts, widths, masks, weights, dtypes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([20, 32, 64]))
    batched, batch_first = draw(st.booleans()), draw(st.booleans())
    batch = draw(st.integers(1, 3)) if batched else 1
    tokens, memory = draw(st.integers(1, 16)), draw(st.integers(64, 90))
    widths = {"kdim": draw(st.sampled_from([None, 48])), "vdim": draw(st.sampled_from([None, 72]))}
    module = attention(
        heads * head_dim,
        heads,
        seed=draw(st.integers(0, 9)),
        bias=draw(st.booleans()),
        batch_first=batch_first,
        **widths,
    ).to(dtype)

    def tensor(tokens, width):
        sizes = (batch, tokens) if batch_first else (tokens, batch)
        made = torch.randn(*sizes, width, generator=generator).to(dtype)
        return made if batched else made.reshape(tokens, width)

    query = tensor(tokens, module.embed_dim)
    key = tensor(memory, module.kdim)
    same = module.vdim == module.kdim and draw(st.booleans())
    value = key if same else tensor(memory, module.vdim)
    options = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    floating = draw(st.booleans())

    def mask(*sizes):
        out = torch.rand(*sizes, generator=generator) < 0.3
        if not floating:
            return out
        return (4 * torch.randn(*sizes, generator=generator)).masked_fill(out, -torch.inf).to(dtype)

    if draw(st.booleans()):
        options["key_padding_mask"] = mask(*((batch, memory) if batched else (memory,)))
    if draw(st.booleans()):
        stacked = (batch * heads,) if draw(st.booleans()) else ()
        options["attn_mask"] = mask(*stacked, tokens, memory)
        if stacked == () and draw(st.booleans()):
            causal = torch.ones(tokens, memory, dtype=torch.bool).triu(1)
            options["attn_mask"] = torch.zeros(causal.shape, dtype=dtype)
            options["attn_mask"].masked_fill_(causal, -torch.inf)
            if not floating:
                options["attn_mask"] = causal
            options["is_causal"] = True
    return module, (query, key, value), options


@given(calls())
def test_patched_attention_is_as_good_as_stock(call):
    assert_as_good_as_stock(*call)


@pytest.mark.parametrize("heads", [2, 6])  # with the kernel, and with more rows than it takes
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("floating", [False, True])
def test_a_query_without_any_key_gives_what_stock_gives(floating, need_weights, heads):
    module, (query, memory) = attention(192, heads, batch_first=True), inputs(3, width=192)
    mask = torch.zeros(3, MEMORY, dtype=torch.bool)
    mask[1] = True
    if floating:
        mask = torch.zeros(3, MEMORY).masked_fill(mask, -torch.inf)
    options = {"attn_mask": mask, "need_weights": need_weights}
    assert_as_good_as_stock(module, (query, memory, memory), options)


def test_is_causal_is_taken_at_its_word_as_stock_does():
    """Stock reads no mask then; with padding or weights it reads the mask."""
    module, (query, memory) = attention(batch_first=True), inputs(tokens=3)
    nothing = torch.zeros(3, MEMORY)
    padding = torch.zeros(2, MEMORY)
    for options in (
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": False, "key_padding_mask": padding},
    ):
        options |= {"attn_mask": nothing, "is_causal": True}
        assert_as_good_as_stock(module, (query, memory, memory), options)


@pytest.mark.parametrize(("width", "native"), [(128, True), (256, True), (320, False)])
def test_the_kernel_runs_where_it_can_and_is_reported(width, native):
    module, (query, memory) = attention(width, 2, batch_first=True), inputs(width=width)
    with adaptive.patch(module) as handle:
        before = native_calls()
        module(query, memory, memory, need_weights=False)
        assert native_calls() == before + native
        layer = handle.report().layers[0]
    assert (layer.native_calls, layer.torch_calls) == (int(native), int(not native))
    assert (layer.query_tokens, layer.kv_tokens) == (2, 2 * MEMORY)
    assert layer.kv_bytes == memory.nbytes


def test_many_rows_go_to_a_matrix_product():
    heads = 4
    module, (query, memory) = attention(128, heads, batch_first=True), inputs(tokens=8)
    assert heads * query.shape[1] > MAX_NATIVE_ROWS
    with adaptive.patch(module) as handle:
        before = native_calls()
        module(query, memory, memory, need_weights=False)
        assert native_calls() == before
        assert handle.report().layers[0].torch_calls == 1
        assert handle.report().to_dict()["layers"][0]["torch_calls"] == 1


QUERY, KEYS = inputs()
STOCK = {
    "self-attention": ("short memory", attention(batch_first=True), (QUERY, QUERY)),
    "long query": ("query tokens", attention(batch_first=True), (KEYS, KEYS)),
    "narrow heads": ("heads narrower", attention(heads=16, batch_first=True), (inputs(9)[0], KEYS)),
    "float64": ("dtype", attention(batch_first=True).double(), (QUERY.double(), KEYS.double())),
    "meta": ("device", attention(batch_first=True).to("meta"), (QUERY.to("meta"), KEYS.to("meta"))),
    "gradient": ("gradient", attention(batch_first=True), (QUERY.clone().requires_grad_(), KEYS)),
}


@pytest.mark.parametrize("case", STOCK)
def test_other_calls_stay_stock_and_the_reason_is_told(case):
    reason, module, (query, memory) = STOCK[case]
    with torch.set_grad_enabled(case == "gradient"):
        expected, _ = module(query, memory, memory)
        with adaptive.patch(module) as handle:
            found, _ = module(query, memory, memory)
            (told,) = handle.report().layers[0].stock_calls
    assert told.startswith(reason)
    assert answered(handle) == [0]
    assert found.requires_grad == expected.requires_grad
    assert found.is_meta or torch.equal(found, expected)


def test_dropout_in_training_stays_stock():
    module = attention(dropout=0.5, batch_first=True).train()
    with adaptive.patch(module) as handle:
        module(QUERY, KEYS, KEYS)
        module.eval()
        module(QUERY, KEYS, KEYS)
        assert handle.report().layers[0].stock_calls == {"dropout": 1}
        assert answered(handle) == [1]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((QUERY, KEYS, KEYS[:, :50]), {}),
        ((QUERY[..., :64], KEYS, KEYS), {}),
        ((QUERY, KEYS[0], KEYS[0]), {}),
        ((QUERY, KEYS, KEYS), {"attn_mask": torch.zeros(2, MEMORY)}),
        ((QUERY, KEYS, KEYS), {"key_padding_mask": torch.zeros(2, 5)}),
        ((QUERY, KEYS, KEYS), {"is_causal": True}),
        ((QUERY, KEYS, KEYS), {"attn_mask": torch.zeros(1, MEMORY, dtype=torch.int32)}),
        ((QUERY, KEYS.half(), KEYS.half()), {}),
    ],
    ids=["value", "width", "rank", "mask", "padding", "causal", "mask dtype", "dtypes"],
)
def test_bad_calls_raise_the_errors_of_stock(arguments, options):
    module = attention(batch_first=True)
    with pytest.raises((RuntimeError, AssertionError)) as stock:
        module(*arguments, **options)
    adaptive.patch(module)
    with pytest.raises(type(stock.value)) as ours:
        module(*arguments, **options)
    assert str(ours.value) == str(stock.value)


def test_autocast_gives_the_dtype_of_stock():
    module = attention(batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = module(QUERY, KEYS, KEYS, need_weights=False)
        with adaptive.patch(module) as handle:
            found, _ = module(QUERY, KEYS, KEYS, need_weights=False)
            assert answered(handle) == [1]
            assert torch.is_autocast_enabled("cpu")
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_transforms_see_operators():
    module = attention(batch_first=True)
    expected, _ = module(QUERY, KEYS, KEYS)
    with adaptive.patch(module) as handle:
        found, _ = torch.vmap(lambda q, k: module(q, k, k))(QUERY[:, None], KEYS[:, None])
        torch.testing.assert_close(found[:, 0], expected)
        assert handle.report().layers[0].stock_calls == {"operations are recorded": 1}
