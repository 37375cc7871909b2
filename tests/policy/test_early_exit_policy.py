"""The fields of EarlyExit: what is refused, by name, and the round trip through JSON."""

import copy
import json
import re

import pytest

from adaptive.policy import (
    BlockSparsePrefill,
    EarlyExit,
    Exact,
    LocalAttention,
    ModelShape,
    Plan,
    Policy,
    Quest,
    SelfSpeculative,
    StreamingLLM,
    TidalDecode,
)


def shape(layers=6, windows=(), kv_heads=None):
    return ModelShape(
        model_type="llama",
        heads=(4,) * layers,
        kv_heads=kv_heads or (2,) * layers,
        head_dim=(64,) * layers,
        windows=windows,
    )


GOOD = {"layers": (2, 4), "threshold": 0.9}


@pytest.mark.parametrize(
    "fields",
    [
        GOOD,
        {**GOOD, "criterion": "entropy", "threshold": 2, "kv": "copy", "audit": None},
        {**GOOD, "criterion": "cosine", "threshold": -0.5, "kv": "project", "audit": 1},
        {"layers": [1, 2, 5], "criterion": "agreement", "agree": 3},
    ],
)
def test_round_trips(fields):
    policy = EarlyExit(**fields)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert copy.deepcopy(policy) == policy
    assert eval(str(policy), {"EarlyExit": EarlyExit}) == policy
    assert not policy.exact


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "layers must name exits after 1 layer or more, got ()"),
        ({"layers": (0, 2)}, "layers must name exits after 1 layer or more, got (0, 2)"),
        ({"layers": (3, 2)}, "layers must be ascending layer numbers from 0, got (3, 2)"),
        ({"layers": 4}, "layers must be ascending layer numbers from 0, got 4"),
        ({"criterion": "hope"}, "criterion must be one of confidence, margin, entropy, cosine, "),
        ({"kv": "drop"}, "kv must be one of copy, deferred, project, got 'drop'"),
        ({"threshold": None}, "threshold must be a number from 0 on for confidence, got None"),
        ({"threshold": -0.1}, "threshold must be a number from 0 on for confidence, got -0.1"),
        ({"threshold": True}, "threshold must be a number from 0 on for confidence, got True"),
        ({"threshold": float("nan")}, "threshold must be a number from 0 on for confidence"),
        ({"threshold": float("inf")}, "threshold must be a number from 0 on for confidence"),
        ({"criterion": "cosine", "threshold": -2}, "threshold must be a number from -1 on for cos"),
        ({"criterion": "agreement"}, "threshold must be None for agreement, got 0.9"),
        ({"audit": 0}, "audit must be a whole number from 1 on, or None, got 0"),
        ({"agree": 1}, "agree must be a whole number from 2 on, got 1"),
        (
            {"criterion": "agreement", "threshold": None, "agree": 3},
            "agree must be at most the 2 exits of layers, or none is ever taken, got 3",
        ),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=re.escape(f"adaptive: EarlyExit.{message}")):
        EarlyExit(**{**GOOD, **fields})


def test_an_exit_must_be_below_the_model():
    message = "EarlyExit.layers must be below the model's 6 layers, which are no early exit, got 6"
    with pytest.raises(ValueError, match=message):
        Plan.make(shape(), [EarlyExit(layers=(3, 6), threshold=0.5)])
    plan = Plan.make(shape(), [EarlyExit(layers=(3, 5), threshold=0.5)])
    assert set(plan.rows) == {("dense", "dense")}


def test_copies_need_a_layer_of_the_same_kind():
    windows = (8, 8, None, 8, None, 8)
    plan = Plan.make(shape(windows=windows), [EarlyExit(layers=(3,), threshold=0.5, kv="copy")])
    policy = plan.policies[0]
    assert [policy.source(plan, layer, 3) for layer in (3, 4, 5)] == [1, 2, 1]
    message = "kv must be 'deferred' or 'project' here: no layer before exit 2 has .* of layer 2"
    with pytest.raises(ValueError, match=message):
        Plan.make(shape(windows=windows), [EarlyExit(layers=(2,), threshold=0.5, kv="copy")])
    Plan.make(shape(windows=windows), [EarlyExit(layers=(2,), threshold=0.5)])
    heads = shape(kv_heads=(2, 2, 2, 4, 4, 4))
    with pytest.raises(ValueError, match=r"no layer before exit 2 has .* of layer 3"):
        Plan.make(heads, [EarlyExit(layers=(2,), threshold=0.5, kv="copy")])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SelfSpeculative(exit_layer=2), "both decode by passes of their own"),
        (EarlyExit(layers=(3,), threshold=0.1), "a second EarlyExit cannot be combined"),
        (Quest(), "chooses or drops keys token by token"),
        (TidalDecode(), "chooses or drops keys token by token"),
        (StreamingLLM(), "chooses or drops keys token by token"),
        (LocalAttention(window=8), "chooses or drops keys token by token"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_combinations_without_meaning_are_refused(other, message, turned):
    policies = [EarlyExit(**GOOD), other]
    with pytest.raises(ValueError, match=message):
        Plan.make(shape(), policies[::-1] if turned else policies)


def test_what_prompts_do_may_be_combined():
    plan = Plan.make(shape(), [Exact(), BlockSparsePrefill(), EarlyExit(**GOOD)])
    assert [type(policy).__name__ for policy in plan.policies][-1] == "EarlyExit"
