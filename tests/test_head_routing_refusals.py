"""What HeadRouting refuses, aloud: models, fields, policies beside it, and calls."""

import json

import pytest
import torch
from encoder_models import make as make_encoder
from head_cases import FOUR, ROUTER, fixed, routed
from models import make, token_ids
from refused_calls import check_compiling_is_refused, check_nan_is_named

import adaptive
from adaptive import ExpertRouterWeights, HeadRouting, PatchConflict, Plan
from adaptive.layers.hf_head_routing import why_whole
from adaptive.layers.survey import Site
from adaptive.policy import Policy

ORDERED = ExpertRouterWeights.from_tensors({0: torch.ones(4, 128)}, orders={0: torch.arange(8)})
BAD = {
    "nothing": ({}, "router must be ExpertRouterWeights where heads is None, got None"),
    "no count": ({"router": ROUTER}, "top_k must be from 1 to the 4 heads that the router scores"),
    "none": ({"router": ROUTER, "top_k": 0}, "top_k must be a whole number from 1 on, or None"),
    "too many": ({"router": ROUTER, "top_k": 5}, "4 heads that the router scores, got 5"),
    "layers": ({"router": ROUTER, "top_k": 1, "layers": (1,)}, "be those of router, (0, 1), or No"),
    "order": ({"router": ORDERED, "top_k": 1}, "router must have no order, which is one of neur"),
    "both": ({"router": ROUTER, "heads": ((0, 0),)}, "router must be None where heads are the sam"),
    "count": ({"top_k": 2, "heads": ((0, 0),)}, "top_k must be None where heads are the same"),
    "weights": ({"weighted": True, "heads": ((0, 0),)}, "weighted must be False without a router"),
    "no heads": ({"heads": ()}, "heads must name a head, or be None, got ()"),
    "pairs": ({"heads": (1, 2)}, "heads must hold (layer, KV head) pairs from (0, 0) on, got 1"),
    "theirs": ({"heads": ((0, 0),), "layers": (0, 1)}, "layers must be those of heads, (0,), or N"),
    "audits": ({"heads": ((0, 0),), "audit_every": 0}, "audit_every must be a whole number from 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields(name):
    fields, message = BAD[name]
    with pytest.raises(ValueError, match="adaptive: HeadRouting") as found:
        HeadRouting(**fields)
    assert message in str(found.value)


def test_a_policy_is_a_value(tmp_path):
    model, ids = make("llama", **FOUR), token_ids()
    for policy in (routed(3, weighted=True), fixed((0, 1), (1, 0), (1, 2))):
        assert Policy.from_dict(policy.to_dict()) == policy
        assert policy.layers == (0, 1)
        with adaptive.patch(model, policy) as patched, torch.no_grad():
            wanted = model(ids).logits
            patched.plan.save(tmp_path / "plan.json")
        with adaptive.patch(model, Plan.load(tmp_path / "plan.json")), torch.no_grad():
            assert torch.equal(model(ids).logits, wanted)
    assert HeadRouting(heads={1: [2, 0]}) == HeadRouting(heads=((1, 0), (1, 2)))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (fixed((2, 0)), "layers must be below the model's 2 layers, got 2"),
        (fixed((1, 4)), "heads must be of the 4 KV heads of layer 1, got (1, 4)"),
        (
            routed(1, router=ExpertRouterWeights.random((1,), 2, 128)),
            "router must score the 4 KV heads of layer 1, got 2",
        ),
        (
            routed(1, router=ExpertRouterWeights.random((1,), 4, 64)),
            "router must be for states of width 128, got 64",
        ),
    ],
    ids=["layers", "heads", "experts", "width"],
)
def test_what_does_not_fit_the_model(policy, message):
    model = make("llama", **FOUR)
    before = set(model.__dict__)
    with pytest.raises(ValueError, match="adaptive: HeadRouting") as found:
        adaptive.patch(model, policy)
    assert message in str(found.value)
    assert set(model.__dict__) == before
    assert message in adaptive.check(model, policy).problems[0]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("gpt_neox", r"has no 'q_proj' that is a plain linear layer \(it has query_key_value, d"),
        ("gpt2", r"has no 'q_proj' that is a plain linear layer \(it has c_attn, c_proj, "),
        ("gemma2", "caps its scores"),
        ("olmo2", "normalises the queries of all heads together"),
    ],
)
def test_attention_of_another_kind(case, reason):
    model = make(case, implementation="eager")
    with pytest.raises(adaptive.UnsupportedModel, match=f"attention of layer 0 {reason}"):
        adaptive.patch(model, HeadRouting(heads=((0, 0),)))


def test_packed_projections_that_are_not_known():
    model = make("phi3")
    attention = model.model.layers[0].self_attn

    class Other(type(attention)):
        def forward(self, hidden_states, *args, **kwargs):
            qkv = self.qkv_proj(hidden_states)
            return self.o_proj(qkv[..., : self.o_proj.in_features]), None

    whole, kind = attention.qkv_proj, type(attention)
    site = Site(name="", kind="hf", layer=0, heads=4, kv_heads=2, head_dim=32)
    assert why_whole(attention, site) is None
    attention.__class__ = Other
    assert why_whole(attention, site) == "uses its projections in a way that is not known"
    attention.__class__ = kind
    attention.qkv_proj = torch.nn.Linear(128, 128)
    with pytest.raises(adaptive.UnsupportedModel, match="'qkv_proj' that is not of 8 heads of 32"):
        adaptive.patch(model, HeadRouting(heads=((0, 0),)))
    attention.qkv_proj = whole
    with adaptive.patch(model, HeadRouting(heads=((0, 0),))):
        handle = whole.register_forward_hook(lambda *_: None)
        with pytest.raises(PatchConflict, match="'qkv_proj', which someone hooked"):
            model(token_ids())
        handle.remove()


