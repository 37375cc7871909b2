"""Windows that a model has itself, and the fingerprint of its weights."""

import copy

import pytest
import torch
from models import CONFIGS, make
from transformers import DynamicCache

import adaptive
from adaptive.layers.fingerprint import fingerprint
from adaptive.layers.hf_windows import own_windows
from adaptive.patch import examine
from adaptive.policy import TidalDecode


@pytest.mark.parametrize("case", CONFIGS)
def test_windows_are_those_of_the_cache(case):
    model = make(case, implementation="eager")
    windows = examine(model, ())[1].shape.windows
    layers = DynamicCache(config=model.config).layers
    assert windows == tuple(getattr(layer, "sliding_window", None) for layer in layers)


def test_a_window_in_some_layers():
    kinds = ["sliding_attention", "full_attention", "chunked_attention", "full_attention"]
    config = make("qwen3", num_hidden_layers=4).config
    config.layer_types, config.sliding_window, config.attention_chunk_size = kinds, 8, 16
    assert own_windows(config, 4) == (8, None, 16, None)
    assert own_windows(make("mistral_window").config, 2) == (8, 8)
    assert own_windows(make("llama").config, 2) == (None, None)


def test_layers_with_a_window_are_left_alone_and_the_others_are_not():
    kinds = ["full_attention", "sliding_attention"] * 3
    model = make(
        "qwen3",
        num_hidden_layers=6,
        layer_types=kinds,
        sliding_window=8,
        use_sliding_window=True,
    )
    with adaptive.patch(model, TidalDecode(dense_layers=(0,))) as patched:
        assert [row[0] for row in patched.plan.rows] == (
            ["dense", "dense", "select", "dense", "reuse", "dense"]
        )
    with pytest.raises(ValueError, match="window of 8 tokens, got 3"):
        adaptive.patch(model, TidalDecode(select_layers=(3,)))


def parts(model):
    return dict(fingerprint(model, examine(model, ())[1].shape))


def test_a_fingerprint_is_that_of_the_weights_in_any_dtype():
    model = make("llama")
    first = parts(model)
    assert list(first) == ["shape", "rest", "layer 0", "layer 1"]
    assert first == parts(copy.deepcopy(model))
    assert first == parts(copy.deepcopy(model).bfloat16())
    with adaptive.patch(model):
        pass
    assert first == parts(model)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "layer 1"),
        ("model.norm.weight", "rest"),
        ("model.rotary_emb.inv_freq", "rest"),
    ],
)
def test_a_change_shows_in_its_part(name, part):
    model = make("llama")
    first = parts(model)
    owner, _, own = name.rpartition(".")
    with torch.no_grad():
        getattr(model.get_submodule(owner), own).mul_(1.5)
    second = parts(model)
    assert {key for key in first if first[key] != second[key]} == {part}


def test_models_of_one_shape_with_other_weights_differ_everywhere():
    first = parts(make("llama"))
    model = make("llama")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    second = parts(model)
    assert {key for key in first if first[key] != second[key]} == set(first) - {"shape"}
    assert parts(make("llama", num_hidden_layers=3))["shape"] != first["shape"]
