"""Policies: frozen values that print, hash, and make the round trip through JSON."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.policy import Exact, ModelShape, Plan, Policy

SHAPE = ModelShape(model_type="llama", heads=(4,) * 3, kv_heads=(2,) * 3, head_dim=(32,) * 3)
LAYERS = st.lists(st.integers(0, 40), unique=True).map(lambda layers: tuple(sorted(layers)))


@given(LAYERS)
def test_round_trips(layers):
    policy = Exact(stock_layers=layers)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert hash(policy) == hash(Exact(stock_layers=layers))
    assert eval(str(policy), {"Exact": Exact}) == policy


def test_prints_what_was_chosen():
    assert str(Exact()) == "Exact()"
    assert str(Exact(stock_layers=(0, 3))) == "Exact(stock_layers=(0, 3))"


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Exact().stock_layers = (1,)
    with pytest.raises(TypeError):
        Exact((1,))


@pytest.mark.parametrize("layers", [(-1,), (1, 0), (1, 1), [0], (True,), (1.0,), "01", None, 3])
def test_exact_refuses_what_are_no_layers(layers):
    with pytest.raises(ValueError, match="Exact: stock_layers must be ascending layer numbers"):
        Exact(stock_layers=layers)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ValueError, "policy kind must be one of .*Exact.*, got None"),
        ({"kind": "Sparse"}, ValueError, "got 'Sparse'"),
        ({"kind": "Exact", "budget": 1}, ValueError, "Exact has no field 'budget'"),
        ({"kind": "Exact", "stock_layers": [-1]}, ValueError, "stock_layers must be"),
        ([], TypeError, "must be an object, got list"),
    ],
)
def test_from_dict_refuses_what_is_no_policy(values, error, message):
    with pytest.raises(error, match=message):
        Policy.from_dict(values)


def test_exact_plans_every_layer_but_the_stock_ones():
    plan = Plan.make(SHAPE, [Exact(stock_layers=(1,))])
    assert plan.rows == (("dense", "dense"), ("stock", "stock"), ("dense", "dense"))
    assert Exact.exact is True
    assert Policy.exact is False


def test_policies_plan_one_after_the_other():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LastStock(Policy):
        exact = True

        def plan(self, table):
            return table.with_layer(len(table.rows) - 1, "stock")

    plan = Plan.make(SHAPE, [Exact(), LastStock()])
    assert plan.rows[-1] == ("stock", "stock")
    assert Plan.make(SHAPE, [LastStock(), Exact()]).rows[-1] == ("dense", "dense")
    assert plan.policies == (Exact(), LastStock())


def test_the_base_plans_nothing():
    with pytest.raises(NotImplementedError, match="Policy must implement plan"):
        Policy().plan(Plan.make(SHAPE, []))
