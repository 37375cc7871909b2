"""LocalAttention as a policy: its fields, its maps, and what has no meaning beside it."""

import json

import pytest
from test_compose import razor, shape, tidal

from adaptive.policy import (
    BlockSparsePrefill,
    Exact,
    FeedForwardExperts,
    LocalAttention,
    Plan,
    Policy,
    Quest,
    StreamingLLM,
    TokenRouting,
)


def signs(policies, of=None):
    """One string of signs per layer."""
    plan = Plan.make(of or shape(), policies)
    sign = dict(dense="#", stock=".", select="S", reuse="r", pages="p", window="w", razor="z")
    return " ".join("".join({**sign, "local": "l"}[m] for m in row) for row in plan.rows)


def local(**fields):
    return LocalAttention(**{"window": 16, **fields})


MAPS = {
    "all layers": ([local()], "ll ll ll ll ll ll"),
    "some layers": ([local(layers=(1, 5))], "## ll ## ## ## ll"),
    "some heads": ([local(heads={1: [0], 3: 1, 5: [0, 1]})], "## l# ## #l ## ll"),
    "beside tidal": ([local(layers=(0, 5)), tidal()], "ll ## SS rr SS ll"),
    "tidal first": ([tidal(), local(heads=((3, 0), (5, 1)))], "## ## SS lr SS rl"),
    "beside quest": ([Quest(), local(heads=((3, 0),))], "## ## pp lp pp pp"),
    "beside razor": ([local(layers=(5,)), razor()], "## ## #z z# ## ll"),
    "beside streaming": ([StreamingLLM(layers=(4,)), local(layers=(5,))], "## ## ## ## ww ll"),
    "behind widths": ([TokenRouting(widths=0.5), local()], "ll ll ll ll ll ll"),
    "behind experts": ([FeedForwardExperts(), local()], "ll ll ll ll ll ll"),
    "before experts": ([local(), FeedForwardExperts()], "ll ll ll ll ll ll"),
    "behind streaming": ([FeedForwardExperts(), StreamingLLM(layers=(1,))], "## ww ## ## ## ##"),
    "beside stock": ([Exact(stock_layers=(0,)), local()], ".. ll ll ll ll ll"),
}


@pytest.mark.parametrize("case", MAPS)
def test_maps(case):
    policies, expected = MAPS[case]
    assert signs(policies) == expected


def test_layers_with_a_window_of_the_model_are_left_out():
    of = shape(windows=(8, None) * 3)
    assert signs([local()], of) == "## ll ## ll ## ll"


def test_round_trips_as_policy_and_plan(tmp_path):
    rebased = local(sinks=4, positions="rebased")
    assert str(rebased) == "LocalAttention(window=16, sinks=4, positions='rebased')"
    assert Policy.from_dict(json.loads(json.dumps(rebased.to_dict()))) == rebased
    policy = local(sinks=4, heads={1: [0], 3: [0, 1]})
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert str(policy) == "LocalAttention(window=16, sinks=4, heads=((1, 0), (3, 0), (3, 1)))"
    plan = Plan.make(shape(), [policy])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert "l  local: sees first and recent tokens" in str(plan)


REFUSED = [
    ({"window": 0}, r"window must be a whole number from 1 on, got 0"),
    ({"window": -3}, r"window must be a whole number from 1 on, got -3"),
    ({"window": 2.5}, r"window must be a whole number"),
    ({"sinks": -1}, r"sinks must be a whole number from 0 on, got -1"),
    ({"sinks": 17}, r"sinks must be at most window = 16, got 17"),
    ({"layers": ()}, r"layers must name one of the layers, or be None"),
    ({"layers": (2, 1)}, r"layers must be ascending layer numbers"),
    ({"heads": ()}, r"heads must name one of the heads, or be None"),
    ({"heads": ((1, 0), (1, 0))}, r"heads must name each head once, got \(1, 0\)"),
    ({"heads": 3}, r"heads must be \(layer, KV head\) pairs"),
    ({"heads": ((1, 0),), "layers": (1,)}, r"heads must be None where layers are named"),
    ({"positions": "other"}, r"positions must be 'original' or 'rebased', got 'other'"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ValueError, match=f"LocalAttention.{words}"):
        local(**fields)


CLASHES = [
    ([local(layers=(6,))], "layers must be below the model's 6 layers, got 6"),
    ([local(heads=((9, 0),))], r"heads must be of the model's 6 layers, got \(9, 0\)"),
    ([local(heads=((1, 2),))], r"heads must be of the 2 KV heads of layer 1, got \(1, 2\)"),
    ([local(), local()], "a second LocalAttention cannot be combined"),
    ([tidal(), local()], "layers must name the layers that TidalDecode shall leave to it"),
    (
        [FeedForwardExperts(), tidal(), local()],
        "layers must name the layers that TidalDecode shall leave to it",
    ),
    ([tidal(), local(layers=(2,))], "leave out a layer: it selects keys for later layers, got 2"),
    ([razor(), local(layers=(3,))], "leave out a layer: some of its heads keep another window"),
    ([local(layers=(2,)), tidal()], "leave out a layer: LocalAttention drops its keys, got 2"),
    ([local(layers=(2,)), StreamingLLM(layers=(2,))], "LocalAttention gives its heads another"),
    ([tidal(correct_every=8), local(layers=(5,))], "correct_every must be None together with"),
    ([BlockSparsePrefill(), local()], "BlockSparsePrefill reads blocks of its prompts, got 0"),
    (
        [BlockSparsePrefill(layers=(1, 2)), local(heads=((2, 0),))],
        "reads blocks of its pro.* got 2",
    ),
    (
        [local(), BlockSparsePrefill()],
        "layers must find one .* Exact or LocalAttention leaves none",
    ),
    ([Exact(stock_layers=(1,)), local(layers=(1,))], "Exact leaves that layer to the model's own"),
]


@pytest.mark.parametrize(("policies", "words"), CLASHES)
def test_what_has_no_meaning_together_is_refused_with_the_reason(policies, words):
    with pytest.raises(ValueError, match=words):
        Plan.make(shape(), policies)


def test_a_window_of_the_model_is_not_replaced():
    with pytest.raises(ValueError, match="the model itself gives that layer a window of 8 tokens"):
        Plan.make(shape(windows=(8,) * 6), [local(layers=(1,))])