def test_models_that_are_no_decoders():
    for model in (make_encoder("vit"), torch.nn.MultiheadAttention(64, 2).eval()):
        with pytest.raises(adaptive.UnsupportedModel, match="HeadRouting does not fit: it needs"):
            adaptive.patch(model, HeadRouting(heads=((0, 0),)))


def test_policies_that_have_no_meaning_beside_it():
    router = adaptive.RouterWeights(layers=(1,), weight=((0.5,) * 128,))
    ours = fixed((0, 0))
    others = {
        adaptive.SelfSpeculative(exit_layer=1): "attention sees drafts as trees, head by head",
        adaptive.MixtureOfDepths(router=router): "both decide what of a layer a token runs",
        adaptive.LocalAttention(window=64): "both decide what heads read",
        adaptive.Quest(dense_layers=()): "both decide what heads read",
        adaptive.BlockSparsePrefill(): "both decide what heads read",
        ours: "its fields would contradict each other",
    }
    for other, reason in others.items():
        for policies in ((ours, other), (other, ours)):
            with pytest.raises(ValueError, match=f"be combined: {reason}"):
                adaptive.patch(make("llama", **FOUR), *policies)
    stock = adaptive.Exact(stock_layers=(0,))
    with pytest.raises(ValueError, match="leave out layers that Exact leaves to the model's own"):
        adaptive.patch(make("llama", **FOUR), stock, ours)


@torch.no_grad()
def test_calls_that_cannot_be_answered():
    model, ids = make("llama", implementation="eager", **FOUR), token_ids()
    with adaptive.patch(model, routed()):
        wanted = model(ids).logits
        attention = model.model.layers[1].self_attn
        for name in ("q_proj", "o_proj"):
            handle = getattr(attention, name).register_forward_hook(lambda *_: None)
            with pytest.raises(adaptive.PatchConflict, match=f"'{name}', which someone hooked"):
                model(ids)
            handle.remove()
        check_nan_is_named(model, model.model.layers[1].input_layernorm)
        with pytest.raises(NotImplementedError, match=r"under torch\.compile or torch\.jit"):
            torch.jit.trace(attention.q_proj, torch.randn(1, 1, 128))
        assert torch.equal(model(ids).logits, wanted)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with (
        adaptive.patch(model.train(), routed()),
        pytest.raises(NotImplementedError, match="dropout"),
    ):
        model(ids)


def test_attention_weights():
    model = make("llama", implementation="eager", **FOUR)
    adaptive.patch(model, routed())  # for good: transformers 4 leaves forwards behind on an error
    with pytest.raises(NotImplementedError, match="does not go with output_attentions"):
        model(token_ids(), output_attentions=True)


@torch.no_grad()
def test_a_cache_that_another_policy_reduced():
    model, ids = make("llama", **FOUR), token_ids(1, 60)
    window = adaptive.LocalAttention(window=8, sinks=2)
    with adaptive.patch(model, window):
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
    with (
        adaptive.patch(model, routed()),
        pytest.raises(NotImplementedError, match="reduced"),
    ):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("whole", [True, False])
def test_compiling(whole):
    model = make("llama", num_hidden_layers=1, **FOUR)
    check_compiling_is_refused(model, fixed((0, 1)), whole)


def test_a_plan_that_was_edited_is_held_to_the_model(tmp_path):
    model, path = make("llama", **FOUR), tmp_path / "plan.json"
    with adaptive.patch(model, fixed((0, 0))) as patched:
        patched.plan.save(path)
    text = json.loads(path.read_text())
    for wrong in ([[0, 9]], [[9, 0]]):
        text["policies"][0].update(heads=wrong, layers=[wrong[0][0]])
        path.write_text(json.dumps(text))
        with pytest.raises(ValueError, match="HeadRouting"):
            adaptive.patch(model, Plan.load(path))


def test_padding_is_not_known_when_layers_run_again():
    model = make("llama", **FOUR).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # the name that 4.57 knows
    mask = torch.ones(2, 20, dtype=torch.long)
    with adaptive.patch(model, routed()):
        model(token_ids(), attention_mask=mask, use_cache=False).logits.sum().backward()
        mask[0, :3] = 0
        with pytest.raises(NotImplementedError, match="gradient checkpointing of padded rows"):
            model(token_ids(), attention_mask=mask, use_cache=False)


def test_an_output_projection_that_was_wrapped_gets_no_unweighted_heads():
    model = make("llama", **FOUR)
    attention = model.model.layers[0].self_attn
    with adaptive.patch(model, routed(weighted=True)):
        plain = attention.o_proj
        attention.o_proj = torch.nn.Sequential(plain)
        with pytest.raises(PatchConflict, match="wrapped since patch"):
            model(token_ids())
        attention.o_proj = plain


@pytest.mark.parametrize("layers", [(), (1, 0), (-1,), (0, 0), ("a",)])
def test_layers_to_tune(layers):
    with pytest.raises(ValueError, match="layers must be numbers from 0 on, ascending"):
        adaptive.train.tune_heads(
            make("llama", **FOUR), [token_ids()], steps=1, top_k=2, layers=layers
        )
