"""Modules that call F.scaled_dot_product_attention: reached by registering their class."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import adaptive
from adaptive import _native, register_attention
from adaptive.layers import torch_sdpa


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


def heads(*sizes):
    return torch.randn(*sizes, 64)


QUERY, KEY = heads(2, 4, 3), heads(2, 4, 70)


class Attention(nn.Module):
    """What users write: one projection, SDPA on a cache that is handed in."""

    def __init__(self, width=128, heads=2):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, width)

    def forward(self, x, key, value, mask=None):
        batch, tokens, width = x.shape
        query = self.project(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).reshape(batch, tokens, width)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x, key, value, mask=None):
        return self.second(self.first(x, key, value, mask), key, value, mask)


register_attention(Attention, heads="heads")
MODEL_INPUTS = (torch.randn(2, 3, 128), heads(2, 2, 200), heads(2, 2, 200))


def stock_calls(patched):
    return [layer["stock_calls"] for layer in patched.report().to_dict()["layers"]]


def test_a_registered_class_is_reached_and_left_again():
    model = Model().eval()
    expected, keys = model(*MODEL_INPUTS), list(model.state_dict())
    patched = adaptive.patch(model)
    before = native_calls()
    torch.testing.assert_close(model(*MODEL_INPUTS), expected)
    assert native_calls() == before + 2
    assert [layer["native_calls"] for layer in patched.report().to_dict()["layers"]] == [1, 1]
    assert patched.report().layers[0].kv_bytes == 2 * MODEL_INPUTS[1].numel() * 4
    with patched.disabled():
        assert torch.equal(model(*MODEL_INPUTS), expected)
    assert list(model.state_dict()) == keys
    patched.unpatch()
    assert torch.equal(model(*MODEL_INPUTS), expected)
    assert native_calls() == before + 2


def test_other_models_and_other_callers_are_untouched():
    patched, other = Model().eval(), Model().eval()
    adaptive.patch(patched)
    before = native_calls()
    other(*MODEL_INPUTS)
    F.scaled_dot_product_attention(QUERY, KEY, KEY)
    assert native_calls() == before


def test_stock_calls_are_counted_with_their_reason():
    model = Model().eval()
    patched = adaptive.patch(model)
    x, key, value = MODEL_INPUTS
    model(torch.randn(2, 30, 128), key, value)
    with torch.enable_grad():
        model(x, key, value)
    assert stock_calls(patched) == [{"query tokens": 1, "gradient": 1}] * 2


def test_the_plan_decides_which_layers_take_part():
    model = Model().eval()
    patched = adaptive.patch(model, adaptive.Exact(stock_layers=(1,)))
    model(*MODEL_INPUTS)
    assert stock_calls(patched) == [{}, {"plan": 1}]


class Outer(nn.Module):
    """A registered class inside a registered class, and a call of its own."""

    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x, key, value):
        F.scaled_dot_product_attention(torch.randn(1, 1, 20, 64), key[:1, :1], value[:1, :1])
        return self.inner(x, key, value)


register_attention(Outer)


@pytest.mark.parametrize("tokens", [3, 20])
def test_nested_modules_count_each_call_once(tokens):
    model = Outer().eval()
    patched = adaptive.patch(model)
    _, key, value = MODEL_INPUTS
    model(torch.randn(2, tokens, 128), key, value)
    outer, inner = patched.report().layers
    assert outer.stock_calls == {"query tokens": 1}
    assert outer.native_calls == 0
    assert (inner.native_calls, inner.stock_calls) == (
        (1, {}) if tokens == 3 else (0, {"query tokens": 1})
    )


def test_an_exception_leaves_no_mode_behind():
    model = Model().eval()
    adaptive.patch(model)
    with pytest.raises(RuntimeError):
        model(*MODEL_INPUTS, mask=torch.ones(5, 5))
    before = native_calls()
    F.scaled_dot_product_attention(QUERY, KEY, KEY)
    assert native_calls() == before
    model(*MODEL_INPUTS)
    assert native_calls() == before + 2


class Seen(TorchFunctionMode):
    """A user's own mode, which must keep seeing what it saw."""

    def __init__(self):
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_of_others_see_stock_calls_and_all_other_functions():
    model = Model().eval()
    adaptive.patch(model)
    with Seen() as seen:
        model(torch.randn(2, 30, 128), *MODEL_INPUTS[1:])
    assert seen.functions.count(F.scaled_dot_product_attention) == 2
    assert seen.functions.count(F.linear) == 2


def test_threads_do_not_disturb_each_other():
    models = [Model().eval() for _ in range(4)]
    handles = [adaptive.patch(model) for model in models[:2]] + [None, None]
    expected = [model(*MODEL_INPUTS) for model in models]
    wrong = []

    def run(model, result):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(*MODEL_INPUTS), result):
                    wrong.append(model)

    before = native_calls()
    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(models, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert native_calls() == before + 2 * 2 * 20
    assert [layer.native_calls for h in handles[:2] for layer in h.report().layers] == [21] * 4


def test_a_deepcopy_is_patched_with_weights_of_its_own():
    model = Model().eval()
    adaptive.patch(model)
    expected = model(*MODEL_INPUTS)
    twin = copy.deepcopy(model)
    twin.first.project.weight.zero_()
    assert torch.equal(model(*MODEL_INPUTS), expected)
    assert not torch.equal(twin(*MODEL_INPUTS), expected)
    handle = adaptive.patched(twin)
    assert handle.report().layers[0].native_calls == 2
    handle.unpatch()
    assert adaptive.patched(model).report().layers[0].native_calls == 2


def test_compiles_to_one_graph():
    model = Model().eval()
    expected = model(*MODEL_INPUTS)
    adaptive.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = native_calls()
    torch.testing.assert_close(compiled(*MODEL_INPUTS), expected)
    assert native_calls() == before + 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.nn.functional,), TypeError, "module_class must be an nn.Module class"),
        ((nn.MultiheadAttention,), TypeError, "must not be nn.MultiheadAttention"),
        ((Attention,), ValueError, "Attention must be registered once"),
    ],
)
def test_registration_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        register_attention(*arguments)


def test_a_size_that_is_not_there_is_a_named_problem():
    class Other(nn.Module):
        pass

    register_attention(Other, heads="num_heads")
    found = adaptive.check(nn.Sequential(Other()))
    assert not found.ok
    assert "0 (Other) does not say its sizes" in str(found)
    with pytest.raises(adaptive.UnsupportedModel, match="num_heads"):
        adaptive.patch(nn.Sequential(Other()))
