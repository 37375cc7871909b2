"""What FeedForwardExperts refuses, aloud: models, fields, policies beside it, and calls."""

import pytest
import torch
from models import make, token_ids
from refused_calls import check_compiling_is_refused, check_nan_is_named

import adaptive
from adaptive import ExpertRouterWeights, FeedForwardExperts, Plan
from adaptive.policy import Policy

ROUTER = ExpertRouterWeights.random((0, 1), 6, 128)
BAD = {
    "one expert": ({"experts": 1}, "experts must be a whole number from 2 on, got 1"),
    "none chosen": ({"top_k": 0}, "top_k must be a whole number from 1 on, got 0"),
    "too many": ({"experts": 4, "top_k": 5}, "top_k must be at most the 4 experts, got 5"),
    "split": ({"split": "kmeans"}, "split must be one of clusters, cut, got 'kmeans'"),
    "router": ({"router": "best"}, "router must be 'average' or ExpertRouterWeights, got 'best'"),
    "other experts": ({"router": ROUTER}, "router must score 8 experts, got 6"),
    "layers": ({"layers": (1, 0)}, "layers must be ascending layer numbers from 0"),
    "no layers": ({"layers": ()}, "layers must name a layer, or be None, got ()"),
    "router's": (
        {"experts": 6, "layers": (1,), "router": ROUTER},
        "router must be for layers (1,), got (0, 1)",
    ),
    "scaled": ({"scaled": 1}, "scaled must be True or False, got 1"),
    "audits": ({"audit_every": 0}, "audit_every must be a whole number from 1 on, or None, got 0"),
}
BAD_ROUTER = {
    "layers": ({"layers": ()}, "layers must be ascending layer numbers"),
    "rank": ({"weight": ((1.0,),)}, "weight of layer 0 must hold numbers of 2 dimensions"),
    "ragged": (
        {"weight": (((1.0,), (1.0, 2.0)),)},
        "weight of layer 0 must hold numbers of 2 dimensions",
    ),
    "words": ({"weight": ((("a",),),)}, "weight of layer 0 must hold numbers of 2 dimensions"),
    "NaN": ({"weight": (((float("nan"),),),)}, "weight of layer 0 must hold finite numbers"),
    "one too many": ({"layers": (0, 1)}, "weight must have 2 entries, one per layer, got 1"),
    "bias": ({"bias": ((1.0,),)}, "bias must have shape [1, 2], got [1, 1]"),
    "twice": ({"order": ((0, 0),)}, "order must name each neuron of a layer once, got (0, 0)"),
    "odd": ({"order": ((2, 1, 0),)}, "order must have rows that 2 experts divide, got 3"),
    "orders": ({"order": ((1, 0), (0, 1))}, "order must have 1 rows, one per layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields(name):
    fields, message = BAD[name]
    with pytest.raises(ValueError, match="adaptive: FeedForwardExperts") as found:
        FeedForwardExperts(**fields)
    assert message in str(found.value)


@pytest.mark.parametrize("name", BAD_ROUTER)
def test_bad_routers(name):
    fields, message = BAD_ROUTER[name]
    with pytest.raises(ValueError, match="adaptive: ExpertRouterWeights") as found:
        ExpertRouterWeights(**{"layers": (0,), "weight": (((1.0,), (2.0,)),), **fields})
    assert message in str(found.value)


def test_bad_checkpoints():
    with pytest.raises(TypeError, match="weight of layer 3 must be a tensor, got list"):
        ExpertRouterWeights.from_tensors({3: [[1.0]]})
    with pytest.raises(
        ValueError, match=r"bias must be for layers \[3\] \(missing \[3\], unknown \[2\]\)"
    ):
        ExpertRouterWeights.from_tensors({3: torch.ones(2, 4)}, {2: torch.ones(2)})
    with pytest.raises(ValueError, match="must have a field 'order'"):
        ExpertRouterWeights.from_dict({"layers": [0], "weight": [[[1.0]]], "bias": None})
    with pytest.raises(ValueError, match="must have no field 'width'"):
        ExpertRouterWeights.from_dict({**ROUTER.to_dict(), "width": 1})


def test_a_policy_is_a_value(tmp_path):
    order = torch.arange(96).flip(0)
    router = ExpertRouterWeights.from_tensors(
        {1: torch.randn(6, 128)}, {1: torch.randn(6)}, {1: order}
    )
    policy = FeedForwardExperts(experts=6, top_k=1, router=router)
    assert policy.layers == (1,)
    assert Policy.from_dict(policy.to_dict()) == policy
    assert torch.equal(router.order_of(1), order)
    assert str(FeedForwardExperts(experts=4)) == "FeedForwardExperts(experts=4)"
    assert FeedForwardExperts.emoe() == FeedForwardExperts(experts=16, top_k=2)
    factor = FeedForwardExperts.factor_llm(ROUTER)
    assert (factor.experts, factor.split, factor.scaled) == (6, "cut", True)
    model, ids = make("llama"), token_ids()
    with adaptive.patch(model, policy) as patched, torch.no_grad():
        wanted = model(ids).logits
        patched.plan.save(tmp_path / "plan.json")
    with adaptive.patch(model, Plan.load(tmp_path / "plan.json")), torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("case", ["phi3", "gpt2", "mixtral"])
def test_ffns_of_another_kind(case):
    model = make(case)
    with pytest.raises(adaptive.UnsupportedModel, match="Experts does not fit: layer 0 has"):
        adaptive.patch(model, FeedForwardExperts())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (FeedForwardExperts(experts=7), "experts must divide the 96 neurons of layer 0, got 7"),
        (FeedForwardExperts(layers=(2,)), "layers must be below the model's 2 layers, got 2"),
        (
            FeedForwardExperts(experts=6, router=ExpertRouterWeights.random((1,), 6, 64)),
            "router must be for states of width 128, got 64",
        ),
        (
            FeedForwardExperts(
                experts=2,
                router=ExpertRouterWeights.from_tensors(
                    {0: torch.ones(2, 128)}, orders={0: torch.arange(48)}
                ),
            ),
            "router must order the 96 neurons of layer 0, got 48",
        ),
    ],
    ids=["experts", "layers", "router", "order"],
)
def test_what_does_not_fit_the_model(policy, message):
    model = make("llama")
    before = set(model.__dict__)
    with pytest.raises(ValueError, match=f"FeedForwardExperts.{message}"):
        adaptive.patch(model, policy)
    assert set(model.__dict__) == before
    assert message in adaptive.check(model, policy).problems[0]


