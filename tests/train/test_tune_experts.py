"""tune_experts: routers learn which experts a token needs; the model stays as it is."""

import copy
import json

import pytest
import torch
from models import make, token_ids

import adaptive
from adaptive import ExpertRouterWeights, FeedForwardExperts
from adaptive.train import tune_experts


def batches(count, seed=0):
    return [token_ids(2, 16, seed + i) for i in range(count)]


def loss_of(model, ids):
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


@pytest.mark.parametrize("split", ["clusters", "cut"])
def test_what_is_learned_is_what_runs(split):
    """The loss of a step is that of the patched model with the routers before it."""
    model, ids = make("llama", mlp_bias=True), token_ids(2, 16)
    fields = {"experts": 6, "top_k": 2, "split": split, "scaled": True}
    found = tune_experts(model, [ids, ids], steps=2, learning_rate=1e-9, **fields)
    with adaptive.patch(model, FeedForwardExperts(**fields)):
        assert found.losses[0] == pytest.approx(loss_of(model, ids), abs=1e-4)
    with adaptive.patch(model, found.policy):
        assert found.losses[1] == pytest.approx(loss_of(model, ids), abs=1e-4)
    assert (found.policy.router.order is None) == (split == "cut")


def test_routers_learn_and_the_model_stays():
    model, ids = make("llama"), token_ids(4, 32)
    before, modes = copy.deepcopy(model.state_dict()), model.training
    fields = {"experts": 6, "top_k": 1, "layers": (1,)}
    found = tune_experts(model, [ids] * 20, steps=20, learning_rate=0.03, **fields)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert found.policy.layers == (1,)
    with adaptive.patch(model, found.policy):
        learned = loss_of(model, ids)
    with adaptive.patch(model, FeedForwardExperts(**fields)):
        assert learned < loss_of(model, ids) - 0.01
    values = json.loads(json.dumps(found.to_dict()))
    assert adaptive.Policy.from_dict(values["policy"]) == found.policy
    assert "20 steps" in str(found)


def test_an_error_while_learning_leaves_the_model_as_it_was():
    model = make("llama")
    with pytest.raises(ValueError, match="must hold as many as steps=3, got 2"):
        tune_experts(model, batches(2), steps=3, experts=6)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be a whole number from 1 on, got 0"),
        ({"top_k": 9}, ValueError, "top_k must be at most the 6 experts, got 9"),
        ({"experts": 7}, ValueError, "experts must divide the 96 neurons of layer 0, got 7"),
        ({"layers": (2,)}, ValueError, "layers must be below the model's 2 layers, got 2"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be positive, or None, got 0"),
        ({"split": "half"}, ValueError, "split must be one of clusters, cut, got 'half'"),
    ],
    ids=str,
)
def test_bad_settings(fields, error, message):
    with pytest.raises(error, match=message):
        tune_experts(make("llama"), batches(1), **{"steps": 1, "experts": 6, **fields})


def test_bad_models():
    with pytest.raises(adaptive.UnsupportedModel, match="layer 0 has an FFN, GPT2MLP, that is no"):
        tune_experts(make("gpt2"), batches(1), steps=1)
    model = make("llama")
    router = ExpertRouterWeights.random((0, 1), 6, 128)
    with (
        adaptive.patch(model, FeedForwardExperts(experts=6, router=router)),
        pytest.raises(adaptive.PatchConflict, match="the model is patched"),
    ):
        tune_experts(model, batches(1), steps=1)
