"""A patched model among others: threads, copies, files, and the end of its life."""

import copy
import gc
import io
import json
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from models import greedy, make, padded, token_ids
from transformers import AutoModelForCausalLM

import adaptive


def test_two_models_in_two_threads():
    models = [make("llama"), make("qwen3")]
    stock = [greedy(model, padded(), tokens=6) for model in models]
    handles = [adaptive.patch(model) for model in models]
    results = [[], []]

    def work(number):
        for _ in range(3):
            results[number].append(greedy(models[number], padded(), tokens=6))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle, expected, got in zip(handles, stock, results, strict=True):
        assert len(got) == 3
        assert all(torch.equal(tokens, expected) for tokens in got)
        assert handle.report().layers[0].native_calls == 18


def test_no_cycle_keeps_the_weights_alive():
    model = make("llama")
    handle = adaptive.patch(model)
    greedy(model, token_ids())
    weights = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del model, handle
        assert weights() is None
    finally:
        gc.enable()


def test_losing_the_handle_loses_nothing():
    model = make("llama")
    adaptive.patch(model)
    gc.collect()
    greedy(model, token_ids())
    handle = adaptive.patched(model)
    assert handle.report().layers[0].native_calls > 0
    handle.unpatch()
    with pytest.raises(adaptive.PatchConflict, match="not patched"):
        adaptive.patched(model)


def test_saving_a_patched_model_writes_a_stock_one(tmp_path):
    model = make("llama")
    with torch.no_grad():
        stock = model(token_ids()).logits
    with adaptive.patch(model):
        model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "adaptive" not in json.dumps(written)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, stock)


def test_a_copy_of_a_patched_model_is_patched_and_independent():
    model = make("llama")
    stock = greedy(model, token_ids())
    original = adaptive.patch(model)
    twin = copy.deepcopy(model)
    handle = adaptive.patched(twin)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert torch.equal(greedy(model, token_ids()), stock)
    assert not torch.equal(greedy(twin, token_ids()), stock)
    assert handle.report().layers[0].native_calls == original.report().layers[0].native_calls == 7
    with pytest.raises(adaptive.PatchConflict, match="patched already"):
        adaptive.patch(twin)
    original.unpatch()
    assert handle.active
    handle.unpatch()
    assert twin.config._attn_implementation == "sdpa"
    assert not [m for m in twin.modules() if [key for key in m.__dict__ if "adaptive" in key]]


def test_models_that_share_one_config_are_independent():
    first = make("llama")
    second = type(first)(first.config).eval()
    assert first.config is second.config
    with adaptive.patch(first) as patched:
        assert second.config._attn_implementation == "sdpa"
        greedy(second, token_ids())
        assert patched.report().native_calls.get("decode_attention:cpu", 0) == 0
        with adaptive.patch(second) as other:
            greedy(second, token_ids())
            assert other.report().layers[0].native_calls == 7
            assert patched.report().layers[0].native_calls == 0
    assert first.config is second.config
    assert first.config._attn_implementation == "sdpa"


def test_an_unpatched_model_can_be_saved_whole_and_a_patched_one_too():
    model = make("llama")
    with torch.no_grad():
        stock = model(token_ids()).logits
    handle = adaptive.patch(model)
    for still_patched in (True, False):
        if not still_patched:
            handle.unpatch()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        with torch.no_grad():
            assert torch.equal(loaded(token_ids()).logits, stock)
        assert ("adaptive" in loaded.config._attn_implementation) == still_patched
        if still_patched:
            adaptive.patched(loaded).unpatch()
            assert loaded.config._attn_implementation == "sdpa"


def test_a_patched_model_can_be_saved_whole_and_loaded_by_another_process(tmp_path):
    model = make("llama")
    adaptive.patch(model)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])"
    )
    command = [sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "logits.pt"]
    subprocess.run(command, check=True)
    with torch.no_grad():
        expected = model(torch.arange(8)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_importing_and_patching_leave_classes_and_registries_of_others_alone():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = make("llama")
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    attributes = dict(vars(type(model.model.layers[0].self_attn)))
    with adaptive.patch(model):
        greedy(model, token_ids())
    after = dict(ALL_ATTENTION_FUNCTIONS.items())
    assert {k: v for k, v in after.items() if not k.startswith("adaptive")} == {
        k: v for k, v in before.items() if not k.startswith("adaptive")
    }
    assert dict(vars(type(model.model.layers[0].self_attn))) == attributes