def test_models_that_are_none_of_transformers():
    model = torch.nn.MultiheadAttention(64, 2).eval()
    with pytest.raises(adaptive.UnsupportedModel, match="needs a decoder or encoder of transf"):
        adaptive.patch(model, FeedForwardExperts())


def test_policies_that_have_no_meaning_beside_it():
    router = adaptive.RouterWeights(layers=(1,), weight=((0.5,) * 128,))
    ours = FeedForwardExperts()
    for other in (
        adaptive.SelfSpeculative(exit_layer=1),
        adaptive.MixtureOfDepths(router=router),
        adaptive.TokenRouting(widths=0.5),
    ):
        for policies in ((ours, other), (other, ours)):
            with pytest.raises(ValueError, match="be combined: both decide what of an FFN runs"):
                adaptive.patch(make("llama"), *policies)
    with pytest.raises(ValueError, match="a second FeedForwardExperts cannot be combined"):
        adaptive.patch(make("llama"), ours, ours)


@torch.no_grad()
def test_calls_that_cannot_be_answered():
    model, ids = make("llama"), token_ids()
    with adaptive.patch(model, FeedForwardExperts()):
        mlp = model.model.layers[1].mlp
        wanted = model(ids).logits
        handle = mlp.up_proj.register_forward_hook(lambda *_: None)
        with pytest.raises(adaptive.PatchConflict, match="'up_proj', which someone wrapped"):
            model(ids)
        handle.remove()
        check_nan_is_named(model, model.model.layers[1].post_attention_layernorm)
        with pytest.raises(NotImplementedError, match=r"under torch\.compile or torch\.jit"):
            torch.jit.trace(mlp, torch.randn(1, 128))
        assert torch.equal(model(ids).logits, wanted)
        assert mlp(torch.empty(0, 5, 128)).shape == (0, 5, 128)


@pytest.mark.parametrize("whole", [True, False])
def test_compiling(whole):
    check_compiling_is_refused(make("llama", num_hidden_layers=1), FeedForwardExperts(), whole)
