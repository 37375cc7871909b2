"""LocalAttention with rebased positions: which models and calls are refused, and why."""

import pytest
import torch
import transformers
from models import make, token_ids

import adaptive


def rebased(window=8, sinks=3, **fields):
    return adaptive.LocalAttention(window=window, sinks=sinks, positions="rebased", **fields)


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
}


@pytest.mark.parametrize(
    ("case", "fields", "words"),
    [
        ("gpt2", {}, "no module of it has the frequencies of a rotary embedding"),
        ("llama", {"dynamic": DYNAMIC}, "self_attn depend on the length of the text"),
        (
            "phi3",
            {"dynamic": LONG, "original_max_position_embeddings": 64},
            "self_attn depend on the length of the text",
        ),
        ("smollm3", {"no_rope_layers": [0, 0]}, "none of these layers rotates its keys"),
    ],
)
def test_models_that_cannot_are_refused_and_left_as_they_are(case, fields, words):
    fields = dict(fields)
    if "dynamic" in fields:
        kinds = fields.pop("dynamic")
        if not hasattr(make("llama").config, "rope_parameters"):
            kinds = {k: v for k, v in kinds.items() if k != "rope_theta"}
            if case == "phi3":
                kinds["type"] = kinds.pop("rope_type")
            fields["rope_scaling"] = kinds
        else:
            fields["rope_parameters"] = kinds
    model, ids = make(case, **fields), token_ids()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    stock = model(ids).logits
    support = adaptive.check(model, rebased())
    assert not support.ok
    assert words in support.problems[0]
    with pytest.raises(adaptive.UnsupportedModel, match=words):
        adaptive.patch(model, rebased())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert torch.equal(model(ids).logits, stock)
    with adaptive.patch(model, adaptive.LocalAttention(window=8, sinks=3)):
        pass


def test_a_rotation_that_is_not_the_models_is_refused():
    model = make("llama")
    hook = model.model.rotary_emb.register_forward_hook(
        lambda module, args, out: (out[0], -out[1])  # turns the other way
    )
    assert "differ by more than a rotation" in adaptive.check(model, rebased()).problems[0]
    hook.remove()
    assert adaptive.check(model, rebased()).ok
    model.model.layers[0].register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.5, module.training)
    )
    problems = adaptive.check(model.train(), rebased()).problems
    assert "call model.eval() first" in problems[0]
    assert adaptive.check(model.eval(), rebased()).ok


def test_a_model_that_keeps_no_keys_is_refused_until_it_does():
    model = make("llama").train()
    model.gradient_checkpointing_enable()
    support = adaptive.check(model, rebased())
    assert "LlamaModel kept no keys" in support.problems[0]
    assert adaptive.check(model.eval(), rebased()).ok


def test_what_only_stock_can_do_is_refused_where_something_is_dropped():
    model, ids = make("llama", implementation="eager"), token_ids(tokens=40)
    holes = torch.ones_like(ids)
    holes[0, 10] = 0
    with adaptive.patch(model, rebased()) as patched:
        short = model(ids[:, :11]).logits
        short.sum().backward()
        assert patched.report().layers[0].stock_calls == {"gradient": 1}
        with pytest.raises(NotImplementedError, match=r"12 tokens, more than the 11 .*gradient"):
            model(ids[:, :12])
        with torch.no_grad():
            torch.testing.assert_close(model(ids[:, :11]).logits, short, rtol=1e-4, atol=5e-5)
            with pytest.raises(NotImplementedError, match=r"\(mask\)"):
                model(ids, attention_mask=holes, use_cache=False)


@pytest.mark.skipif(
    int(transformers.__version__[0]) < 5,
    reason="an error inside a pass leaves its recorders on the modules there",
)
@torch.no_grad()
def test_attention_weights_are_refused_where_something_is_dropped():
    model = make("llama", implementation="eager")
    ids, words = token_ids(tokens=40), "output_attentions"
    with adaptive.patch(model, rebased()), pytest.raises(NotImplementedError, match=words):
        model(ids, output_attentions=True)
