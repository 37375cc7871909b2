"""What encoders are refused, and why; families that users add."""

import encoder_models as encoders
import pytest
import torch
import transformers
from encoder_models import IMAGES, OLD, inputs, make, run
from models import make as make_decoder
from torch import nn

import adaptive
from adaptive import EncoderFamily
from adaptive.adapters import FAMILIES

NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")


@pytest.mark.skipif(not OLD, reason="from transformers 5 on they do")
@pytest.mark.parametrize("case", [case for case in encoders.CONFIGS if case not in IMAGES])
def test_text_encoders_of_old_versions(case):
    support = adaptive.check(make(case, implementation="eager"))
    assert support.error is adaptive.UnsupportedModel
    assert "does not use AttentionInterface" in str(support)
    assert "transformers 5 sends" in str(support)


@NEEDS_5
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "config.is_decoder=True is not supported: it is a decoder"),
        (
            {"is_decoder": True, "add_cross_attention": True},
            "config.add_cross_attention=True is not supported: cross-attention",
        ),
    ],
)
def test_decoders_of_encoder_families(fields, message):
    with pytest.raises(adaptive.UnsupportedModel, match=message):
        adaptive.patch(make("bert", **fields))


def test_models_with_two_towers():
    sizes = encoders.CONFIGS["vit"][2]
    config = transformers.SiglipConfig(text_config={**sizes, "vocab_size": 50}, vision_config=sizes)
    model = transformers.SiglipModel(config)
    with pytest.raises(adaptive.UnsupportedModel, match="attends, too, and is no part"):
        adaptive.patch(model)


def test_an_image_head_around_a_tower_is_fine():
    sizes = encoders.CONFIGS["vit"][2]
    config = transformers.SiglipConfig(text_config={**sizes, "vocab_size": 50}, vision_config=sizes)
    model = transformers.SiglipForImageClassification(config).eval()
    stock = run(model, inputs("vit"))
    with adaptive.patch(model) as patched:
        assert torch.equal(run(model, inputs("vit")), stock)
        assert len(patched.report().layers) == 2


def test_families_without_the_interface():
    config = transformers.MPNetConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    with pytest.raises(adaptive.UnknownFamily, match="relative positions change the scores"):
        adaptive.patch(transformers.MPNetModel(config))


def test_there_is_no_calibration():
    with pytest.raises(adaptive.UnsupportedModel, match="only decoders of transformers"):
        adaptive.calibrate(make("vit"), adaptive.TidalDecode())


def test_a_decoder_that_looks_both_ways():
    model = make_decoder("llama")
    model.config.is_causal = False
    with pytest.raises(adaptive.UnsupportedModel, match="an encoder has no decoding"):
        adaptive.patch(model)


def test_missing_parts_are_named():
    wrong = EncoderFamily(name="x", model_types=("x",), base="nowhere", layers="a|b.c")
    model = nn.Linear(2, 2)
    assert wrong.problems(model) == ["Linear has no layers at 'nowhere.a|b.c'"]
    assert wrong.attention_names(model) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": ""}, "EncoderFamily: base must be a dotted path, got ''"),
        ({"layers": "a|"}, "EncoderFamily: layers must be a dotted path, got 'a|'"),
        ({"model_types": "bert"}, "EncoderFamily: model_types must be a tuple of names"),
        ({"unsupported": (1,)}, "EncoderFamily: unsupported must hold"),
    ],
)
def test_nonsense_in_a_family(fields, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        EncoderFamily(**{"name": "x", "model_types": ("x",), "base": "x", **fields})


def test_a_family_of_the_users_own():
    class_of = FAMILIES["vit"]
    mine = EncoderFamily(
        name="mine", model_types=("mine",), base="vit", layers=class_of.layers, attention="x"
    )
    model = make("vit")
    assert mine.problems(model) == [f"layer {n} has no attention at 'x'" for n in (0, 1)]
