"""EncoderExit and EncoderGate as values: round trips, bad fields, depths that a gate reads."""

import copy
import json
import pickle
import re

import pytest
import torch

from adaptive.policy import EncoderExit, EncoderGate, ModelShape, Plan, Policy

GATE = EncoderGate(
    layers=(1, 3), weight=((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)), bias=(0.0, 0.25, 1.0)
)
SHAPE = ModelShape(model_type="bert", heads=(4,) * 4, kv_heads=(4,) * 4, head_dim=(32,) * 4)


@pytest.mark.parametrize(
    "policy",
    [
        EncoderExit(layer=2),
        EncoderExit(threshold=0.97),
        EncoderExit(threshold=0.97, layers=[1, 3], pool="first", audit_every=None),
        EncoderExit(gate=GATE),
        EncoderExit(gate=GATE, threshold=0.9),
    ],
)
def test_round_trips(policy):
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert len({policy, copy.deepcopy(policy)}) == 1
    plan = Plan.make(SHAPE, [policy])
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.rows == (("dense",) * 4,) * 4


def test_prints_no_weights():
    assert (
        str(EncoderExit(gate=GATE)) == "EncoderExit(gate=EncoderGate(layers=(1, 3), pool='mean'))"
    )
    assert str(EncoderExit(threshold=0.9)) == "EncoderExit(threshold=0.9)"


def test_depths_at_which_sequences_may_leave():
    assert EncoderExit(layer=2).exits(4) == (2,)
    assert EncoderExit(layer=4).exits(4) == ()
    assert EncoderExit(threshold=0.9).exits(4) == (1, 2, 3)
    assert EncoderExit(threshold=0.9, layers=(2,)).exits(4) == (2,)
    assert EncoderExit(gate=GATE).exits(4) == (1, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "threshold must be given, or layer, or gate, got None"),
        ({"layer": 0}, "layer must be a whole number from 1 on, or None, got 0"),
        ({"layer": True}, "layer must be a whole number"),
        ({"layer": 1, "threshold": 0.9}, "threshold must be None together with layer"),
        ({"layer": 1, "layers": (1,)}, "layers must be None together with layer"),
        ({"layer": 1, "gate": GATE}, "gate must be None together with layer"),
        ({"threshold": "much"}, "threshold must be a number or None, got 'much'"),
        ({"threshold": float("nan")}, "threshold must be a number or None, got nan"),
        ({"threshold": 0.9, "layers": ()}, "layers must be ascending depths from 1 on"),
        ({"threshold": 0.9, "layers": (0, 1)}, "layers must be ascending depths from 1 on"),
        ({"threshold": 0.9, "layers": (2, 1)}, "layers must be ascending depths from 1 on"),
        ({"threshold": 0.9, "layers": 3}, "layers must be ascending depths from 1 on"),
        ({"threshold": 0.9, "criterion": "entropy"}, "criterion must be one of cosine"),
        ({"threshold": 0.9, "pool": "max"}, "pool must be one of mean, first, got 'max'"),
        ({"threshold": 0.9, "audit_every": 0}, "audit_every must be a whole number from 1"),
        ({"gate": "g"}, "gate must be an EncoderGate or None, got 'g'"),
        ({"gate": GATE, "layers": (1,)}, "layers must be None: the gate has its own"),
        ({"gate": GATE, "pool": "first"}, "pool must be that of the gate, 'mean', got 'first'"),
    ],
)
def test_nonsense(fields, message):
    with pytest.raises(ValueError, match=re.escape(f"adaptive: EncoderExit.{message}")):
        EncoderExit(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "layers must be ascending depths"),
        ({"layers": (3, 1)}, "layers must be ascending depths"),
        ({"pool": "max"}, "pool must be one of mean, first"),
        ({"weight": ((1.0, 0.0),)}, "weight must have 3 rows"),
        ({"weight": ((1.0, 0.0), (1.0,), (1.0, 0.0))}, "weight must have rows of one width"),
        ({"weight": ((1.0, 0.0), (1.0, "x"), (1.0, 0.0))}, "weight must hold numbers"),
        ({"bias": (0.0,)}, "bias must have 3 numbers, got 1"),
        ({"bias": (0.0, 0.0, float("inf"))}, "bias must hold finite numbers"),
    ],
)
def test_nonsense_in_a_gate(fields, message):
    values = {"layers": (1, 3), "weight": GATE.weight, "bias": GATE.bias, **fields}
    with pytest.raises(ValueError, match=re.escape(f"adaptive: EncoderGate.{message}")):
        EncoderGate(**values)


def test_a_gate_as_a_file(tmp_path):
    path = tmp_path / "gate.json"
    GATE.save(path)
    assert EncoderGate.load(path) == GATE
    values = json.loads(path.read_text())
    for wrong, message in (
        ("[]", "adaptive_encoder_gate must be 1"),
        ("{", "is not a gate"),
        (json.dumps({**values, "adaptive_encoder_gate": 2}), "adaptive_encoder_gate must be 1"),
        (json.dumps({**values, "more": 1}), "must have no field 'more'"),
        (json.dumps({k: v for k, v in values.items() if k != "bias"}), "must have a field 'bias'"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            EncoderGate.load(path)


def test_the_depth_is_the_least_that_is_enough():
    weight = torch.tensor(GATE.weight)
    pooled = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 4
    chances = (pooled @ weight.T + torch.tensor(GATE.bias)).softmax(-1)
    for threshold in (0.2, 0.5, 0.9):
        wanted = [
            1 if row[0] >= threshold else 3 if row[0] + row[1] >= threshold else 6
            for row in chances.tolist()
        ]
        assert GATE.depths(pooled, 6, threshold).tolist() == wanted
        assert set(wanted) == {1, 3, 6} or threshold == 0.2
    assert set(GATE.depths(pooled, 6, 1.001).tolist()) == {6}
