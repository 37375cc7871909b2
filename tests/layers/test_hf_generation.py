"""A cache with our layers gives the bits of transformers' own, in every way of generating."""

import copy

import models
import pytest
import torch
from transformers import DynamicCache, DynamicLayer, StaticCache

import adaptive
from adaptive.layers import kv_memory
from adaptive.layers.hf_adopt import adopt, new_cache
from adaptive.layers.hf_cache import AdaptiveCacheLayer

HYBRID = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CASES = {
    "llama": ("llama", {}, 2),
    "qwen3": ("qwen3", {}, 2),
    "gpt_neox": ("gpt_neox", {}, 2),
    "mistral with a window": ("mistral_window", {}, 2),
    "gemma3, hybrid": ("gemma3", HYBRID, 3),
}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A model and how many of its layers get ours."""
    name, fields, adopted = CASES[request.param]
    return models.make(name, **fields), adopted


@pytest.fixture(scope="module")
def llama():
    return models.make("llama")


@pytest.fixture(autouse=True)
def small_granule(monkeypatch):
    """Let storage grow within a few tokens."""
    monkeypatch.setattr(kv_memory, "GRANULE", 4)


def caches(model):
    """A stock cache and an adopted one, empty."""
    return DynamicCache(config=model.config), new_cache(model.config)


def generate(model, inputs, cache, **way):
    """Tokens and logits of a generation, the same for the same arguments."""
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": models.PAD, **way}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, past_key_values=cache, **options)
    return [out.sequences, *out.logits]


def same(stock, ours):
    return len(stock) == len(ours) and all(map(torch.equal, stock, ours))


def content(cache):
    """All keys and values, in the order of the layers."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("way", WAYS)
def test_generation_has_the_bits_of_stock(case, way):
    model, adopted = case
    stock, ours = caches(model)
    assert sum(isinstance(x, AdaptiveCacheLayer) for x in ours.layers) == adopted
    inputs = models.padded(batch=3)
    assert same(*(generate(model, inputs, x, **WAYS[way]) for x in (stock, ours)))
    assert same(content(stock), content(ours))


@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}])
def test_assisted_decoding_takes_back_rejected_tokens(llama, way):
    inputs = {"input_ids": models.token_ids(1, 8).repeat(1, 3)}
    way |= {"max_new_tokens": 24, "eos_token_id": models.VOCABULARY}  # 4.57 wants one; never met
    stock, ours = caches(llama)
    assert same(*(generate(llama, inputs, x, **way) for x in (stock, ours)))
    assert same(content(stock), content(ours))


def test_a_cache_serves_several_turns_and_a_copy_of_it_branches_off(case):
    model, _ = case
    turns = models.token_ids(1, 40)
    first, second, other = ({"input_ids": turns[:, :n]} for n in (10, 30, 40))
    results = []
    for cache in caches(model):
        generate(model, first, cache, max_new_tokens=1)
        branch = copy.deepcopy(cache)
        results.append(generate(model, second, cache) + generate(model, other, branch))
    assert same(*results)


def test_cropping_rolls_back(llama):
    ids = models.token_ids(2, 30)
    results = []
    for cache in caches(llama):
        with torch.no_grad():
            llama(input_ids=ids[:, :20], past_key_values=cache)
            cache.crop(-7)
            logits = llama(input_ids=ids[:, 20:], past_key_values=cache).logits
        results.append([logits, *content(cache)])
    assert same(*results)


def test_gradients_flow_through_a_cache_as_in_stock(llama):
    ids = models.token_ids(2, 12)
    gradients = []
    for cache in caches(llama):
        with torch.no_grad():
            llama(input_ids=ids[:, :4], past_key_values=cache)
        llama(input_ids=ids[:, 4:8], past_key_values=cache)
        loss = llama(input_ids=ids[:, 8:], past_key_values=cache).logits.logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, list(llama.parameters()), allow_unused=True))
    assert any(x.abs().max() > 0 for x in gradients[0])
    assert same(*gradients)


def test_after_training_the_store_takes_over_again(llama):
    ids = models.token_ids(2, 12)
    cache = new_cache(llama.config)
    llama(input_ids=ids[:, :6], past_key_values=cache)
    assert cache.layers[0].store.length == 0
    assert cache.layers[0].keys.requires_grad
    assert cache.layers[0].held_bytes() == 2 * cache.layers[0].keys.nbytes
    with torch.inference_mode():
        llama(input_ids=ids[:, 6:9], past_key_values=cache)
    assert cache.layers[0].store.length == 9
    with torch.no_grad():
        logits = llama(input_ids=ids[:, 9:], past_key_values=cache).logits
        assert torch.allclose(logits, llama(input_ids=ids).logits[:, 9:], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "static", "adopted"])
def test_a_model_compiles_whole_with_any_cache(llama, kind):
    ids = models.token_ids(1, 16)
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    cache = {
        "none": lambda: None,
        "static": lambda: StaticCache(config=llama.config, max_cache_len=16),
        "adopted": lambda: new_cache(llama.config),
    }[kind]()
    with torch.no_grad():
        expected = llama(input_ids=ids).logits
        if cache is None:
            parts = [compiled(input_ids=ids, use_cache=False).logits]
        else:
            assert adopt(cache) == 0
            steps = [(0, 12), (12, 13), (13, 14), (14, 15), (15, 16)]
            parts = [
                compiled(
                    input_ids=ids[:, a:b],
                    past_key_values=cache,
                    cache_position=torch.arange(a, b),
                ).logits
                for a, b in steps
            ]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_pass_runs_the_kernel_uncounted_and_takes_over_no_cache():
    """What docs/architecture.md says of torch.compile."""
    model = models.make("llama")
    patched = adaptive.patch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, cache = models.token_ids(1, 13), DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(input_ids=ids[:, :12], past_key_values=cache)
        compiled(input_ids=ids[:, 12:], past_key_values=cache)
    report = patched.report()
    assert report.native_calls == {"decode_attention:cpu": 4}
    assert [layer.native_calls for layer in report.layers] == [0, 0]
    assert report.forward_calls == 0
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}
