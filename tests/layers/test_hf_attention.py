"""The registered attention function: what it sends where, and that the answer is stock's."""

import contextlib

import pytest
import torch
from models import make

import adaptive
from adaptive.layers.state import STATE

TOKENS = 40


@pytest.fixture
def attention():
    """Return a patched model's attention module and its state, "sdpa" or "eager"."""
    from adaptive.layers import hf_attention

    models = []  # keeps them alive

    def build(implementation="sdpa", case="llama"):
        model = make(case, implementation=implementation)
        models.append(model)
        adaptive.patch(model)
        module = model.model.layers[0].self_attn
        function = {
            "sdpa": hf_attention.adaptive_attention,
            "eager": hf_attention.adaptive_eager_attention,
        }[implementation]
        return function, module, module.__dict__[STATE]

    return build


def tensors(queries=1, tokens=TOKENS, dtype=torch.float32, batch=2, head_dim=32):
    rng = torch.Generator().manual_seed(queries + tokens)

    def draw(heads, count):
        return torch.randn(batch, heads, count, head_dim, generator=rng).to(dtype)

    return draw(4, queries), draw(2, tokens), draw(2, tokens)


def causal(queries, tokens=TOKENS, batch=2):
    """A mask as transformers makes it: causal from the bottom right, one row padded on the left."""
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    mask = seen.expand(batch, 1, -1, -1).clone()
    mask[1:, ..., :3] = False
    return mask


def additive(mask, dtype=torch.float32):
    zero = torch.zeros((), dtype=dtype)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def both(function, module, state, *args, **kwargs):
    """Our answer, stock's answer, and what was counted for ours."""
    state.reset()
    with torch.no_grad():
        ours, weights = function(module, *args, **kwargs)
        assert weights is None or state.native_calls == 0
        state.record.enabled = False
        stock, _ = function(module, *args, **kwargs)
        state.record.enabled = True
    assert ours.shape == stock.shape
    assert ours.dtype == stock.dtype
    return ours, stock


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_native_equals_stock(attention, implementation, queries, masked):
    function, module, state = attention(implementation)
    mask = causal(queries) if masked else None
    if masked and implementation == "eager":
        mask = additive(mask)
    args = tensors(queries, tokens=TOKENS if masked or queries == 1 else queries)
    ours, stock = both(function, module, state, *args, mask, scaling=0.2)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert state.native_calls == 1
    assert state.stock_calls == {}
    assert state.query_tokens == 2 * queries
    assert state.kv_bytes == 2 * args[1].numel() * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_stock(attention, dtype):
    function, module, state = attention("eager")
    query, key, value = tensors(3, dtype=dtype)
    mask = causal(3)
    ours, stock = both(function, module, state, query, key, value, additive(mask, dtype), 0.2)
    exact, _ = both(
        function,
        module,
        state,
        *(t.double().float() for t in (query, key, value)),
        additive(mask),
        scaling=0.2,
    )
    assert ours.dtype == dtype
    worst = (ours.float() - exact).abs().max()
    assert worst <= 2 * (stock.float() - exact).abs().max()


def test_no_mask_with_more_keys_than_queries_is_causal_from_the_top_left(attention):
    # What an empty StaticCache gives on prefill: stock "sdpa" looks at the first keys only.
    function, module, state = attention()
    query, key, value = tensors(4)
    key[:, :, 4:] = 1e4
    value[:, :, 4:] = 1e4
    ours, stock = both(function, module, state, query, key, value, None, scaling=0.2)
    assert state.native_calls == 1
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", [True, False])
def test_is_causal_of_the_call_wins(attention, flag):
    function, module, state = attention()
    args = tensors(4, tokens=4)
    ours, stock = both(function, module, state, *args, None, scaling=0.2, is_causal=flag)
    assert state.native_calls == 1
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_softcap_is_applied_as_eager_does(attention):
    function, module, state = attention("eager", "gemma2")
    args = tensors(2)
    mask = additive(causal(2))
    ours, stock = both(function, module, state, *args, mask, scaling=3.0, softcap=2.0)
    assert state.native_calls == 1
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    plain, _ = both(function, module, state, *args, mask, scaling=3.0)
    assert (plain - ours).abs().max() > 0.01


def test_fully_masked_rows_are_what_stock_makes_of_them(attention):
    for implementation, convert in (("sdpa", lambda mask: mask), ("eager", additive)):
        function, module, state = attention(implementation)
        mask = causal(3)
        mask[1] = False
        ours, stock = both(function, module, state, *tensors(3), convert(mask), scaling=0.2)
        assert state.native_calls == 1
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_layouts_of_real_models_are_read_in_place(attention):
    function, module, state = attention()
    wide = torch.randn(2, 3, 3 * 4 * 32)
    query = wide[..., : 4 * 32].view(2, 3, 4, 32).transpose(1, 2)  # a slice of a fused projection
    storage = torch.full((2, 2, 64, 32), torch.nan)
    _, key, value = tensors(3)
    storage[:, :, :TOKENS] = key
    ours, stock = both(
        function, module, state, query, storage[:, :, :TOKENS], value, causal(3), scaling=0.2
    )
    assert state.native_calls == 1
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_a_mask_longer_than_the_cache_is_cut(attention):
    function, module, state = attention()
    args = tensors(2)
    longer = torch.nn.functional.pad(causal(2), (0, 5), value=True)
    with torch.no_grad():
        ours, _ = function(module, *args, longer, scaling=0.2)
        cut, _ = function(module, *args, causal(2), scaling=0.2)
    assert state.native_calls == 2
    assert torch.equal(ours, cut)


