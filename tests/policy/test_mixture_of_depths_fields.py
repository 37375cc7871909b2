"""What MixtureOfDepths and its routers refuse, by name, before anything is changed."""

import json
import math

import pytest
import torch

import adaptive
from adaptive import MixtureOfDepths, RouterWeights

ROUTER = RouterWeights.random((1, 2), 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": 0}, "capacity must be above 0 and at most 1, got 0"),
        ({"capacity": 1.5}, "capacity must be above 0 and at most 1, got 1.5"),
        ({"capacity": 0.5, "threshold": 0.5}, "threshold must be None together with capacity"),
        ({"threshold": math.nan}, "threshold must be a number or None, got nan"),
        ({"threshold": 10**400}, "threshold must be a number or None, got 1000"),
        ({"unit": "head"}, "unit must be one of block, attention, mlp, got 'head'"),
        ({"decide": "batch"}, "decide must be one of sequence, token, got 'batch'"),
        (
            {"decode": "frozen"},
            "decode must be 'threshold' or 'predictor' with decide='token'",
        ),
        ({"decode": "predictor"}, "decode must be 'threshold' without a capacity, which a"),
        ({"decode": "predictor", "capacity": 0.5}, "router must have a predictor with decode="),
        ({"decide": "sequence", "decode": "threshold"}, "decode must be 'frozen' with decide="),
        ({"decide": "sequence", "capacity": 0.5}, "capacity must be None for sequences"),
        ({"decide": "sequence", "weighted": True}, "weighted must be False for sequences"),
        ({"decide": "sequence", "kv": "kept"}, "kv must be 'dropped': keys of single tokens"),
        ({"decide": "sequence", "decode_threshold": 0.1}, "decode_threshold must be None for"),
        ({"unit": "mlp", "positions": "compact"}, "positions must be 'original': keys of single"),
        ({"positions": "compact", "kv": "kept"}, "positions must be 'original' where all keys"),
        ({"unit": "mlp", "weighted": "mlp"}, "weighted must be True or False unless unit='block'"),
        ({"weighted": 1}, "weighted must be True, False or 'mlp', got 1"),
        ({"layers": ()}, "router must have no weights for layer 1"),
        ({"layers": (1,)}, "router must have no weights for layer 2"),
        ({"layers": (1, 2, 3)}, "router must have weights for layer 3"),
        ({"layers": (2, 1)}, "layers must be ascending layer numbers from 0"),
        ({"router": None}, "layers must name a layer, or there must be a router"),
        ({"router": None, "layers": (1,)}, "decide must be 'sequence' without a router"),
        ({"router": None, "layers": (1,), "threshold": 0.1}, "threshold must be None without a"),
        ({"router": "random"}, "router must be RouterWeights or None, got 'random'"),
    ],
)
def test_fields(fields, message):
    with pytest.raises(ValueError, match=f"adaptive: MixtureOfDepths.{message}"):
        MixtureOfDepths(**{"router": ROUTER, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (2, 1)}, "layers must be ascending"),
        ({"layers": (1,)}, "weight must have 1 rows, one per layer"),
        ({"weight": ((1.0,), (1.0, 2.0))}, "weight must have rows of one width"),
        ({"weight": ((1.0,), (math.nan,))}, "weight of layer 2 must hold finite numbers"),
        ({"weight": ((1.0,), ("x",))}, "weight of layer 2 must hold numbers"),
        ({"bias": (1.0,)}, "bias must have 2 numbers, or be None, got 1"),
        ({"bias": (1.0, 10**400)}, "bias must hold finite numbers, got"),
    ],
)
def test_weights(fields, message):
    with pytest.raises(ValueError, match=f"adaptive: RouterWeights.{message}"):
        RouterWeights(**{"layers": (1, 2), "weight": ((1.0,), (2.0,)), **fields})


MLP = {"inner": [[[1.0]], [[2.0]]], "inner_bias": [[0.0]] * 2, "outer": [[1.0]] * 2}
MLP["outer_bias"] = [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": [[[1.0]]]}, "RouterPredictor.inner_bias must be .layers, hidden. = .1, 1."),
        ({"inner": [[[1.0, 2.0]], [[1.0]]]}, "RouterPredictor.inner must be .layers, hidden, wid"),
        ({"inner": []}, "RouterPredictor.inner must be a list that is not empty"),
        ({"outer": [[math.nan]] * 2}, "RouterPredictor.outer must hold finite numbers"),
        ({"outer_bias": [0.0]}, "RouterPredictor.outer_bias must have 2 numbers, one per layer"),
        ({"deep": 1}, "RouterPredictor must have no field 'deep'"),
        ({"inner": [[[1.0, 2.0]]] * 2}, "RouterWeights.predictor must be for 2 layers of width 1"),
    ],
)
def test_predictors(change, message):
    given = {"layers": (1, 2), "weight": ((1.0,), (2.0,))}
    assert RouterWeights(**given, predictor=MLP).predictor.width == 1
    with pytest.raises(ValueError, match=f"adaptive: {message}"):
        RouterWeights(**given, predictor={**MLP, **change})


