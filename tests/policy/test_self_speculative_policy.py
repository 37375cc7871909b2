"""SelfSpeculative: what is refused, by name; how it composes; the round trip."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptive
from adaptive.policy import (
    BlockSparsePrefill,
    Exact,
    LocalAttention,
    ModelShape,
    Plan,
    Policy,
    Quest,
    RazorAttention,
    SelfSpeculative,
    StreamingLLM,
    TidalDecode,
)

LAYERS = st.sets(st.integers(0, 30), min_size=1).map(sorted)
FORMS = (
    st.fixed_dictionaries(
        {
            "exit_layer": st.integers(1, 99),
            "draft_head": st.sampled_from([None, "int8"]),
            "tree": st.booleans(),
        }
    )
    | st.fixed_dictionaries({"skip": st.tuples(LAYERS, LAYERS), "tree": st.booleans()})
    | st.just({"tree": True})
)


def shape(layers=6, windows=None):
    return ModelShape(
        model_type="llama",
        heads=(4,) * layers,
        kv_heads=(2,) * layers,
        head_dim=(32,) * layers,
        **({"windows": windows} if windows else {}),
    )


@given(FORMS, st.none() | st.integers(1, 15))
def test_policies_make_the_round_trip(form, draft):
    if form != {"tree": True}:
        form = {**form, "draft": draft}
    policy = SelfSpeculative(**form)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert hash(policy) == hash(SelfSpeculative(**form))
    assert policy.exact


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exit_layer must be given, or skip, or tree=True"),
        ({"exit_layer": 2, "skip": ((1,), ())}, "and not both of the first two"),
        ({"exit_layer": 2, "skip": ((1,), ()), "tree": True}, "and not both of the first two"),
        ({"skip": "search", "tree": True}, "tree must be False with skip="),
        ({"exit_layer": 0}, "exit_layer must be a whole number from 1"),
        ({"exit_layer": 1.5}, "exit_layer must be a whole number from 1"),
        ({"exit_layer": 2, "draft": 0}, "draft must be a whole number from 1"),
        ({"exit_layer": 2, "draft": 16}, "draft must be at most 15"),
        ({"tree": True, "draft": 3}, "draft must be None with tree"),
        ({"tree": 1}, "tree must be True or False"),
        ({"skip": (1, 2)}, "skip must be two lists"),
        ({"skip": ((2, 1), ())}, "skip must be two lists of ascending"),
        ({"skip": ((-1,), ())}, "skip must be two lists of ascending"),
        ({"skip": ((), ())}, "skip must name a layer"),
        ({"tree": True, "draft_vocabulary": 9}, "draft_vocabulary must be None without exit_layer"),
        ({"tree": True, "draft_head": "int8"}, "draft_head must be None without exit_layer"),
        ({"exit_layer": 2, "draft_head": "int4"}, 'draft_head must be "int8" or None'),
        ({"exit_layer": 2, "draft_vocabulary": 0}, "draft_vocabulary must be a whole number"),
    ],
)
def test_wrong_fields_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        SelfSpeculative(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"exit_layer": 6}, "exit_layer must be below the model's 6 layers"),
        ({"skip": ((6,), ())}, "skip must name layers below the model's 6"),
        ({"skip": ((1,), (7,))}, "skip must name layers below the model's 6"),
        ({"skip": ((0, 1), ())}, "skip must leave the attention of the first layer in"),
    ],
)
def test_what_the_model_has_not_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        Plan.make(shape(), [SelfSpeculative(**fields)])


def test_windows_keep_a_layer_of_each_kind():
    windowed = shape(windows=(None, 8, None, 8, None, 8))
    with pytest.raises(ValueError, match="first with each window"):
        Plan.make(windowed, [SelfSpeculative(skip=((1,), ()))])
    Plan.make(windowed, [SelfSpeculative(skip=((2, 3), ()))])


@pytest.mark.parametrize(
    "other",
    [
        TidalDecode(budget=64, sinks=1, recent=1),
        Quest(budget=128),
        StreamingLLM(),
        RazorAttention(heads=[(2, 0)]),
        LocalAttention(window=16),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_that_choose_keys_token_by_token_are_refused(other):
    for policies in (
        [SelfSpeculative(exit_layer=2), other],
        [other, SelfSpeculative(exit_layer=2)],
    ):
        with pytest.raises(ValueError, match=r"SelfSpeculative and .* cannot be combined"):
            Plan.make(shape(), policies)


def test_exact_and_block_sparse_prompts_compose():
    for other in (Exact(stock_layers=(1,)), BlockSparsePrefill(mass=0.9)):
        plan = Plan.make(shape(), [other, SelfSpeculative(exit_layer=2)])
        assert plan.rows[0] == ("dense", "dense")
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match="a second SelfSpeculative"):
        Plan.make(shape(), [SelfSpeculative(exit_layer=2), SelfSpeculative(tree=True)])


def test_models_that_do_not_generate_are_refused():
    import torch
    from encoder_models import make as make_encoder
    from models import make

    bare = make("llama").model
    problems = adaptive.check(bare, SelfSpeculative(exit_layer=1)).problems
    assert any("needs a model that generates" in problem for problem in problems)
    encoder = make_encoder("bert")
    assert not adaptive.check(encoder, SelfSpeculative(exit_layer=1)).ok
    attention = torch.nn.MultiheadAttention(64, 2).eval()
    support = adaptive.check(attention, SelfSpeculative(exit_layer=1))
    assert any("needs a decoder of transformers" in problem for problem in support.problems)
