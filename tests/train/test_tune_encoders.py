"""tune_experts and tune_widths on encoders: routers learn from states or labels, nothing else."""

import copy

import pytest
import torch
from encoder_models import OLD, SUPPORTED, TEXTS, inputs, make, run

import adaptive
from adaptive import FeedForwardExperts, TokenRouting
from adaptive.adapters import family_for
from adaptive.train import tune_experts, tune_router, tune_widths
from adaptive.train._ffns import distance

FORMS = "bert", "distilbert", "modernbert", "vit", "dinov2", "dinov3_vit"
CASES = [case for case in SUPPORTED if case in FORMS]
TEXT = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")
EXPERTS = {"experts": 4, "top_k": 1, "progress": False}
WIDTHS = {"widths": (0.25, 1), "progress": False}
ONE = "vit" if OLD else "bert"


def given_for(case, batch=3):
    return inputs(case, batch=batch, side="right" if case in TEXTS else "")


def states(model, given):
    base = family_for(model).base_name(model)
    return run(model.get_submodule(base), given)


def untouched(model, before):
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("case", CASES)
def test_what_experts_learn_is_what_runs(case):
    """The loss of a step is how far the patched encoder with the routers before it is off."""
    model, given = make(case, implementation="eager"), given_for(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tune_experts(model, [given] * 2, steps=2, learning_rate=1e-9, **EXPERTS)
    untouched(model, before)
    whole = states(model, given)
    for policy, loss in zip(
        (FeedForwardExperts(experts=4, top_k=1), found.policy), found.losses, strict=True
    ):
        with adaptive.patch(model, policy):
            made = states(model, given)
        wanted = float(distance(made, whole, given.get("attention_mask")))
        assert loss == pytest.approx(wanted, rel=1e-3)
        assert loss > 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if case != "dinov2"])
def test_losses_fall_and_only_routers_change(case):
    model, given = make(case, implementation="eager").train(), given_for(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tune_experts(model, [given] * 20, steps=20, learning_rate=0.01, **EXPERTS)
    assert min(found.losses[-5:]) < found.losses[0]
    assert model.training
    untouched(model, before)
    widths = tune_widths(model, [given] * 20, steps=20, target=0.9, strength=20.0, **WIDTHS)
    away = [abs(share - 0.9) for share in widths.shares]
    assert away[-1] < 0.5 * away[0]
    assert widths.losses[-1] < widths.losses[0]
    untouched(model, before)
    with adaptive.patch(model.eval(), widths.policy) as patched:
        run(model, given)
        used = patched.report().widths.used_share
    assert used == pytest.approx(widths.shares[-1], abs=0.2)
    assert isinstance(widths.policy, TokenRouting)


@TEXT
def test_labels_are_learned_where_there_are_any():
    model = make("bert_classifier", implementation="eager")
    given = {**given_for("bert"), "labels": torch.tensor([0, 1, 0])}
    found = tune_experts(model, [given] * 15, steps=15, learning_rate=0.02, **EXPERTS)
    with adaptive.patch(model, FeedForwardExperts(experts=4, top_k=1)), torch.no_grad():
        assert found.losses[0] == pytest.approx(float(model(**given).loss), rel=1e-3)
    assert min(found.losses) < found.losses[0]
    widths = tune_widths(model, [given], steps=1, **WIDTHS)
    with adaptive.patch(model, widths.policy), torch.no_grad():
        assert widths.losses[0] == pytest.approx(float(model(**given).loss), rel=1e-3)


@TEXT
def test_padding_teaches_nothing():
    model, given = make("bert", implementation="eager"), given_for("bert")
    other = copy.deepcopy(given)
    other["input_ids"][given["attention_mask"] == 0] = 7
    for tune, fields in ((tune_experts, EXPERTS), (tune_widths, WIDTHS)):
        one, two = (tune(model, [x] * 3, steps=3, **fields) for x in (given, other))
        assert one.losses == pytest.approx(two.losses, rel=1e-4)
        weights = [torch.tensor(found.policy.router.weight) for found in (one, two)]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_distances_by_hand():
    wanted = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]]])
    made = wanted + torch.tensor([[[5.0, 0.0], [0.0, 0.5]], [[0.0, 1.0], [7.0, 7.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert float(distance(made, wanted, mask)) == pytest.approx(((1 + 0.25) / 2 + 0.25) / 2)
    nothing = torch.tensor([[1, 1], [0, 0]])
    assert float(distance(made, wanted, nothing)) == pytest.approx((1 + 0.25) / 2)
    assert float(distance(wanted, wanted, None)) == 0


BAD = {
    "no mapping": ([[1, 2]], TypeError, "batches must hold tensors or mappings with"),
    "one tensor": (torch.ones(2, 2).long(), TypeError, "must be an iterable of batches"),
    "nothing": ([{}], ValueError, "got nothing"),
    "unknown": ([{"ids": 1}], ValueError, "and may hold .*, got ids"),
    "too few": ([], ValueError, "must hold as many as steps=1, got 0"),
}


@pytest.mark.parametrize("tune", [tune_experts, tune_widths])
@pytest.mark.parametrize("name", BAD)
def test_bad_batches(name, tune):
    given, error, message = BAD[name]
    model = make(ONE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        tune(model, given, steps=1, **(EXPERTS if tune is tune_experts else WIDTHS))
    untouched(model, before)


@TEXT
def test_bad_inputs_of_texts():
    model, ids = make("bert"), torch.ones(2, 4).long()
    for given, error, message in (
        ({"input_ids": ids, "attention_mask": ids * 0}, ValueError, "must show a token, got none"),
        ({"input_ids": ids, "attention_mask": ids[None]}, ValueError, r"must be \[batch, tokens"),
        ({"input_ids": ids[:0]}, ValueError, r"1 row and 1 token or more, got \[0, 4\]"),
        ({"input_ids": ids, "attention_mask": [1]}, TypeError, "mask must be a tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            tune_experts(model, [given], steps=1, **EXPERTS)
    bare = make("bert").bert
    with pytest.raises(ValueError, match=r"may hold .*, got input_ids, labels"):
        tune_experts(bare, [{"input_ids": ids, "labels": ids}], steps=1, **EXPERTS)
    tune_experts(bare, [ids], steps=1, **EXPERTS)


def test_bad_encoders():
    model = make(ONE)
    with pytest.raises(ValueError, match="experts must divide the 96 neurons of layer 0, got 7"):
        tune_experts(model, [], steps=1, experts=7)
    with pytest.raises(ValueError, match="layers must be below the model's 2 layers, got 2"):
        tune_widths(model, [], steps=1, layers=(2,), **WIDTHS)
    with pytest.raises(adaptive.UnsupportedModel, match="it has no next token to learn"):
        tune_router(model, [], steps=1)
    model.get_submodule(family_for(model).layer_names(model)[1]).gradient_checkpointing = True
    with pytest.raises(adaptive.UnsupportedModel, match="gradient checkpointing"):
        tune_experts(model, [], steps=1, **EXPERTS)
    model = make(ONE)
    with adaptive.patch(model), pytest.raises(adaptive.PatchConflict, match="is patched"):
        tune_widths(model, [], steps=1, **WIDTHS)
