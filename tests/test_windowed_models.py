"""Models with windows of their own: stock's logits and tokens, no dense mask, no copied window."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CONFIGS, greedy, make, padded, token_ids

import adaptive
from adaptive.layers import hf_prefill
from adaptive.layers.hf_mask import LazyMask

HYBRID = {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
CASES = {
    "mistral": ("mistral_window", {}, "sdpa"),
    "mistral eager": ("mistral_window", {}, "eager"),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, **HYBRID},
        "sdpa",
    ),
    "phi3": ("phi3", {"sliding_window": 8}, "sdpa"),
    "gemma2": ("gemma2", HYBRID, "eager"),
    "gemma3": ("gemma3", HYBRID, "sdpa"),
    "gemma3 eager": ("gemma3", HYBRID, "eager"),
}
PROMPT, STEPS = 45, 40
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


@pytest.fixture(params=CASES)
def model(request):
    case, fields, implementation = CASES[request.param]
    return make(case, implementation=implementation, **fields)


def close(ours, stock):
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=2e-5)


def inputs_of(kind):
    if kind == "plain":
        ids = token_ids(tokens=PROMPT)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return padded(batch=4, tokens=PROMPT, side=kind)


@pytest.mark.parametrize("kind", ["plain", "left", "right"])
@torch.no_grad()
def test_logits_and_tokens_are_stocks(model, kind, monkeypatch):
    inputs = inputs_of(kind)
    real = inputs["attention_mask"].bool()
    stock = model(**inputs).logits
    tokens = greedy(model, inputs, STEPS)
    made = []
    monkeypatch.setattr(LazyMask, "dense", lambda mask: made.append(1))
    with adaptive.patch(model) as patched:
        ours = model(**inputs).logits
        report = patched.report()
        monkeypatch.undo()
        assert torch.equal(greedy(model, inputs, STEPS), tokens)
        after = patched.report()
    close(ours[real], stock[real])
    close(ours[:, -1], stock[:, -1])  # what generate reads, padding on the right included
    assert made == []
    for layer in report.layers:
        if layer.stock_calls != {"prefill": 1}:  # full attention without padding
            assert layer.paths == {"local": 1}
            assert 0 < layer.scores <= layer.dense_scores
    windowed = [layer for layer in after.layers if layer.scores < layer.dense_scores / 2]
    assert len(windowed) >= 2
    assert {layer.cache for layer in windowed} == {"AdaptiveSlidingLayer"}
    share = sum(layer.scores for layer in windowed) / sum(layer.dense_scores for layer in windowed)
    assert "scores" in str(after)
    assert f"{share:.1%}" in str(after)
    if kind == "plain":
        wide = 8 * 2 * len(tokens)
        decoded = after.layers[0].kv_tokens - 2 * report.layers[0].kv_tokens
        assert decoded == wide * (STEPS - 1) // 2  # one window for each row and step
    assert torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
def test_chunks_after_a_cache_longer_than_the_window(model):
    ids = token_ids(tokens=100)
    stock = model(ids).logits
    with adaptive.patch(model) as patched:
        cache, found = None, []
        for chunk in ids.split((30, 20, 1, 3, 17, 16, 13), dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits]
        close(torch.cat(found, 1), stock)
        assert patched.report().layers[0].stock_calls == {}


@torch.no_grad()
def test_packed_sequences(model):
    ids = token_ids(batch=1, tokens=50)
    places = torch.cat([torch.arange(23), torch.arange(27)])[None]
    given = {"input_ids": ids, "position_ids": places, "use_cache": False}
    stock = model(**given).logits
    with adaptive.patch(model) as patched:
        close(model(**given).logits, stock)
        assert patched.report().layers[0].paths == {"local": 1}


def test_beams_and_prompt_lookup(model):
    inputs = padded(tokens=PROMPT)
    beams = greedy(model, inputs, 12, num_beams=3)
    with adaptive.patch(model):
        assert torch.equal(greedy(model, inputs, 12, num_beams=3), beams)


@pytest.mark.parametrize("case", ["mistral", "gemma3"])
def test_assisted_decoding_is_as_refused_as_in_stock(case):
    name, fields, implementation = CASES[case]
    model = make(name, implementation=implementation, **fields)
    ids = torch.cat([token_ids(batch=1, tokens=6)] * 4, dim=1)

    def tried():
        try:
            return greedy(model, ids, 12, prompt_lookup_num_tokens=4, eos_token_id=1).tolist()
        except (ValueError, RuntimeError) as error:
            return type(error)

    stock = tried()
    with adaptive.patch(model):
        assert tried() == stock


def test_copies_gradients_and_undoing(model):
    ids = token_ids(tokens=PROMPT)
    with torch.no_grad():
        stock = model(ids).logits
    loss = model(ids, labels=ids).loss
    loss.backward()
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = dict(model.named_parameters())
    name = name if name in weights else next(n for n in weights if "qkv" in n)
    gradient = weights[name].grad.clone()
    weights[name].grad = None
    with adaptive.patch(model) as patched:
        ours = model(ids, labels=ids).loss
        assert torch.equal(ours, loss)  # training runs stock attention on stock's mask
        ours.backward()
        assert torch.equal(weights[name].grad, gradient)
        with torch.no_grad():
            close(copy.deepcopy(model)(ids).logits, stock)
            with patched.disabled():
                assert torch.equal(model(ids).logits, stock)
            found = patched.verify(padded(tokens=PROMPT), new_tokens=6)
        assert found.token_agreement == 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
def test_who_looks_at_the_mask_gets_stocks_and_stock_attention():
    model, ids = make("mistral_window"), token_ids(tokens=PROMPT)
    stock = model(ids).logits
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["attention_mask"].sum())

    with adaptive.patch(model) as patched:
        hook = model.model.layers[1].register_forward_pre_hook(look, with_kwargs=True)
        close(model(ids).logits, stock)
        hook.remove()
        first, second = patched.report().layers
    rows = torch.arange(1, PROMPT + 1).clamp(max=8).sum()
    assert int(seen[0]) in (int(rows), 2 * int(rows))
    assert (first.stock_calls, second.stock_calls) == ({}, {"prefill": 1})


@pytest.mark.parametrize("native", [False, True])
@torch.no_grad()
def test_fully_causal_prompts_by_their_length(native, monkeypatch):
    monkeypatch.setattr(hf_prefill, "FULL_CAUSAL_FROM", PROMPT if native else PROMPT + 1)
    model, ids = make("llama"), token_ids(tokens=PROMPT)
    stock = model(ids).logits
    with adaptive.patch(model) as patched:
        close(model(ids).logits, stock)
        layer = patched.report().layers[0]
    assert layer.stock_calls == ({} if native else {"prefill": 1})
    assert layer.scores == layer.dense_scores == (2 * 45 * 46 // 2 if native else 0)


def llama4(chunk):
    """A Llama 4 text model with chunks, whose query scaling and experts are switched off."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    known = {k: v for k, v in CONFIGS["llama"][1].items() if k != "intermediate_size"}
    config = Llama4TextConfig(
        **known,
        intermediate_size=96,
        intermediate_size_mlp=96,
        attention_chunk_size=chunk,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        layer_types=["chunked_attention", "full_attention"],
        use_qk_norm=False,
    )
    torch.manual_seed(0)
    return Llama4ForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_chunks_of_llama4(side):
    adaptive.register_family(adaptive.Family(name="llama4_text", model_types=("llama4_text",)))
    try:
        model = llama4(10)
        inputs = padded(batch=3, tokens=PROMPT, side=side)
        real = inputs["attention_mask"].bool()
        (problem,) = adaptive.check(model, adaptive.SelfSpeculative(tree=True)).problems
        assert "tree does not fit: branches have no places in chunks" in problem
        stock = model(**inputs).logits
        tokens = greedy(model, inputs, 25)
        with adaptive.patch(model) as patched:
            close(model(**inputs).logits[real], stock[real])
            layer = patched.report().layers[0]
            assert layer.paths == {"local": 1}
            assert layer.scores < layer.dense_scores / 3
            assert torch.equal(greedy(model, inputs, 25), tokens)
    finally:
        from adaptive.adapters import _family

        _family.FAMILIES.pop("llama4_text", None)


PEAK = """
import sys, torch
sys.path.insert(0, {tests!r})
import adaptive
from models import make
torch.set_num_threads(1)
model = make("mistral_window", max_position_embeddings=20000, num_hidden_layers=1)
if {patch}:
    adaptive.patch(model)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) << 10
with torch.no_grad():
    model.model(torch.ones(1, 64, dtype=torch.int64))
    before = peak()
    model.model(torch.ones(1, 9000, dtype=torch.int64))
print(peak() - before)
"""


@ON_LINUX
def test_a_long_prompt_needs_no_dense_mask():
    def peak(patch):
        code = PEAK.format(tests=str(Path(__file__).parent), patch=patch)
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    dense_mask = 9000 * 9000
    assert peak(patch=True) < dense_mask
    assert peak(patch=False) > dense_mask
