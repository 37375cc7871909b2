"""What EncoderExit is refused for, aloud: models, calls, and depths that are not there."""

import re

import pytest
import torch
import transformers
from encoder_models import OLD, inputs, make, run
from models import make as make_decoder
from torch import nn

import adaptive

EXIT = adaptive.EncoderExit(layer=1)


def test_models_that_are_no_encoders():
    for model in (make_decoder("llama"), nn.MultiheadAttention(64, 2).eval()):
        with pytest.raises(adaptive.UnsupportedModel, match="EncoderExit does not fit: it is for"):
            adaptive.patch(model, EXIT)
        assert not adaptive.check(model, EXIT).ok
    with pytest.raises(adaptive.UnsupportedModel, match="it needs a decoder of transformers"):
        adaptive.patch(make("vit"), adaptive.SelfSpeculative(exit_layer=1))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (adaptive.EncoderExit(layer=3), r"EncoderExit.layer must be at most the model's 2 layers"),
        (adaptive.EncoderExit(threshold=0.9, layers=(1, 2)), r"layers must be below the model's 2"),
        (
            adaptive.EncoderExit(
                gate=adaptive.EncoderGate(layers=(2,), weight=([0.0] * 128,) * 2, bias=(0, 0))
            ),
            "EncoderExit.gate must have exits below the model's 2 layers",
        ),
        (
            adaptive.EncoderExit(
                gate=adaptive.EncoderGate(layers=(1,), weight=([0.0] * 64,) * 2, bias=(0, 0))
            ),
            "EncoderExit.gate must be for states of width 128, got 64",
        ),
    ],
)
def test_what_is_not_in_the_model(policy, message):
    model = make("vit")
    before = set(model.__dict__)
    with pytest.raises(ValueError, match=message):
        adaptive.patch(model, policy)
    assert set(model.__dict__) == before
    found = adaptive.check(model, policy)
    assert re.search(message, "; ".join(found.problems))
    assert found.error is ValueError


def test_a_second_one():
    with pytest.raises(ValueError, match="a second EncoderExit cannot be combined"):
        adaptive.patch(make("vit"), EXIT, adaptive.EncoderExit(threshold=0.9))


def test_layers_with_a_forward_of_their_own():
    model = make("vit")
    (layer,) = [m for n, m in model.named_modules() if type(m).__name__ == "ViTLayer"][:1]
    layer.forward = lambda *args, **kwargs: 0
    with pytest.raises(adaptive.UnsupportedModel, match="has a forward of its own"):
        adaptive.patch(model, EXIT)


def test_training():
    model, given = make("vit").train(), inputs("vit")
    with adaptive.patch(model, EXIT) as patched:
        with pytest.raises(NotImplementedError, match="EncoderExit is for inference"):
            model(**given)
        run(model, given)  # without gradients
        model.eval()(**given)[0].sum().backward()
        assert patched.report().encoder_exit.calls == 2
        model.train()
        with patched.disabled():
            model(**given)
    model(**given)


def test_attention_weights():
    model, given = make("vit", implementation="eager"), inputs("vit")
    with adaptive.patch(model, EXIT):
        with pytest.raises(NotImplementedError, match="output_attentions is not supported"):
            model(**given, output_attentions=True)
        with torch.no_grad():
            states = model(**given, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert all(len(state) == 2 for state in states)


@pytest.mark.parametrize("whole", [True, False])
def test_compiling(whole):
    model, given = make("vit"), inputs("vit")
    refused = pytest.raises(Exception, match="EncoderExit cannot run under torch")
    with adaptive.patch(model, EXIT), torch.no_grad(), refused:
        torch.compile(model, backend="aot_eager", fullgraph=whole)(**given)


@pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")
def test_masks_that_do_not_tell_padding():
    model = transformers.AutoModel.from_config(make("bert").config).eval()
    given = inputs("bert")
    given["attention_mask"] = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    with adaptive.patch(model, adaptive.EncoderExit(threshold=0.9)):
        with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\]"):
            run(model, given)
        run(model, {"input_ids": given["input_ids"]})
        with torch.no_grad():
            model(given["input_ids"], torch.ones(2, 40, dtype=torch.int64))
    with adaptive.patch(model, adaptive.EncoderExit(layer=1, audit_every=None)) as patched:
        run(model, given)
        assert patched.report().encoder_exit.depths == {1: 2}


@pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")
def test_rows_of_padding_alone_do_no_harm():
    model, given = make("bert"), inputs("bert", side="right")
    given["attention_mask"][1] = 0
    with adaptive.patch(model, adaptive.EncoderExit(layer=1)) as patched:
        assert bool(run(model, given).isfinite().all())
        assert patched.report().encoder_exit.audited == 1
    with adaptive.patch(model, adaptive.EncoderExit(threshold=-1.0)) as patched:
        assert bool(run(model, given).isfinite().all())
        assert patched.report().encoder_exit.depths == {1: 2}
