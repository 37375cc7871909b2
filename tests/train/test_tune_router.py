"""tune_router(): only routers learn, the share is reached, what is left out may be."""

import functools
import json

import pytest
import torch
from models import PAD, make, token_ids

import adaptive
from adaptive.train import layer_similarity, least_changing, tune_router

IDLE, BUSY = 2, 1


@functools.cache
def taught():
    """A model one of whose layers adds nearly nothing, and batches with what it would say."""
    model = make("llama", num_hidden_layers=4)
    with torch.no_grad():
        for part in (
            model.model.layers[IDLE].self_attn.o_proj,
            model.model.layers[IDLE].mlp.down_proj,
        ):
            part.weight.mul_(1e-3)
    batches = []
    for seed in range(60):
        ids = token_ids(4, 16, seed=seed)
        with torch.no_grad():
            said = model(ids).logits.argmax(-1)
        labels = torch.cat([ids[:, :1], said[:, :-1]], 1)
        batches.append({"input_ids": ids, "labels": labels})
    return model, batches


def loss_of(model, policy, batches):
    """Cross entropy of what the patched model says, and the share that ran."""
    with adaptive.patch(model, policy) as patched, torch.no_grad():
        losses = []
        for batch in batches:
            logits = model(batch["input_ids"], use_cache=policy.kv == "kept").logits[:, :-1]
            target = batch["labels"][:, 1:]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))
        return float(torch.stack(losses).mean()), patched.report().routing


@pytest.mark.parametrize(
    ("unit", "decide"),
    [("attention", "sequence"), ("block", "sequence"), ("mlp", "token"), ("block", "token")],
)
def test_the_share_is_reached_by_leaving_out_what_is_idle(unit, decide):
    model, batches = taught()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    tuned = tune_router(
        model, batches, steps=60, layers=(BUSY, IDLE), unit=unit, decide=decide, target=0.5
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    loss, log = loss_of(model, tuned.policy, batches[:8])
    assert log.share < 0.62
    assert log.layers[IDLE].share < log.layers[BUSY].share
    untrained = []
    for seed in range(3):
        policy = adaptive.MixtureOfDepths(
            router=adaptive.RouterWeights.random((BUSY, IDLE), 128, seed=seed),
            unit=unit,
            decide=decide,
            kv=tuned.policy.kv,
        )
        untrained.append(loss_of(model, policy, batches[:8])[0])
    if unit != "mlp":  # one of two MLPs of single tokens moves the loss by less than noise does
        assert loss < sum(untrained) / len(untrained)
    values = json.loads(json.dumps(tuned.to_dict()))
    assert adaptive.Policy.from_dict(values["policy"]) == tuned.policy
    assert f"{tuned.shares[-1]:.0%}" in str(tuned)


def test_the_losses_are_those_of_the_policy():
    """The first step's loss is that of the patched model with the routers it starts from."""
    model, batches = taught()
    tuned = tune_router(model, batches, steps=1, layers=(BUSY, IDLE), unit="attention", seed=3)
    start = adaptive.MixtureOfDepths.mindskip(
        adaptive.RouterWeights.random((BUSY, IDLE), 128, seed=3)
    )
    loss, log = loss_of(model, start, batches[:1])
    assert loss == pytest.approx(tuned.losses[0], rel=1e-4)
    assert log.share == pytest.approx(tuned.shares[0])


def test_padding_teaches_nothing():
    model, batches = taught()
    ids, labels = batches[0]["input_ids"], batches[0]["labels"].clone()
    labels[:, 0] = -100
    plain = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    pad = torch.full((4, 5), PAD)
    padded = {
        "input_ids": torch.cat([pad, ids], 1),
        "labels": torch.cat([torch.full((4, 5), -100), labels], 1),
        "attention_mask": torch.cat(
            [torch.zeros(4, 5, dtype=torch.int64), plain["attention_mask"]], 1
        ),
    }
    places = torch.cat([torch.zeros(4, 5, dtype=torch.int64), torch.arange(16).expand(4, -1)], 1)
    given = {"steps": 1, "layers": (BUSY, IDLE), "decide": "token", "unit": "mlp"}
    ours = tune_router(model, [{**padded, "position_ids": places}], **given)
    theirs = tune_router(model, [plain], **given)
    assert ours.shares == pytest.approx(theirs.shares)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_the_layers_that_change_least():
    model, batches = taught()
    similarity = layer_similarity(model, batches[:2], unit="block")
    assert len(similarity) == 4
    assert max(range(4), key=lambda layer: similarity[layer]) == IDLE
    assert least_changing(similarity, 1) == (IDLE,)
    assert 0 not in least_changing(similarity, 3)
    seen = {}
    layer = model.model.layers[IDLE]
    hook = layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(batches[0]["input_ids"])
    hook.remove()
    one = layer_similarity(model, batches[:1], unit="block")[IDLE]
    out = seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]
    assert one == pytest.approx(
        float(torch.cosine_similarity(seen["x"], out, dim=-1).mean()), rel=1e-5
    )
    with pytest.raises(ValueError, match="count must be from 1 to 3, got 4"):
        least_changing(similarity, 4)
    with pytest.raises(ValueError, match="batches must hold a batch, got none"):
        layer_similarity(model, [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
        ({"steps": 61}, "batches must hold as many as steps=61, got 60"),
        ({"capacity": 0.5}, "capacity must be None with decide='sequence', got 0.5"),
        ({"capacity": 0, "decide": "token"}, "capacity must be above 0 and at most 1, got 0"),
        ({"predictor_width": 0}, "predictor_width must be a whole number from 1 on, got 0"),
        ({"target": 1.0}, r"target must be in \[0, 1\), got 1.0"),
        ({"strength": -1}, "strength must be 0 or more, got -1"),
        ({"learning_rate": 0}, "learning_rate must be positive, or None"),
        ({"unit": "head"}, "unit must be one of block, attention, mlp, got 'head'"),
        ({"decide": "row"}, "decide must be one of sequence, token, got 'row'"),
        ({"layers": (0, 2)}, "layers must leave out the first layer, and the first with each"),
        ({"layers": ("1",)}, "layers must be ascending numbers from 0 on"),
        ({"layers": 2}, "layers must be ascending numbers, got 2"),
        ({"layers": (4,)}, "layers must be below the model's 4 layers, got 4"),
    ],
)
def test_settings(fields, message):
    model, batches = taught()
    with pytest.raises((TypeError, ValueError), match=message):
        tune_router(model, batches, **{"steps": 60, **fields})
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_patched_model():
    model, batches = taught()
    with adaptive.patch(model), pytest.raises(adaptive.PatchConflict, match="unpatch"):
        tune_router(model, batches, steps=1)