def test_predictors_of_files(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "router.safetensors"
    router = RouterWeights(layers=(1, 2), weight=((1.0,), (2.0,)), predictor=MLP)
    router.save(path)
    assert RouterWeights.load(path) == router
    tensors = load_file(path)
    key = "layers.2.router.predictor.outer.weight"
    meta = {"format": 1, "layers": [1, 2], "bias": False, "predictor": True}
    for value, message in (
        (None, f"it must have '{key}'"),
        (torch.ones(1, 1), r"must have shape \[\d+\], got \[1, 1\]"),
    ):
        changed = {name: t for name, t in {**tensors, key: value}.items() if t is not None}
        save_file(changed, path, metadata={"adaptive_router": json.dumps(meta)})
        with pytest.raises(ValueError, match=message):
            RouterWeights.load(path)
    policy = MixtureOfDepths.mod(router)
    assert policy.decode == "predictor"
    assert adaptive.Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_tensors_of_checkpoints():
    pair = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    found = RouterWeights.from_tensors({3: pair, 1: torch.ones(2)})
    assert (found.layers, found.weight) == ((1, 3), ((1.0, 1.0), (3.0, 1.0)))
    logit = torch.tensor([0.3, -0.8])
    score = (logit @ torch.tensor(found.weight[1])).sigmoid()
    assert torch.allclose(score, (pair @ logit).softmax(0)[1])
    with pytest.raises(ValueError, match=r"weight of layer 5 must have shape \[width\]"):
        RouterWeights.from_tensors({5: torch.ones(3, 4)})
    with pytest.raises(TypeError, match="weight of layer 5 must be a tensor, got list"):
        RouterWeights.from_tensors({5: [1.0]})


def test_random_routers_are_the_same_for_a_seed():
    assert RouterWeights.random((1, 2), 8) == ROUTER != RouterWeights.random((1, 2), 8, seed=1)
    with pytest.raises(ValueError, match="width must be a whole number from 1 on, got 0"):
        RouterWeights.random((1,), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.2.router.weight": None}, "it must have 'layers.2.router.weight'"),
        ({"layers.7.router.weight": torch.ones(1, 8)}, "it must not have 'layers.7.router.weight'"),
        ({"layers.2.router.weight": torch.ones(3, 8)}, "weight of layer 2 must have shape"),
    ],
)
def test_files_that_lack_a_key_or_have_one_too_many(tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "router.safetensors"
    ROUTER.save(path)
    assert RouterWeights.load(path) == ROUTER
    tensors = {k: v for k, v in {**load_file(path), **change}.items() if v is not None}
    meta = {"format": 1, "layers": [1, 2], "bias": False}
    save_file(tensors, path, metadata={"adaptive_router": json.dumps(meta)})
    with pytest.raises(ValueError, match=message):
        RouterWeights.load(path)


def test_files_whose_layers_are_in_another_order(tmp_path):
    """Each bias stays beside the weight of its layer."""
    from safetensors.torch import load_file, save_file

    wanted = RouterWeights(layers=(1, 2), weight=((1.0,) * 8, (2.0,) * 8), bias=(0.1, 0.2))
    wanted.save(tmp_path / "router.safetensors")
    tensors = load_file(tmp_path / "router.safetensors")
    meta = {"format": 1, "layers": [2, 1], "bias": True}
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata={"adaptive_router": json.dumps(meta)})
    assert RouterWeights.load(path) == wanted


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "router.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no routers"):
        RouterWeights.load(path)
    with pytest.raises(ValueError, match="RouterWeights must have a field 'weight'"):
        RouterWeights.from_dict({"layers": [1], "bias": None})


def test_presets_are_what_the_papers_say():
    mindskip = MixtureOfDepths.mindskip(ROUTER)
    assert (mindskip.unit, mindskip.decide, mindskip.decode) == ("attention", "sequence", "frozen")
    assert (mindskip.weighted, mindskip.least, mindskip.kv) == (False, 0.5, "dropped")
    mod = MixtureOfDepths.mod(ROUTER)
    assert (mod.unit, mod.decide, mod.capacity, mod.weighted) == ("block", "token", 0.125, True)
    assert (mod.least_later, mod.positions) == (0.5, "original")
    gamma = MixtureOfDepths.gamma_mod(ROUTER)
    assert (gamma.least, gamma.least_later, gamma.weighted) == (0.005, 0.5, "mlp")
    assert gamma.positions == "compact"
    for policy in (mindskip, mod, gamma, MixtureOfDepths.drop((1, 3), unit="mlp")):
        assert adaptive.Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
        assert hash(policy) == hash(adaptive.Policy.from_dict(policy.to_dict()))
