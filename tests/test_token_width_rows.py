"""TokenRouting with a router, of few tokens: the native FFN of rows of different widths, or not."""

import pytest
import torch
from models import make, padded, token_ids
from width_cases import masked, policy, router

import adaptive


def close(made, expected):
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


LARGE = {"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 1}
"""Enough for native products."""


def native_calls(patched):
    calls = patched.report().native_calls
    return calls.get("prefix_row_ffn:cpu", 0), calls.get("skinny_linear:cpu", 0)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_few_rows_run_natively_each_with_its_width(case):
    given = router(layers=(0,), width=1024)
    fields = {**LARGE, "implementation": "eager"}
    model, ids = make(case, **fields), token_ids(1, tokens=6)
    other = masked(case, given, **fields)
    expected = other(ids).logits
    with adaptive.patch(model, policy(router=given)) as patched:
        patched.reset_stats()
        made = model(ids).logits
        assert len(torch.cat(other.model.layers[0].mlp.seen).unique()) > 2
        assert native_calls(patched) == (1, 0)
    close(made, expected)


@torch.no_grad()
@pytest.mark.parametrize("reason", ["function", "hook", "bias", "switch"])
def test_what_the_kernel_lacks_runs_by_products(reason):
    given = router(layers=(0,), width=1024)
    fields = {**LARGE, "hidden_act": "gelu"} if reason == "function" else LARGE
    fields = {**fields, "mlp_bias": True} if reason == "bias" else fields
    model, ids = make("llama", **fields), token_ids(1, tokens=6)
    other = masked("llama", given, **fields)
    calls = []
    if reason == "hook":
        watch = lambda *call: calls.append(call)  # noqa: E731
        model.model.layers[0].mlp.act_fn.register_forward_hook(watch)
    expected = other(ids).logits
    exact = reason != "switch"
    with adaptive.patch(model, policy(router=given), exact_linear=exact) as patched:
        patched.reset_stats()
        close(model(ids).logits, expected)
        products = {"function": 3, "hook": 3, "bias": 3}.get(reason, 0)
        assert native_calls(patched) == (0, products)
    assert len(calls) == (reason == "hook")


def test_gradients_pass_where_few_rows_would_run_natively():
    given = router(layers=(0,), width=1024)
    model, ids = make("llama", **LARGE), token_ids(1, tokens=6)
    other = masked("llama", given, **LARGE)
    with adaptive.patch(model, policy(router=given)) as patched:
        model(ids).logits.square().mean().backward()
        assert native_calls(patched)[0] == 0
    other(ids).logits.square().mean().backward()
    ours, right = (m.model.layers[0].mlp.down_proj.weight.grad for m in (model, other))
    torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_padding_among_few_rows_gets_the_narrowest_width():
    chosen = router(layers=(0,), width=1024)
    model, given = make("llama", **LARGE), padded(batch=2)
    given = {name: tensor[:, -6:] for name, tensor in given.items()}
    given["attention_mask"][0, :3] = 0
    with adaptive.patch(model, policy(router=chosen)) as patched:
        alone = model(given["input_ids"][:1, 3:]).logits
        patched.reset_stats()
        made = model(**given).logits
        assert native_calls(patched) == (1, 0)
        assert sum(patched.report().widths.layers[0].tokens.values()) == 9
    close(made[:1, 3:], alone)
