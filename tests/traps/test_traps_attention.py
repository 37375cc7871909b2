"""Traps of transformers around attention functions and masks, each tried on a patched model."""

import contextlib
import logging
import re

import pytest
import torch
from models import greedy, make, padded, token_ids
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import adaptive
from adaptive.layers import hf_attention
from adaptive.layers.state import STATE


@torch.no_grad()
def test_trap_01_a_name_without_a_mask_function_drops_the_padding():
    model, inputs = make("llama"), padded()
    stock = model(**inputs).logits
    # The trap: registered for attention alone, a name gets no mask, and padding is attended to.
    AttentionInterface.register("trap_without_mask", ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model.set_attn_implementation("trap_without_mask")
        wrong = model(**inputs).logits
    finally:
        model.set_attn_implementation("sdpa")
        del AttentionInterface._global_mapping["trap_without_mask"]
    assert (wrong - stock)[1, 3:].abs().max() > 0.01
    with adaptive.patch(model):
        name = model.config._attn_implementation
        assert name in ALL_MASK_ATTENTION_FUNCTIONS
        ours = model(**inputs).logits[inputs["attention_mask"].bool()]
        real = stock[inputs["attention_mask"].bool()]
        torch.testing.assert_close(ours, real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(hf_attention.NAMES.values()))
def test_trap_02_names_with_a_meaning_of_their_own(name):
    # "flash", "sdpa" or "flex" inside a name start other checks; "/" and "|" other dispatchers.
    assert re.fullmatch(r"[a-z_]+", name)
    assert not re.search("flash|sdpa|flex|paged", name)
    implementation = {v: k for k, v in hf_attention.NAMES.items()}[name]
    model = make("llama", implementation=implementation)
    with adaptive.patch(model):
        model.set_attn_implementation(name)  # transformers itself takes the name
        assert model.config._attn_implementation == name


def test_trap_11_queries_are_not_contiguous():
    model = make("llama")
    seen = []
    with adaptive.patch(model) as patched:
        module = model.model.layers[0].self_attn
        function = hf_attention.adaptive_attention
        query = torch.randn(2, 4, 4, 32).transpose(1, 2)[:, :, :3]
        seen.append(query.is_contiguous())
        key = torch.randn(2, 2, 3, 32)
        with torch.no_grad():
            ours, _ = function(module, query, key, key, None, scaling=0.2)
            same, _ = function(module, query.contiguous(), key, key, None, scaling=0.2)
        assert patched.report().layers[0].native_calls == 2
    assert seen == [False]
    assert torch.equal(ours, same)


def test_trap_12_weights_are_used_through_their_modules():
    # Weights may be sharded, adapted or quantised: what counts is what q_proj(x) returns.
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            getattr(layer.self_attn, name).__class__ = Doubled
    stock = greedy(model, padded())
    assert not torch.equal(stock, greedy(make("llama"), padded()))
    with adaptive.patch(model) as patched:
        assert torch.equal(greedy(model, padded()), stock)
        assert patched.report().layers[0].native_calls > 0


def test_trap_13_arguments_that_change_the_mathematics():
    model = make("llama", implementation="eager")
    with adaptive.patch(model) as patched:
        module = model.model.layers[0].self_attn
        state = module.__dict__[STATE]
        query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 9, 32)
        plain = {"scaling": 0.2}
        for extra in ({"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1, 4, 1, 9)}):
            with torch.no_grad():
                hf_attention.adaptive_eager_attention(
                    module, query, key, key, None, **plain, **extra
                )
            assert f"argument {next(iter(extra))}" in state.stock_calls
        assert state.native_calls == 0
        # Values narrower than keys, and heads that are no module attribute, are not misread.
        with torch.no_grad():
            out, _ = hf_attention.adaptive_eager_attention(
                module, query, key, torch.randn(1, 2, 9, 16), None, **plain
            )
        assert out.shape == (1, 1, 4, 16)
        assert "value head size" in str(patched.report())
    for model_type in ("gpt_oss", "deepseek_v3"):
        from transformers import AutoConfig

        model.config = AutoConfig.for_model(model_type)
        with pytest.raises(adaptive.UnknownFamily, match=r"sinks|MLA"):
            adaptive.patch(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_trap_13_softcap_is_applied_or_stock(implementation):
    model = make("gemma2", implementation="eager", attn_logit_softcapping=0.5)
    stock = greedy(model, padded())
    with adaptive.patch(model) as patched:
        assert torch.equal(greedy(model, padded()), stock)
        assert patched.verify(padded(), 4).max_logit_error < 1e-4
    if implementation == "sdpa":  # forced on: stock ignores or refuses the cap, and so do we
        model.set_attn_implementation("eager")
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = "sdpa"
        with adaptive.patch(model) as patched:
            calls = adaptive._native.calls()
            with contextlib.suppress(ValueError):
                greedy(model, padded())
            assert adaptive._native.calls() == calls


def test_trap_14_an_entry_on_the_instance_hides_what_is_registered():
    model = make("llama")
    before = model.config
    ALL_ATTENTION_FUNCTIONS["adaptive"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        with pytest.raises(adaptive.PatchConflict, match="another library has replaced 'adaptive'"):
            adaptive.patch(model)
        assert model.config is before
        assert not [m for m in model.modules() if STATE in m.__dict__]
    finally:
        del ALL_ATTENTION_FUNCTIONS["adaptive"]
    # Someone who replaces "sdpa" for everybody is respected: that is what stock means then.
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return AttentionInterface._global_mapping["sdpa"](*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counting
    try:
        with adaptive.patch(model):
            greedy(model, token_ids(), tokens=2)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert len(calls) == 2  # one prefill in each of two layers


def test_trap_15_heads_are_read_from_tensors_not_from_the_config():
    # Under tensor parallelism a rank sees some of the heads that the config counts.
    model = make("llama")
    with adaptive.patch(model) as patched, torch.no_grad():
        module = model.model.layers[0].self_attn
        query, key, value = (torch.randn(2, heads, 5, 32) for heads in (4, 2, 2))
        whole, _ = hf_attention.adaptive_attention(
            module, query[:, :, -1:], key, value, None, scaling=0.2
        )
        for rank in (0, 1):
            part, _ = hf_attention.adaptive_attention(
                module,
                query[:, 2 * rank : 2 * rank + 2, -1:],
                key[:, rank : rank + 1],
                value[:, rank : rank + 1],
                None,
                scaling=0.2,
            )
            assert torch.equal(part, whole[:, :, 2 * rank : 2 * rank + 2])
        assert patched.report().layers[0].kv_bytes == 2 * (2 * 2 * 2 * 5 * 32 * 4)


@torch.no_grad()
def test_trap_18_compiles_as_one_graph():
    model = make("llama")
    ids = token_ids(tokens=20)
    stock = model(ids).logits
    with adaptive.patch(model) as patched:
        calls = adaptive._native.calls()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        prefill = compiled(ids[:, :18], use_cache=True)
        step = compiled(ids[:, 18:19], past_key_values=prefill.past_key_values, use_cache=True)
        step = compiled(ids[:, 19:], past_key_values=step.past_key_values, use_cache=True)
        assert adaptive._native.calls() != calls  # the op is in the graph, and ran
        assert patched.report().layers[0].native_calls == 0  # graphs are not counted
    torch.testing.assert_close(step.logits[:, -1], stock[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trap_19_many_lengths_stay_on_the_kernel(caplog):
    # flex_attention gives up after eight shapes and runs eager without a word; we must not.
    model = make("llama")
    with adaptive.patch(model) as patched, caplog.at_level(logging.WARNING):
        for length in range(20, 40):
            cache = model(token_ids(batch=1, tokens=length)).past_key_values
            model(token_ids(batch=1, tokens=1), past_key_values=cache)
        for layer in patched.report().layers:
            assert layer.native_calls == 20
            assert layer.stock_calls == {"prefill": 20}
    assert "recompile" not in caplog.text
