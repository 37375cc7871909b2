"""Fitting a gate: labels are the least depths that are enough, and rules are learned."""

import copy

import pytest
import torch
from encoder_models import OLD, inputs, make, run
from models import make as make_decoder
from torch import nn

import adaptive
from adaptive.train import encoder_gate
from adaptive.train.encoder_gate import _fit

NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")


def test_a_rule_that_is_there_is_learned():
    """Labels by which of three directions a vector points to most; new ones are told right."""
    rng = torch.Generator().manual_seed(0)
    rule = torch.randn(3, 16, generator=rng)
    features = 5 + 0.1 * torch.randn(600, 16, generator=rng)
    labels = ((features - 5) @ rule.T).argmax(-1)
    weight, bias = _fit(features[:400], labels[:400], 3)
    found = (features[400:] @ weight.T + bias).argmax(-1)
    assert (found == labels[400:]).float().mean() > 0.9
    assert labels[400:].bincount(minlength=3).max() < 150


def switched_bert():
    """A model whose later layers do something to sequences of one kind of token alone."""
    model = make("bert", num_hidden_layers=4)
    with torch.no_grad():
        for layer in model.bert.encoder.layer[1:]:
            for linear in (layer.attention.output.dense, layer.output.dense):
                linear.weight.zero_()
                linear.bias.zero_()
        # The last MLP answers to one direction of the states, which these tokens have.
        last = model.bert.encoder.layer[3]
        state = model.bert.embeddings.word_embeddings.weight
        state[50:] += 6 * torch.nn.functional.one_hot(torch.tensor(5), 128)
        last.intermediate.dense.weight.zero_()
        last.intermediate.dense.bias.fill_(-30.0)
        last.intermediate.dense.weight[:, 5] = 20.0
        last.output.dense.weight.copy_(torch.randn(128, 96, generator=torch.manual_seed(3)))
    return model


def tokens(kinds):
    rng = torch.Generator().manual_seed(4)
    low, high = (
        torch.randint(a, b, (len(kinds), 12), generator=rng) for a, b in ((3, 50), (50, 70))
    )
    return torch.where(torch.tensor(kinds)[:, None], high, low)


@NEEDS_5
def test_sequences_that_need_all_layers_are_told_from_the_others():
    model = switched_bert()
    kinds = [bool(i % 3 == 0) for i in range(60)]
    gate = encoder_gate(model, [tokens(kinds[:40]), tokens(kinds[40:])], layers=(1, 2))
    fresh = [bool(i % 2) for i in range(20)]
    policy = adaptive.EncoderExit(gate=gate, audit_every=1)
    with adaptive.patch(model, policy) as patched:
        run(model, {"input_ids": tokens(fresh).flip(1)})
        log = patched.report().encoder_exit
    assert log.depths == {1: 10, 4: 10}
    assert log.agreement[1] > 0.98
    with adaptive.patch(model, adaptive.EncoderExit(layer=1, audit_every=1)) as patched:
        run(model, {"input_ids": tokens(fresh)})
        assert patched.report().encoder_exit.agreement[1] < 0.9  # the rule is needed


@pytest.mark.parametrize(
    "case", ["vit", "clip_vision"] if OLD else ["vit", "clip_vision", "modernbert", "distilbert"]
)
def test_the_model_is_as_before(case):
    name = "n_layers" if case == "distilbert" else "num_hidden_layers"
    model = make(case, **{name: 3})
    given = inputs(case, side="right" if case in ("modernbert", "distilbert") else "")
    before = copy.deepcopy(model.state_dict())
    stock = run(model, given)
    model.train()
    gates = [encoder_gate(model, [given], layers=[1, 2], pool="first") for _ in range(2)]
    assert gates[0] == gates[1]
    assert (gates[0].layers, gates[0].width, gates[0].pool) == ((1, 2), 128, "first")
    assert model.training
    assert torch.equal(run(model.eval(), given), stock)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_labels_are_the_least_depth_that_is_enough(monkeypatch):
    model, given = make("vit", num_hidden_layers=4), inputs("vit", batch=6)
    seen = []
    kept = adaptive.train.encoder_gate.__globals__["_fit"]
    monkeypatch.setitem(
        encoder_gate.__globals__, "_fit", lambda x, y, n: seen.append((x, y, n)) or kept(x, y, n)
    )
    outputs = []
    for depth in (1, 2, 3, 4):
        policy = adaptive.EncoderExit(layer=depth, audit_every=None)
        hook = model.vit.register_forward_hook(lambda _, args, out: outputs.append(out[0].mean(1)))
        with adaptive.patch(model, policy):
            run(model, given)
        hook.remove()
    cosines = [torch.cosine_similarity(out, outputs[-1], dim=-1) for out in outputs[:-1]]
    for tolerance in (float(1 - cosines[2].median()) + 1e-6, float(1 - cosines[0].max()) + 1e-4):
        encoder_gate(model, [given], layers=(1, 2, 3), tolerance=tolerance)
        _, labels, classes = seen.pop()
        wanted = [
            next((d for d in range(3) if cosines[d][row] >= 1 - tolerance), 3) for row in range(6)
        ]
        assert classes == 4
        assert labels.tolist() == wanted
        assert len(set(wanted)) > 1


def test_what_is_refused():
    model, given = make("vit"), inputs("vit")
    for fields, error, message in (
        ({"layers": (0,)}, ValueError, "layers must be ascending depths from 1 to 1, got"),
        ({"layers": (2,)}, ValueError, "layers must be ascending depths from 1 to 1, got"),
        ({"layers": ()}, ValueError, "layers must be ascending depths"),
        ({"layers": (1,), "tolerance": 0.0}, ValueError, "tolerance must be above 0"),
        ({"layers": (1,), "tolerance": "0"}, TypeError, "tolerance must be a number"),
        ({"layers": (1,), "pool": "max"}, ValueError, "pool must be one of mean, first"),
    ):
        with pytest.raises(error, match=message):
            encoder_gate(model, [given], **fields)
    with pytest.raises(ValueError, match="batches must hold a batch, got none"):
        encoder_gate(model, [], layers=(1,))
    with pytest.raises(TypeError, match="batches must hold tensors or mappings, got list"):
        encoder_gate(model, [[1]], layers=(1,))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        encoder_gate(None, [given], layers=(1,))
    with pytest.raises(adaptive.UnsupportedModel, match="is no encoder"):
        encoder_gate(make_decoder("llama"), [given], layers=(1,))
    with pytest.raises(adaptive.UnknownFamily):
        encoder_gate(nn.Linear(2, 2), [given], layers=(1,))
    with adaptive.patch(model), pytest.raises(adaptive.PatchConflict, match="is patched"):
        encoder_gate(model, [given], layers=(1,))
