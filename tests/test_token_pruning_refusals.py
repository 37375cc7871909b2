"""What token pruning is refused for, aloud: fields, models, calls, and policies beside it."""

import copy
import itertools

import pytest
import torch
from encoder_exits import deep, given_for
from encoder_models import OLD, inputs, run

import adaptive

NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")


def pruning(**fields):
    return adaptive.TokenPruning(**{"keep": 0.6, "audit_every": None, **fields})


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_for_gradients_are_refused(reentrant):
    model, given = copy.deepcopy(deep("vit")).train(), given_for("vit", 3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with adaptive.patch(model, pruning()):
        with pytest.raises(NotImplementedError, match="checkpointing is not supported with TokenP"):
            model(**given)
        assert torch.isfinite(run(model.eval(), given)).all()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiling_is_refused(fullgraph):
    model, given = copy.deepcopy(deep("vit")), given_for("vit", 3)
    with adaptive.patch(model, pruning()):
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        with pytest.raises(Exception, match=r"TokenPruning cannot run under torch\.compile"):
            run(compiled, given)
        assert torch.isfinite(run(model, given)).all()


@pytest.mark.parametrize(
    "policy",
    [
        adaptive.TokenPruning(keep=0.6),
        adaptive.TokenMerging(r=4),
        adaptive.EncoderExit(threshold=0.9),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_tracing_is_refused(policy):
    model, given = copy.deepcopy(deep("vit")), given_for("vit", 3)
    name, values = type(policy).__name__, given["pixel_values"]
    with adaptive.patch(model, policy):
        with pytest.raises(
            NotImplementedError, match=rf"{name} cannot run under torch\.jit\.trace"
        ):
            torch.jit.trace(model, values, strict=False, check_trace=False)
        assert torch.isfinite(run(model, given)).all()


REFUSED = {
    "zero": ({"keep": 0}, "keep must be a number above 0 and at most 1, got 0"),
    "above": ({"keep": 1.1}, "keep must be a number above 0 and at most 1"),
    "NaN": ({"keep": float("nan")}, "keep must be a number above 0"),
    "rule": ({"rule": "norm"}, "rule must be one of attention, information, got 'norm'"),
    "fused": ({"fused": "max"}, "fused must be one of mean, sum, none"),
    "restore": ({"fused": "none"}, "restore must be cached where nothing is"),
    "balance": ({"balance": -1}, "balance must be a finite number from 0 on"),
    "descending": ({"layers": (2, 1)}, "layers must be ascending"),
    "none": ({"layers": ()}, "layers must hold a layer, or be None"),
    "pool": ({"pool": "last"}, "pool must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_are_checked(name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match="adaptive: TokenPruning." + message):
        pruning(**fields)


OTHERS = [
    adaptive.EncoderExit(layer=2),
    adaptive.TokenMerging(r=1),
    adaptive.GlobalLocalAttention(window=9),
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda policy: type(policy).__name__)
def test_others_that_change_what_a_layer_gets(other):
    for policies in itertools.permutations((other, pruning())):
        with pytest.raises(ValueError, match=r"and Token\w+ cannot be combined|TokenPruning and"):
            adaptive.patch(deep("vit"), *policies)


def test_what_cannot_be_is_refused_by_name():
    model, given = deep("vit"), given_for("vit", 3)
    with pytest.raises(ValueError, match=r"TokenPruning\.layers must be below 3, the last layer"):
        adaptive.patch(model, pruning(layers=(3,)))
    with pytest.raises(adaptive.UnsupportedModel, match="tokens that stay move to others"):
        adaptive.patch(deep("dinov3_vit"), pruning())
    with pytest.raises(adaptive.UnsupportedModel, match="has no class token, whose attention"):
        adaptive.patch(deep("siglip_vision"), pruning())
    with pytest.raises(adaptive.UnsupportedModel, match="TokenPruning does not fit: it is for enc"):
        adaptive.patch(torch.nn.MultiheadAttention(64, 2).eval(), pruning())
    with adaptive.patch(model, pruning()):
        with pytest.raises(NotImplementedError, match="hidden_states is not supported with TokenP"):
            model(**given, output_hidden_states=True)
        if OLD:
            with pytest.raises(NotImplementedError, match="head_mask is not supported"):
                model(**given, head_mask=torch.ones(4, 4))
        broken = {"pixel_values": given["pixel_values"].clone()}
        broken["pixel_values"][1, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="attention in layer 1 must be numbers"):
            run(model, broken)
        assert torch.isfinite(run(model, given)).all()


@NEEDS_5
def test_padding_must_lie_behind():
    padded = inputs("bert", batch=2, side="left")
    refused = pytest.raises(ValueError, match="all padding behind the tokens")
    with adaptive.patch(deep("bert"), pruning()) as patched, refused:
        run(patched.model, padded)
