"""Families: which models are known, what is checked, and how to add one."""

import dataclasses

import pytest
import torch
from encoder_models import CONFIGS as ENCODERS
from models import CONFIGS, make
from torch import nn
from transformers import AutoModel

import adaptive
from adaptive.adapters import FAMILIES, Family, family_for, register_family
from adaptive.adapters._family import REFUSED

WANTED = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)


@pytest.fixture
def registry():
    """Families registered in a test are forgotten after it."""
    before = dict(FAMILIES)
    yield FAMILIES
    FAMILIES.clear()
    FAMILIES.update(before)


def test_every_wanted_family_is_known_and_tested():
    assert set(WANTED) <= FAMILIES.keys()
    decoders = {name for name, family in FAMILIES.items() if isinstance(family, Family)}
    own_tests = {"gemma3n_text"}  # test_gemma3n.py: exact, or refused
    assert decoders == {model_type for model_type, _ in CONFIGS.values()} | own_tests
    assert FAMILIES.keys() - decoders == {
        *(model_type for model_type, *_ in ENCODERS.values()),
        *("clip", "siglip"),  # classes with an image head, around the same vision tower
    }
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("case", CONFIGS)
def test_every_path_leads_somewhere(case):
    model = make(case, implementation="eager")
    family = family_for(model)
    assert family.problems(model) == []
    names = family.attention_names(model)
    assert len(names) == 2
    assert all("Attention" in type(model.get_submodule(name)).__name__ for name in names)
    assert isinstance(model.get_submodule(family.base), nn.Module)
    bare = AutoModel.from_config(model.config)
    assert family.problems(bare) == []
    assert family.base_name(bare) == ""
    assert [f"{family.base}.{name}" for name in family.attention_names(bare)] == names


def test_what_is_missing_is_named():
    model = make("llama")
    wrong = Family(
        name="wrong", model_types=("x",), attention="attn", norm="ln_f", head="output|logits"
    )
    assert wrong.problems(model) == [
        "LlamaForCausalLM has no norm at 'model.ln_f'",
        "LlamaForCausalLM has no head at 'output|logits'",
        "layer 0 has no attention at 'attn'",
        "layer 1 has no attention at 'attn'",
    ]
    assert wrong.attention_names(model) == []
    lost = dataclasses.replace(wrong, base="transformer")
    assert lost.problems(model)[:2] == [
        "LlamaForCausalLM has no base at 'transformer'",
        "LlamaForCausalLM has no layers at 'transformer.layers'",
    ]


def test_unsupported_settings_are_named_with_the_reason():
    family = Family(
        name="x", model_types=("x",), unsupported=(("hidden_size", 128, "an odd number"),)
    )
    problems = family.problems(make("llama"))
    assert problems == ["config.hidden_size=128 is not supported: an odd number"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_types": ()}, r"model_types must be a tuple of names, got \(\)"),
        ({"model_types": "llama"}, "model_types must be a tuple of names, got 'llama'"),
        ({"layers": "model..layers"}, "layers must be a dotted path, got 'model..layers'"),
        ({"attention": ""}, "attention must be a dotted path, got ''"),
        ({"base": None}, "base must be a dotted path, got None"),
        ({"norm": "a|b"}, r"norm must be a dotted path"),
        ({"unsupported": (("field", 1),)}, "unsupported must hold"),
    ],
)
def test_nonsense_is_refused_with_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Family(**{"name": "mine", "model_types": ("mine",), **fields})


def test_registering(registry):
    mine = Family(name="mine", model_types=("mine", "mine2"))
    register_family(mine)
    register_family(mine)  # the same again is no conflict: modules are imported twice
    assert registry["mine"] is registry["mine2"] is mine
    with pytest.raises(ValueError, match="'mine' has the family 'mine' already"):
        register_family(Family(name="other", model_types=("free", "mine")))
    assert "free" not in registry
    with pytest.raises(TypeError, match="must be a Family, got str"):
        register_family("mine")


def test_a_family_whose_attention_does_not_use_the_interface_is_refused(registry):
    class OwnAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.head_dim = 32

        def forward(self, hidden_states, **kwargs):
            return torch.zeros_like(hidden_states), None

    model = make("llama")
    model.model.layers[1].self_attn = OwnAttention(model.config)
    with pytest.raises(adaptive.UnsupportedModel, match=r"layers\.1\.self_attn \(OwnAttention\)"):
        adaptive.patch(model)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_known_but_refused_types_say_why(model_type):
    model = make("llama")
    model.config.model_type = model_type
    with pytest.raises(adaptive.UnknownFamily) as caught:
        family_for(model)
    assert REFUSED[model_type] in str(caught.value)
    assert not adaptive.check(model).ok


def test_a_model_without_a_config_has_no_family():
    with pytest.raises(adaptive.UnknownFamily, match="model type None"):
        family_for(nn.Linear(1, 1))
