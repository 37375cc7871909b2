"""Five laws that hold for every family: identity, undo, purity, honesty, cache."""

import pytest
import torch
import transformers
from models import CONFIGS, greedy, make, padded, token_ids

import adaptive

# Gemma 2 caps its scores, which "sdpa" cannot do, so transformers only builds it "eager".
CASES = [
    *((case, "sdpa") for case in CONFIGS if case != "gemma2"),
    *((case, "eager") for case in ("gemma2", "gemma3", "gpt_neox", "llama")),
]
if int(transformers.__version__.split(".")[0]) >= 5:
    # Before, GPT-2's eager function scaled the scores itself, and all its calls are stock.
    CASES.append(("gpt2", "eager"))
PREFILL = 20
STEPS = 6


def in_order(model):
    """Everything about a model that patch() could change."""
    return {
        name: (
            type(module),
            sorted(key for key in module.__dict__ if key != "training"),
            module.__dict__.get("config"),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks.values()),
        )
        for name, module in model.named_modules()
    }


def close(ours, stock):
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("case", "implementation"), CASES)
@torch.no_grad()
def test_identity(case, implementation):
    """Logits are the same up to rounding, and the same bits while patching is switched off."""
    model = make(case, implementation=implementation)
    inputs = padded(tokens=PREFILL)
    stock = model(**inputs)
    with adaptive.patch(model) as patched:
        real = inputs["attention_mask"].bool()  # nobody reads what padding gives
        close(model(**inputs).logits[real], stock.logits[real])
        full = model(inputs["input_ids"][:1])  # the row without padding
        result = patched.verify(inputs, new_tokens=STEPS)
        with patched.disabled():
            assert torch.equal(model(**inputs).logits, stock.logits)
            close(full.logits, model(inputs["input_ids"][:1]).logits)
    assert result.token_agreement == 1, str(result)
    assert result.tokens == 2 * STEPS
    assert result.max_logit_error < 2e-5 * max(result.max_logit, 1), str(result)


@pytest.mark.parametrize(("case", "implementation"), CASES)
@torch.no_grad()
def test_undo(case, implementation):
    """After unpatch() the modules, hooks, keys, configs and outputs are those of before."""
    model = make(case, implementation=implementation)
    inputs = padded()
    before, keys, config = in_order(model), list(model.state_dict()), model.config.to_dict()
    stock = greedy(model, inputs, return_dict_in_generate=True, output_logits=True)
    patched = adaptive.patch(model)
    assert in_order(model) != before
    greedy(model, inputs)
    assert patched.unpatch() is model
    after = in_order(model)
    assert after == before
    for name, module in model.named_modules():
        assert module.__dict__.get("config") is before[name][2], name
        assert not [key for key in module.__dict__ if "adaptive" in key], name
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    again = greedy(model, inputs, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(again.sequences, stock.sequences)
    assert all(map(torch.equal, again.logits, stock.logits))


@pytest.mark.parametrize("case", [case for case in CONFIGS if case != "gemma2"])
@torch.no_grad()
def test_purity(case):
    """Another model of the same class is not touched, and no native kernel runs for it."""
    model, other = make(case), make(case)
    before = in_order(other)
    stock = other(token_ids()).logits
    with adaptive.patch(model):
        assert in_order(other) == before
        calls = adaptive._native.calls()
        greedy(other, token_ids())
        assert torch.equal(other(token_ids()).logits, stock)
        assert adaptive._native.calls() == calls
        assert other.config._attn_implementation == "sdpa"
    assert in_order(other) == before


@pytest.mark.parametrize(("case", "implementation"), CASES)
@torch.no_grad()
def test_honesty(case, implementation):
    """What the report says is what is counted from outside."""
    model = make(case, implementation=implementation)
    inputs = padded(batch=2, tokens=PREFILL)
    with adaptive.patch(model) as patched:
        before = adaptive._native.calls()
        greedy(model, inputs, tokens=STEPS)
        after = adaptive._native.calls()
        report = patched.report()
    decode_steps = STEPS - 1  # the prefill makes the first token
    layers = len(report.layers)
    for name, calls in (("decode_attention", decode_steps), ("local_attention", 1)):
        counted = after[f"{name}:cpu"] - before.get(f"{name}:cpu", 0)
        assert counted == calls * layers == report.native_calls[f"{name}:cpu"]
    assert sum(layer.native_calls for layer in report.layers) == STEPS * layers
    assert report.forward_calls == STEPS
    window = getattr(model.config, "sliding_window", None)
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for layer in report.layers:
        assert layer.stock_calls == {}
        assert layer.paths == {"local": 1}  # the padded prompt
        assert layer.query_tokens == 2 * (PREFILL + decode_steps)
        kinds = getattr(config, "layer_types", None)
        slides = kinds[layer.layer] == "sliding_attention" if kinds else window is not None
        kept = [min(PREFILL + 1 + i, window if slides else 10**6) for i in range(decode_steps)]
        assert layer.kv_tokens == 2 * (PREFILL + sum(kept))
        assert layer.kv_bytes == layer.kv_tokens * 2 * kv_heads * 32 * 4


@pytest.mark.parametrize(("case", "implementation"), CASES)
@torch.no_grad()
def test_cache(case, implementation):
    """Prefill of n tokens and then decoding one gives what a prefill of n + 1 gives."""
    model = make(case, implementation=implementation)
    ids = token_ids(tokens=PREFILL + 1)
    stock = model(ids).logits
    with adaptive.patch(model) as patched:
        close(model(ids).logits, stock)
        first = model(ids[:, :PREFILL], use_cache=True)
        one = model(ids[:, PREFILL:], past_key_values=first.past_key_values, use_cache=True)
        close(one.logits[:, -1], stock[:, -1])
        # Three chunks: the middle one is long enough for the stock path, the last for the kernel.
        cache = None
        for chunk in ids.split((2, 17, 2), dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        close(out.logits, stock[:, -2:])
        assert cache.get_seq_length() == PREFILL + 1
        assert all(layer.native_calls > 0 for layer in patched.report().layers)