REASONS = [
    ("prefill", {"queries": 17, "tokens": 17}, {"attention_mask": None}),
    ("long chunk", {"queries": 17}, {}),
    ("dropout", {}, {"dropout": 0.5}),
    ("argument s_aux", {}, {"s_aux": torch.zeros(4)}),
    ("argument head_mask", {}, {"head_mask": torch.ones(4)}),
    ("argument output_attentions", {}, {"output_attentions": True}),
    ("argument position_bias", {}, {"position_bias": torch.zeros(1, 4, 1, TOKENS)}),
    ("head size 24", {"head_dim": 24}, {}),
    ("dtype torch.float64", {"dtype": torch.float64}, {}),
]


@pytest.mark.parametrize(("reason", "sizes", "call"), REASONS, ids=[r[0] for r in REASONS])
def test_other_calls_are_stock_with_a_reason(attention, reason, sizes, call):
    function, module, state = attention()
    queries = sizes.get("queries", 1)
    given = {"attention_mask": causal(queries), "scaling": 0.2, **call}
    torch.manual_seed(0)
    ours, _ = function(module, *tensors(**sizes), **given)
    torch.manual_seed(0)
    state.record.enabled = False
    stock, _ = function(module, *tensors(**sizes), **given)
    assert torch.equal(ours, stock)
    assert state.stock_calls == {reason: 1}
    assert state.native_calls == 0


def test_arguments_that_are_none_or_harmless_change_nothing(attention):
    function, module, state = attention()
    harmless = {
        "position_ids": torch.zeros(1, 1),
        "cache_position": torch.zeros(1),
        "sliding_window": 8,
        "use_cache": True,
        "s_aux": None,
        "output_attentions": False,
        "softcap": None,
    }
    both(function, module, state, *tensors(), None, scaling=0.2, **harmless)
    assert state.native_calls == 1


def test_gradients_and_mixed_dtypes_are_stock(attention):
    function, module, state = attention()
    query, key, value = tensors()
    out, _ = function(module, query.requires_grad_(), key, value, None, scaling=0.2)
    out.sum().backward()
    assert query.grad.abs().sum() > 0
    assert state.stock_calls == {"gradient": 1}
    assert function(module, query.detach(), key, value, None, scaling=0.2)[0].shape
    assert state.native_calls == 1
    with pytest.raises(RuntimeError, match="dtype"):  # stock's own refusal
        function(module, query.detach().bfloat16(), key, value, None, scaling=0.2)


def test_a_mask_that_is_learned_gets_its_gradient(attention):
    function, module, state = attention()
    learned = torch.zeros(1, 1, 1, TOKENS, requires_grad=True)
    out, _ = function(module, *tensors(), learned, scaling=0.2)
    out.square().sum().backward()
    assert learned.grad.abs().sum() > 0
    assert state.stock_calls == {"gradient": 1}


def test_autocast_is_stock(attention):
    function, module, state = attention()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, _ = function(module, *tensors(), None, scaling=0.2)
    assert out.dtype == torch.bfloat16
    assert state.stock_calls == {"autocast": 1}


def test_softcap_with_sdpa_is_left_to_stock(attention):
    function, module, state = attention()
    with contextlib.suppress(ValueError):  # some versions refuse, others ignore it
        function(module, *tensors(), None, scaling=0.2, softcap=5.0)
        assert state.stock_calls == {"softcap with sdpa": 1}
    assert state.native_calls == 0


def test_eager_without_scaling_is_stock(attention):
    # GPT-2's own function scales by itself in some versions.
    function, module, state = attention("eager", "gemma2")
    both(function, module, state, *tensors(), None)
    assert state.stock_calls == {"no scaling": 1}


def test_an_unpatched_model_is_refused(attention):
    function, module, _ = attention()
    del module.__dict__[STATE]
    with pytest.raises(adaptive.AdaptiveError, match="not patched"):
        function(module, *tensors(), None, scaling=0.2)


def test_output_attentions_come_from_stock():
    model = make("llama", implementation="eager")
    ids = torch.arange(2, 22).view(1, 20)
    with torch.no_grad():
        stock = model(ids[:, :8], output_attentions=True)
        with adaptive.patch(model) as patched:
            ours = model(ids[:, :8], output_attentions=True)
            reasons = patched.report().layers[0].stock_calls
            assert model(ids[:, :8]).attentions is None
            assert patched.report().layers[0].native_calls == 1
    assert reasons == {"output_attentions": 1}
    assert len(ours.attentions) == 2
    assert all(map(torch.equal, ours.attentions, stock.attentions))


def test_what_records_operations_sees_stock():
    from torch.utils.flop_counter import FlopCounterMode

    model = make("llama")
    ids = torch.arange(2, 10).view(1, 8)
    with torch.no_grad():
        with FlopCounterMode(display=False) as stock:
            model(ids)
        with adaptive.patch(model) as patched, FlopCounterMode(display=False) as ours:
            model(ids)
            assert patched.report().layers[0].stock_calls == {"operations are recorded": 1}
    assert ours.get_total_flops() == stock.get_total_flops() > 0