def test_layers_that_always_run_get_no_router():
    """The first layer with each window is among the deeper half here, and patch() refuses it."""
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 2
    model = make("gemma2", implementation="eager", num_hidden_layers=4, layer_types=kinds)
    batches = [token_ids(2)] * 3
    with pytest.raises(ValueError, match=r"layers must be named: .* none of the model's 4 layers"):
        tune_router(model, batches, steps=1, unit="block")
    with pytest.raises(ValueError, match="which MixtureOfDepths always runs, got 2"):
        tune_router(model, batches, steps=1, unit="block", layers=(2, 3))
    for given in ({"unit": "block", "layers": (1, 3)}, {"unit": "mlp"}):
        with adaptive.patch(model, tune_router(model, batches, steps=1, **given).policy):
            pass


@pytest.mark.parametrize("unit", ["block", "mlp"])
def test_a_capacity_and_what_predicts_it(unit, tmp_path):
    model, batches = taught()
    tuned = tune_router(
        model, batches, steps=60, layers=(BUSY, IDLE), unit=unit, decide="token", capacity=0.25
    )
    assert set(tuned.shares) == {0.25}
    assert tuned.policy.decode == "predictor"
    assert tuned.policy.kv == ("dropped" if unit == "mlp" else "kept")
    # Three of four tokens are not among the best, so that saying so of all is right for 75%.
    least = 0.75 if unit == "mlp" else 0.8
    assert sum(tuned.accuracies[-10:]) / 10 > least > sum(tuned.accuracies[:10]) / 10
    assert f"predicted {tuned.accuracies[-1]:.0%} right" in str(tuned)
    assert adaptive.Policy.from_dict(json.loads(json.dumps(tuned.policy.to_dict()))) == tuned.policy
    tuned.policy.router.save(tmp_path / "routers.safetensors")
    assert adaptive.RouterWeights.load(tmp_path / "routers.safetensors") == tuned.policy.router
    with adaptive.patch(model, tuned.policy) as patched, torch.no_grad():
        cache = model(batches[0]["input_ids"], use_cache=True).past_key_values
        assert patched.report().routing.share == 0.25
        patched.reset_stats()
        for column in batches[1]["input_ids"].split(1, 1):
            model(column, past_key_values=cache)
        assert 0.0 < patched.report().routing.share < 0.6


def test_a_predictor_gives_the_model_and_the_router_no_gradient():
    """Routers learn the same, whatever the predictors beside them are."""
    model, batches = taught()
    given = {"steps": 5, "layers": (BUSY, IDLE), "decide": "token", "capacity": 0.5}
    few, many = (tune_router(model, batches, predictor_width=w, **given) for w in (2, 8))
    assert few.policy.router.weight == many.policy.router.weight
    assert len(many.policy.router.predictor.inner[0]) == 8
