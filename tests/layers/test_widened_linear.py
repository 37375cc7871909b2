"""Linear layers of 16-bit weights and many rows: as exact as F.linear, and no copy that stays."""

import pytest
import torch
from models import make, token_ids
from torch.nn import functional

import adaptive
from adaptive import _native
from adaptive.layers import hf_linear, widened_linear
from adaptive.layers.widened_linear import MIN_ROWS, slow_dtypes

HALVES = (torch.bfloat16, torch.float16)
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
}


def draw(rows, width, features, dtype, bias):
    rng = torch.Generator().manual_seed(0)
    input = torch.randn(rows, width, generator=rng).to(dtype)
    weight = (torch.randn(features, width, generator=rng) * width**-0.5).to(dtype)
    return input, weight, torch.randn(features, generator=rng).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("features", [1, 63, 64, 65, 200])
def test_it_is_no_less_exact_than_stock(features, bias, dtype, monkeypatch):
    monkeypatch.setattr(widened_linear, "SLICE_BYTES", 64 * 4 * 100)  # slices of 64 features
    given = draw(50, 100, features, dtype, bias)
    right = functional.linear(*(None if t is None else t.double() for t in given))
    made = widened_linear.widened_linear(*given)
    assert made.dtype == dtype
    error = (made.double() - right).abs().max()
    stock = (functional.linear(*given).double() - right).abs().max()
    assert error <= stock + torch.finfo(dtype).eps / 4


@pytest.mark.skipif(_native.best_cpu_level() == "baseline", reason="counts as AVX2 does")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_prompts_go_there_and_nothing_else_does(dtype, monkeypatch):
    calls = []

    def watched(input, weight, bias):
        calls.append(len(input))
        return widened_linear.widened_linear(input, weight, bias)

    monkeypatch.setattr(hf_linear, "SLOW_DTYPES", frozenset(HALVES))
    monkeypatch.setattr(hf_linear, "widened_linear", watched)
    model = make("llama", dtype=dtype, **LARGE)
    ids = token_ids(tokens=MIN_ROWS)[:1]
    with torch.no_grad():
        stock = model(ids).logits
        with adaptive.patch(model) as patched:
            made = model(ids).logits
            assert calls
            assert set(calls) == {MIN_ROWS}
            calls.clear()
            model(ids[:, 1:])  # one row too few
            with patched.disabled():
                assert torch.equal(model(ids).logits, stock)
            monkeypatch.setattr(hf_linear, "SLOW_DTYPES", frozenset())
            model(ids)
            assert calls == []
    scale = stock.float().abs().max()
    assert (made - stock).float().abs().max() <= 0.05 * scale


def test_processors_with_units_are_left_alone(monkeypatch):
    every = dict.fromkeys(("avx512_bf16", "avx512_fp16"), True)
    for known, slow in (
        ({"architecture": "x86_64"}, HALVES),
        ({"architecture": "x86_64", "amx_bf16": True}, HALVES[1:]),
        ({"architecture": "x86_64", **every}, ()),
        ({"architecture": "aarch64"}, ()),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert slow_dtypes() == frozenset(slow)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert slow_dtypes() == frozenset()
