"""WidthRouter and the fields of TokenRouting with one: values, files, and what is refused."""

import json

import pytest
import torch
from models import make
from safetensors.torch import save_file
from width_cases import WIDTHS, always, router

import adaptive
from adaptive import RouterWeights, TokenRouting, WidthRouter
from adaptive.policy import Policy
from adaptive.policy.token_routing import neurons_of

ONE = RouterWeights.random((0, 1), 128)
SMALL = {"layers": (0, 2), "weight": (((1.0, 2.0), (3.0, 4.0)), ((5.0, 6.0), (7.0, 8.0)))}

BAD_POLICIES = {
    "one number": ({"widths": 0.5}, "widths must be ascending shares from 0 to 1, two or more"),
    "one width": ({"widths": (0.5,)}, "widths must be ascending shares from 0 to 1, two or more"),
    "descending": ({"widths": (1, 0.5, 0.2, 0)}, "widths must be ascending shares"),
    "twice": ({"widths": (0, 0.5, 0.5, 1)}, "widths must be ascending shares"),
    "negative": ({"widths": (-0.5, 0, 0.5, 1)}, "widths must be ascending shares"),
    "too wide": ({"widths": (0, 0.5, 1, 1.5)}, "widths must be ascending shares"),
    "a truth value": ({"widths": (False, 0.2, 0.5, 1)}, "widths must be ascending shares"),
    "too few": ({"widths": (0, 0.5, 1)}, "widths must be the 4 that the router chooses from"),
    "not two": ({"router": ONE}, "widths must be the 2 that the router chooses from"),
    "layers": ({"layers": (0,)}, r"layers must be those of the router, \[0, 1\], or None"),
    "a word": ({"router": "norm"}, "router must be a WidthRouter, RouterWeights or None"),
    "audit 0": ({"audit_every": 0}, "audit_every must be a whole number from 1 on, or None"),
}
BAD_ROUTERS = {
    "no layers": ({"layers": ()}, "layers must be ascending layer numbers from 0"),
    "order": ({"layers": (2, 0)}, "layers must be ascending layer numbers from 0"),
    "entries": ({"layers": (0, 1, 2)}, "weight must have 3 entries, one per layer"),
    "one choice": (
        {"weight": (((1.0, 2.0),), ((1.0, 2.0),))},
        "weight of layer 0 must have 2 rows or more",
    ),
    "choices": (
        {"weight": (SMALL["weight"][0], ((1.0,), (2.0,)))},
        "weight must have the same choices and width",
    ),
    "words": ({"weight": (SMALL["weight"][0], (("a", "b"), (1.0, 2.0)))}, "weight of layer 2 must"),
    "infinite": (
        {"weight": (SMALL["weight"][0], ((1.0, float("inf")), (1.0, 2.0)))},
        "weight of layer 2 must hold finite numbers",
    ),
    "empty": ({"weight": (((), ()), ((), ()))}, "weight must have the same choices and width"),
    "bias entries": ({"bias": ((1.0, 2.0),)}, "bias must have 2 entries, one per layer"),
    "bias numbers": ({"bias": ((1.0,), (2.0,))}, "bias must have 2 numbers per layer"),
}


@pytest.mark.parametrize("name", BAD_POLICIES)
def test_bad_fields_of_the_policy_are_refused(name):
    fields, message = BAD_POLICIES[name]
    with pytest.raises(ValueError, match="adaptive: TokenRouting." + message):
        TokenRouting(**{"widths": WIDTHS, "router": router(), **fields})


@pytest.mark.parametrize("name", BAD_ROUTERS)
def test_bad_routers_are_refused(name):
    fields, message = BAD_ROUTERS[name]
    with pytest.raises(ValueError, match="adaptive: WidthRouter." + message):
        WidthRouter(**{**SMALL, **fields})


def test_a_router_for_another_model_is_refused():
    model = make("llama")
    with pytest.raises(ValueError, match="router must be for states of width 128, got 64"):
        adaptive.patch(model, TokenRouting(widths=WIDTHS, router=router(width=64)))
    with pytest.raises(ValueError, match="layers must be below the model's 2 layers, got 2"):
        adaptive.patch(model, TokenRouting(widths=WIDTHS, router=router(layers=(0, 2))))
    found = adaptive.check(make("phi3"), TokenRouting(widths=WIDTHS, router=router()))
    assert "TokenRouting does not fit: layer 0 has" in str(found)


def test_policies_are_values():
    for given in (router(), always(2)):
        policy = TokenRouting(widths=list(WIDTHS), router=given)
        assert policy.layers == (0, 1)
        again = Policy.from_dict(json.loads(json.dumps(policy.to_dict())))
        assert again == policy
        assert hash(again) == hash(policy)
        assert policy.shares(5) == {0: 1, 1: 1}
    assert str(TokenRouting(widths=(0, 1), router=ONE)) == (
        "TokenRouting(widths=(0, 1), layers=(0, 1), router=RouterWeights(layers=(0, 1)))"
    )
    pair = TokenRouting(widths=(0, 1), router=ONE)
    assert Policy.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    assert neurons_of(0, 96) == 0


def test_routers_are_values_and_files(tmp_path):
    for given in (router(), always(2), WidthRouter(**SMALL)):
        given.save(tmp_path / "routers.safetensors")
        assert WidthRouter.load(tmp_path / "routers.safetensors") == given
        assert WidthRouter.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    assert WidthRouter(**SMALL).width == WidthRouter(**SMALL).choices == 2
    logits = WidthRouter(**SMALL, bias=((0.0, 1.0), (2.0, 3.0))).logits(2, torch.ones(1, 2))
    assert logits.tolist() == [[13.0, 18.0]]
    with pytest.raises(ValueError, match="WidthRouter must have no field 'extra'"):
        WidthRouter.from_dict({**router().to_dict(), "extra": 1})
    with pytest.raises(ValueError, match="WidthRouter must have a field 'bias'"):
        WidthRouter.from_dict({"layers": [0], "weight": []})
    with pytest.raises(TypeError, match="must be an object, got list"):
        WidthRouter.from_dict([])


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "routers.safetensors"
    ONE.save(path)
    with pytest.raises(ValueError, match="holds no routers of widths"):
        WidthRouter.load(path)
    meta = json.dumps({"format": 1, "layers": [0, 1], "bias": False})
    wanted = {f"layers.{i}.router.weight": torch.ones(2, 4) for i in (0, 1)}
    for tensors, message in (
        ({"layers.0.router.weight": torch.ones(2, 4)}, "it must have 'layers.1.router.weight'"),
        ({**wanted, "more": torch.ones(1)}, "it must not have 'more'"),
        ({**wanted, "layers.1.router.weight": torch.ones(4)}, "weight of layer 1 must have shape"),
    ):
        save_file(tensors, path, metadata={"adaptive_width_router": meta})
        with pytest.raises(ValueError, match=message):
            WidthRouter.load(path)


def test_tensors_of_checkpoints():
    with pytest.raises(TypeError, match="weight of layer 3 must be a tensor, got list"):
        WidthRouter.from_tensors({3: [1.0]})
    with pytest.raises(
        ValueError, match=r"bias must be for layers \[0\] \(missing \[0\], unknown \[1\]\)"
    ):
        WidthRouter.from_tensors({0: torch.ones(2, 4)}, {1: torch.ones(2)})
    with pytest.raises(ValueError, match="choices must be a whole number from 2 on, got 1"):
        WidthRouter.random((0,), 8, choices=1)
