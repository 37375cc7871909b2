"""Traps of transformers around configs, caches, copies and generation, on a patched model."""

import copy
import io
import json

import pytest
import torch
from models import greedy, make, padded, token_ids
from transformers import DynamicCache, LlamaForCausalLM

import adaptive


def test_trap_03_two_models_share_one_config_object():
    first = make("llama")
    second = LlamaForCausalLM(first.config).eval()
    with adaptive.patch(first):
        assert second.config._attn_implementation == "sdpa"
        calls = adaptive._native.calls()
        greedy(second, token_ids())
        assert adaptive._native.calls() == calls
    assert first.config is second.config


def test_trap_04_what_is_set_on_the_config_lands_in_the_file(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "before")
    with adaptive.patch(model):
        greedy(model, token_ids())
        model.save_pretrained(tmp_path / "during")
    model.save_pretrained(tmp_path / "after")
    names = ("before", "during", "after")
    files = [json.loads((tmp_path / name / "config.json").read_text()) for name in names]
    assert files[0] == files[1] == files[2]


@torch.no_grad()
def test_trap_05_positions_and_masks_follow_the_logical_length():
    model = make("llama")
    inputs = padded(tokens=20)
    following = token_ids(tokens=1, seed=8)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)

    def run():
        cache = model(**inputs, use_cache=True).past_key_values
        assert cache.get_seq_length() == 20
        # No positions given: the model takes them from the length of the cache.
        return model(following, attention_mask=mask, past_key_values=cache).logits

    stock = run()
    with adaptive.patch(model):
        torch.testing.assert_close(run(), stock, rtol=1e-4, atol=1e-5)
        # Feeding all tokens again with a filled cache goes on where the cache ends.
        cache = DynamicCache(config=model.config)
        said = greedy(model, inputs["input_ids"], tokens=4, past_key_values=cache)
        assert cache.get_seq_length() == 23
        more = greedy(model, said, tokens=4, past_key_values=cache)
    assert torch.equal(more, greedy(model, inputs["input_ids"], tokens=8))


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_trap_06_all_layers_report_one_length(case):
    model = make(case, num_hidden_layers=7)  # gemma3: the sixth layer is full attention
    cache = DynamicCache(config=model.config)
    with adaptive.patch(model):
        greedy(model, token_ids(tokens=12), past_key_values=cache)
    assert {layer.get_seq_length() for layer in cache.layers} == {19}
    ours = [type(layer).__name__ == "AdaptiveCacheLayer" for layer in cache.layers]
    assert ours == [not sliding for sliding in cache.is_sliding]


@torch.no_grad()
def test_trap_07_crop_by_a_negative_count():
    model = make("llama")
    ids = token_ids(batch=1, tokens=20)
    stock = DynamicCache(config=model.config)
    model(ids, past_key_values=stock)
    with adaptive.patch(model):
        ours = DynamicCache(config=model.config)
        model(ids, past_key_values=ours)
        assert type(ours.layers[0]).__name__ == "AdaptiveCacheLayer"
        for remove in (-3, -1):
            stock.crop(remove)
            ours.crop(remove)
            assert ours.get_seq_length() == stock.get_seq_length()
        nothing = [cache.crop(0) or cache.get_seq_length() for cache in (stock, ours)]
        assert nothing[0] == nothing[1]  # whatever zero means in this version, it means here


def test_trap_08_copies_run_their_own_weights_and_files_can_be_written():
    model = make("llama")
    stock = greedy(model, token_ids())
    with adaptive.patch(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        assert torch.equal(greedy(twin, token_ids()), stock)
        assert not torch.equal(greedy(model, token_ids()), stock)
        torch.save(twin, io.BytesIO())  # no closure among its hooks


@torch.no_grad()
def test_trap_09_hidden_states_and_parameter_names_stay():
    model = make("llama")
    names = list(model.state_dict())
    stock = model(token_ids(), output_hidden_states=True).hidden_states
    with adaptive.patch(model):
        assert list(model.state_dict()) == names
        assert [name for name, _ in model.named_modules()] == [
            name for name, _ in make("llama").named_modules()
        ]
        ours = model(token_ids(), output_hidden_states=True).hidden_states
    assert len(ours) == len(stock) == 3
    assert all(map(torch.equal, ours, stock))


@pytest.mark.parametrize("fails", [False, True])
def test_trap_10_early_exit_as_assistant(fails):
    # It shortens config.num_hidden_layers for the draft; an exception in between leaves it short.
    model = make("llama", num_hidden_layers=4)
    ids = token_ids(batch=1)
    stock = greedy(model, ids, assistant_early_exit=2)
    calls = [0]

    def boom(module, args):
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("boom")

    original = model.config
    patched = adaptive.patch(model)
    if fails:
        hook = model.model.layers[1].register_forward_pre_hook(boom)
        with pytest.raises(RuntimeError, match="boom"):
            greedy(model, ids, assistant_early_exit=2)
        hook.remove()
        model.config.num_hidden_layers = 4
    ours = greedy(model, ids, assistant_early_exit=2)
    assert torch.equal(ours, stock)
    report = patched.report()
    assert report.layers[0].native_calls > report.layers[3].native_calls > 0
    patched.unpatch()
    assert model.config is original
    assert model.config.num_hidden_layers == 4


def test_trap_16_what_needs_other_packages_or_caches_is_refused_by_name():
    model = make("llama")
    with adaptive.patch(model):
        if hasattr(type(model), "generate_batch"):
            with pytest.raises(NotImplementedError, match="continuous batching"):
                model.generate_batch([[1, 2, 3]])
        assert torch.equal(greedy(model, token_ids()), greedy(make("llama"), token_ids()))


@torch.no_grad()
def test_trap_17_hooks_that_transformers_adds_later_stay():
    # Hooks for output_hidden_states are installed on first use, maybe while patched, and stay.
    model = make("llama", implementation="eager")
    with adaptive.patch(model):
        first = model(token_ids(), output_hidden_states=True, output_attentions=True)
        added = sum(len(module._forward_hooks) for module in model.modules())
    # One hook is ours and goes; theirs stay and go on working. (Before 5.0 it wrapped forwards
    # and left bound methods on the instances, which must not be taken for someone's change.)
    assert sum(len(module._forward_hooks) for module in model.modules()) == added - 1
    second = model(token_ids(), output_hidden_states=True, output_attentions=True)
    assert all(map(torch.equal, first.hidden_states, second.hidden_states))
    assert all(map(torch.equal, first.attentions, second.attentions))
