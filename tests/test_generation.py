"""Every way to generate gives the same tokens patched as stock, and the kernel really ran."""

import pytest
import torch
from models import CONFIGS, PAD, greedy, make, padded, token_ids
from transformers import DynamicCache, StaticCache

import adaptive

TOKENS = 8


def both(model, inputs, tokens=TOKENS, **options):
    """Stock's tokens, ours, and our report; both start from the same seed."""
    torch.manual_seed(3)
    stock = greedy(model, inputs, tokens, **options)
    with adaptive.patch(model) as patched:
        torch.manual_seed(3)
        ours = greedy(model, inputs, tokens, **options)
        report = patched.report()
    calls = sum(layer.native_calls for layer in report.layers)
    ran = report.native_calls
    # A padded prompt is one call of local_attention, and some more for padding on the right.
    assert ran["decode_attention:cpu"] + ran.get("local_attention:cpu", 0) >= calls > 0
    return stock, ours, report


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt_neox", "mistral_window"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(case, side):
    stock, ours, _ = both(make(case), padded(batch=4, side=side))
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2"])
def test_beam_search(case):
    stock, ours, report = both(make(case), padded(), num_beams=3)
    assert torch.equal(stock, ours)
    assert report.layers[0].native_calls == TOKENS
    assert report.layers[0].paths == {"local": 1}  # the padded prompt


def test_sampling_with_a_seed():
    model = make("llama")
    torch.manual_seed(5)
    stock = model.generate(token_ids(), max_new_tokens=TOKENS, do_sample=True, pad_token_id=PAD)
    with adaptive.patch(model):
        torch.manual_seed(5)
        ours = model.generate(token_ids(), max_new_tokens=TOKENS, do_sample=True, pad_token_id=PAD)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen3"])
def test_assisted_decoding(case):
    assistant = make(case, num_hidden_layers=1)
    if case != "gemma3":  # sliding caches cannot be rolled back in every version
        stock, ours, report = both(make(case), token_ids(batch=1), 16, assistant_model=assistant)
        assert torch.equal(stock, ours)
        assert report.layers[0].query_tokens > report.layers[0].native_calls
    model, prompt = make(case), token_ids(batch=1, tokens=5)
    stock = greedy(model, prompt, 3, assistant_model=assistant)
    with adaptive.patch(assistant) as drafting, adaptive.patch(model) as verifying:
        assert torch.equal(greedy(model, prompt, 3, assistant_model=assistant), stock)
        assert drafting.report().layers[0].native_calls > 0
        assert verifying.report().layers[0].native_calls > 0


def test_prompt_lookup_verifies_several_tokens_at_once():
    ids = torch.cat([token_ids(batch=1, tokens=6)] * 4, dim=1)
    stock, ours, report = both(make("llama"), ids, 16, prompt_lookup_num_tokens=4, eos_token_id=1)
    assert torch.equal(stock, ours)
    assert set(report.layers[0].stock_calls) <= {"prefill"}


def test_chunked_prefill():
    model = make("llama")
    stock, ours, report = both(model, token_ids(tokens=21), prefill_chunk_size=8)
    assert torch.equal(stock, ours)
    assert report.layers[0].stock_calls == {}  # chunks of 8 are short enough for the kernel
    assert torch.equal(ours, greedy(model, token_ids(tokens=21)))


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_cache_implementations(implementation):
    stock, ours, report = both(make("llama"), padded(), cache_implementation=implementation)
    assert torch.equal(stock, ours)
    wanted = {"static": "StaticLayer", "dynamic": "AdaptiveCacheLayer"}[implementation]
    assert report.layers[0].cache == wanted


def test_a_static_cache_of_the_user():
    model = make("llama")
    ids = token_ids()

    def run():
        cache = StaticCache(config=model.config, max_cache_len=40)
        return greedy(model, ids, past_key_values=cache)

    stock = run()
    with adaptive.patch(model) as patched:
        assert torch.equal(run(), stock)
        assert patched.report().layers[0].native_calls == TOKENS - 1


@pytest.mark.parametrize("filled", ["stock", "patched"])
def test_a_cache_of_the_user_over_several_turns(filled):
    model = make("llama")
    first, second = token_ids(tokens=12), token_ids(tokens=6, seed=2)

    def turns(patch_from):
        cache = DynamicCache(config=model.config)
        handle = adaptive.patch(model) if patch_from == 0 else None
        said = greedy(model, first, past_key_values=cache)
        if patch_from == 1:
            handle = adaptive.patch(model)
        said = greedy(model, torch.cat([said, second], dim=1), past_key_values=cache)
        report = handle.report() if handle else None
        if handle:
            handle.unpatch()
        return said, report, cache

    stock, _, _ = turns(patch_from=None)
    ours, report, cache = turns(patch_from={"patched": 0, "stock": 1}[filled])
    assert torch.equal(stock, ours)
    assert report.layers[0].native_calls > 0
    ours_held = type(cache.layers[0]).__name__ == "AdaptiveCacheLayer"
    assert ours_held == (filled == "patched")  # a filled cache is left as it is
    # What the patched model left in the cache goes on serving the stock model.
    more = torch.cat([ours, token_ids(tokens=3, seed=4)], dim=1)
    assert torch.equal(greedy(model, more, past_key_values=cache), greedy(model, more))


def test_crop_rolls_back():
    model = make("llama")
    ids = token_ids(batch=1, tokens=24)
    with torch.no_grad():
        stock = model(ids).logits[:, -1]
        with adaptive.patch(model):
            wrong = token_ids(batch=1, tokens=5, seed=9)
            cache = model(ids[:, :22]).past_key_values
            model(wrong, past_key_values=cache)
            cache.crop(-5)
            assert cache.get_seq_length() == 22
            out = model(ids[:, 22:], past_key_values=cache)
    torch.testing.assert_close(out.logits[:, -1], stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_generation_after_an_interruption(stop):
    model = make("llama")
    stock = greedy(model, token_ids())
    calls = [0]

    def interrupt(module, args):
        calls[0] += 1
        if calls[0] == 3:
            raise stop

    with adaptive.patch(model):
        hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(stop):
            greedy(model, token_ids())
        hook.remove()
        assert torch.equal(greedy(model, token_ids()), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_half_precision_is_no_further_from_the_truth_than_stock(dtype, implementation):
    exact = make("llama")
    inputs = padded()
    model = make("llama", dtype=dtype, implementation=implementation)
    for weights, halved in zip(exact.parameters(), model.parameters(), strict=True):
        weights.data.copy_(halved.data)
    ids = inputs["input_ids"]
    step = token_ids(tokens=1, seed=7)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)

    @torch.no_grad()
    def last(some):
        cache = some(**inputs, use_cache=True).past_key_values
        out = some(step, attention_mask=mask, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].double()

    truth, stock = last(exact), last(model)
    with adaptive.patch(model) as patched:
        ours = last(model)
        assert patched.report().layers[0].native_calls == 2
    assert ids.shape[1] == 20
    assert (ours - truth).norm() <= 2 * (stock - truth).norm()


def test_peft_before_and_after_the_patch():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for order in ("before", "after"):
        model = make("llama")
        torch.manual_seed(1)
        if order == "before":
            wrapped = peft.get_peft_model(model, config)
            handle = adaptive.patch(wrapped)
        else:
            handle = adaptive.patch(model)
            wrapped = peft.get_peft_model(model, config)
        assert adaptive.patched(wrapped).active
        ours = greedy(wrapped, padded())
        assert handle.report().layers[0].native_calls == TOKENS
        with handle.disabled():
            stock = greedy(wrapped, padded())
        assert torch.equal(stock, ours)
        assert handle.verify(padded(), new_tokens=3).token_agreement == 1
        handle.unpatch()
        assert torch.equal(greedy(wrapped, padded()), stock)
        assert "adaptive" not in str(wrapped.config._attn_implementation)


def test_torchao_quantised_linears():
    quantization = pytest.importorskip("torchao.quantization")
    model = make("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert "Int8Tensor" in type(model.model.layers[0].self_attn.q_proj.weight).__name__
    stock, ours, _ = both(model, padded())
    assert torch.equal(stock, ours)


def test_continuous_batching_is_refused_by_name():
    model = make("llama")
    if not hasattr(model, "generate_batch"):
        pytest.skip("this version has no continuous batching")
    before = greedy(model, token_ids())
    with adaptive.patch(model) as patched:
        with pytest.raises(NotImplementedError, match=r"generate_batch.*unpatch"):
            model.generate_batch([token_ids()[0].tolist()])
        assert torch.equal(greedy(model, token_ids()), before)
        with patched.disabled(), pytest.raises(NotImplementedError, match="generate_batch"):
            model.generate_batch([token_ids()[0].tolist()])


def test_the_language_model_inside_a_multimodal_one():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = CONFIGS["gemma3"][1]
    tokens = {"image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    ).eval()
    ids = token_ids().clamp(max=100)
    stock = greedy(model, ids)
    with pytest.raises(adaptive.UnknownFamily, match=r"model\.model\.language_model"):
        adaptive.patch(model)
    with adaptive.patch(model.model.language_model) as patched:
        assert torch.equal(greedy(model, ids), stock)
        assert patched.report().layers[0].native_calls == TOKENS - 1
