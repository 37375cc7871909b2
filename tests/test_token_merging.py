"""Token merging in stock encoders: fewer tokens, the same shapes, exact where nothing is lost."""

import copy
import pickle

import pytest
import torch
from encoder_exits import DEPTH, deep, given_for, layers_of, seen
from encoder_models import IMAGES, OLD, SUPPORTED, TEXTS, inputs, run

import adaptive
from adaptive.policy import Plan

PLACES = ("modernbert", "dinov3_vit")  # their layers ask where a token stands
CASES = [case for case in SUPPORTED if case not in PLACES]
MERGING_TEXTS = [case for case in TEXTS if case not in PLACES]
NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")


def real(case, given, made):
    """The rows of an output that belong to tokens, if it has a row per token."""
    if case in IMAGES or made.dim() != 3:
        return made.reshape(-1, made.shape[-1])
    return made[given["attention_mask"].bool()]


@pytest.mark.parametrize("case", CASES)
def test_merging_nothing_is_the_model_bit_for_bit(case):
    model, given = deep(case), given_for(case, 3)
    stock = run(model, given)
    with adaptive.patch(model):
        exact = run(model, given)
    for policy in (adaptive.TokenMerging(r=0), adaptive.TokenMerging(keep=1)):
        with adaptive.patch(model, policy) as patched:
            assert torch.equal(run(model, given), exact)
            assert patched.report().token_merging.kept_share == 1
    if case in IMAGES:  # without padding stock attention answers
        assert torch.equal(exact, stock)
    assert torch.equal(run(model, given), stock)


@pytest.mark.parametrize("case", CASES)
def test_layers_get_fewer_tokens_and_outputs_keep_their_shape(case):
    model, given = deep(case), given_for(case, 3)
    stock = run(model, given)
    counted = seen(model)
    with adaptive.patch(model, adaptive.TokenMerging(r=5, audit_every=None)) as patched:
        made = run(model, given)
        log = patched.report().token_merging
    full = counted[0]
    assert counted == [full - 5 * layer for layer in range(DEPTH)]
    rows = log.dense_tokens
    assert log.tokens == [rows - 3 * 5 * layer for layer in range(DEPTH)]
    assert made.shape == stock.shape
    assert torch.isfinite(made).all()
    assert not torch.equal(made, stock)


def doubled(states):
    """States in which the tokens at 2, 6, 10, .. are copies of those before them."""
    states = states.clone()
    states[:, 2::4] = states[:, 1::4][:, : states[:, 2::4].shape[1]]
    return states


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["vit", "siglip_vision", "clip_vision", *MERGING_TEXTS[:1]])
def test_of_equal_tokens_nothing_is_lost(case, implementation):
    """The law of proportional attention: a token of size two counts as its two copies would."""
    model, given = deep(case, implementation=implementation), given_for(case, 3)
    first = layers_of(model)[0]

    def put(_, args, kwargs):
        if args:
            return (doubled(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": doubled(kwargs["hidden_states"])}

    handle = first.register_forward_pre_hook(put, with_kwargs=True)
    stock = real(case, given, run(model, given))
    policy = adaptive.TokenMerging(r=6, layers=(0,), audit_every=None)
    with adaptive.patch(model, policy) as patched:
        merged = real(case, given, run(model, given))
        assert patched.report().token_merging.kept_share < 1
        # Without the sizes in attention the same merge is off.
        bias = torch.Tensor.log
        torch.Tensor.log = lambda sizes: bias(sizes.clamp(max=1))
        try:
            unsized = real(case, given, run(model, given))
        finally:
            torch.Tensor.log = bias
    handle.remove()
    error, without = ((made - stock).abs().max() for made in (merged, unsized))
    assert error < 1e-4 * stock.abs().max()
    assert without > 20 * error


@NEEDS_5
@pytest.mark.parametrize("case", MERGING_TEXTS)
def test_rows_and_padding_do_not_matter_to_each_other(case):
    model, given = deep(case), given_for(case, 3)
    policy = adaptive.TokenMerging(r=4, audit_every=None)
    with adaptive.patch(model, policy):
        made = run(model, given)
        for row, length in enumerate(given["attention_mask"].sum(1).tolist()):
            alone = run(model, {k: v[row : row + 1, :length] for k, v in given.items()})
            wanted = made[row : row + 1, :length] if made.dim() == 3 else made[row : row + 1]
            torch.testing.assert_close(alone, wanted, rtol=1e-3, atol=1e-4)


@NEEDS_5
def test_a_share_is_each_sequence_s_own_and_empty_rows_stay_finite():
    model, given = deep("bert"), given_for("bert", 3)
    given["attention_mask"][2] = 0
    with adaptive.patch(model, adaptive.TokenMerging(keep=0.75, audit_every=1)) as patched:
        made = run(model, given)
        log = patched.report().token_merging
    assert log.tokens == [40 + 33, 30 + 25, 23 + 19, 18 + 15]
    assert torch.isfinite(made).all()
    assert log.audited == 2


def test_the_report_measures_the_error_of_the_pooled_output():
    model, given = deep("vit"), given_for("vit", 3)
    base = model.vit
    full = base(**given)[0][:, 0].detach()
    policy = adaptive.TokenMerging(r=9, pool="first", audit_every=2)
    with adaptive.patch(model, policy) as patched:
        states = [base(**given)[0][:, 0].detach() for _ in range(3)]
        log = patched.report().token_merging
    cosines = torch.cosine_similarity(states[0], full, dim=-1)
    assert (log.calls, log.audits, log.audited) == (3, 2, 6)
    assert log.agreement == pytest.approx((cosines.mean().item(), cosines.min().item()), abs=1e-5)
    assert log.to_dict()["kept_shares"] == pytest.approx([1, 56 / 65, 47 / 65, 38 / 65])
    assert "6 audited" in str(log)


def test_gradients_flow_through_a_merge():
    model, given = deep("vit"), given_for("vit", 3)
    with adaptive.patch(model, adaptive.TokenMerging(r=9)):
        model(**given).logits.sum().backward()
    gradients = [p.grad for p in layers_of(model)[0].parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_for_gradients_are_refused(reentrant):
    """They would run without sizes then, and gradients be those of another model."""
    model, given = copy.deepcopy(deep("vit")).train(), given_for("vit", 3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with adaptive.patch(model, adaptive.TokenMerging(r=9)):
        with pytest.raises(NotImplementedError, match="gradient checkpointing is not supported"):
            model(**given)
        assert torch.isfinite(run(model.eval(), given)).all()


def test_shares_are_rounded_up_as_numbers_of_the_page_are():
    """0.55 * 20 is 11.000000000000002 in floats; 11 tokens are kept."""
    kept = {0.55: 100, 0.56: 25, 0.9: 10, 0.7: 9}
    wanted = {0.55: 55, 0.56: 14, 0.9: 9, 0.7: 7}
    found = {k: n - adaptive.TokenMerging(keep=k).removed(n, 0) for k, n in kept.items()}
    assert found == wanted


def test_copies_pickles_and_disabled():
    model, given = deep("vit"), given_for("vit", 3)
    stock = run(model, given)
    with adaptive.patch(model, adaptive.TokenMerging(r=9)) as patched:
        merged = run(model, given)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(copied, given), merged)
            copied.vit.layernorm.weight.data.zero_()
        with patched.disabled():
            assert torch.equal(run(model, given), stock)
        assert torch.equal(run(model, given), merged)
        plan = Plan.from_dict(patched.plan.to_dict())
    with adaptive.patch(model, plan):
        assert torch.equal(run(model, given), merged)
    assert torch.equal(run(model, given), stock)


def test_special_tokens_stay_alone():
    """Heads read them by their places: their states are no means."""
    for case, protect in {
        "vit": 1,
        "deit": 2,
        "dinov2_with_registers": 3,
        "siglip_vision": 0,
    }.items():
        with adaptive.patch(deep(case), adaptive.TokenMerging(r=1)) as patched:
            assert patched._record.token_reduction.protect == protect


REFUSED = {
    "neither": ({}, "r must be given, or keep"),
    "both": ({"r": 1, "keep": 0.9}, "r must be given, or keep, and not both"),
    "negative": ({"r": -1}, "r must be a whole number from 0 on"),
    "less than half": ({"keep": 0.4}, r"keep must be a number in 0\.5\.\.1, got 0\.4"),
    "descending": ({"r": 1, "layers": (2, 1)}, "layers must be ascending"),
    "pool": ({"r": 1, "pool": "last"}, "pool must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_are_checked(name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match="adaptive: TokenMerging." + message):
        adaptive.TokenMerging(**fields)


def test_what_cannot_be_is_refused_by_name():
    model, given = deep("vit"), given_for("vit", 3)
    with pytest.raises(ValueError, match=r"TokenMerging\.layers must be below 3, the last layer"):
        adaptive.patch(model, adaptive.TokenMerging(r=1, layers=(3,)))
    with pytest.raises(ValueError, match=r"TokenMerging and EncoderExit cannot be combined"):
        adaptive.patch(model, adaptive.EncoderExit(layer=2), adaptive.TokenMerging(r=1))
    with pytest.raises(adaptive.UnsupportedModel, match="merged tokens have none"):
        adaptive.patch(deep("dinov3_vit"), adaptive.TokenMerging(r=1))
    with adaptive.patch(model, adaptive.TokenMerging(r=1)):
        with pytest.raises(NotImplementedError, match="output_hidden_states is not supported"):
            model(**given, output_hidden_states=True)
        if OLD:
            with pytest.raises(NotImplementedError, match="head_mask is not supported"):
                model(**given, head_mask=torch.ones(4, 4))
        assert torch.isfinite(run(model, given)).all()


@NEEDS_5
def test_padding_must_lie_behind():
    model = deep("bert")
    padded = inputs("bert", batch=2, side="left")
    refused = pytest.raises(ValueError, match="all padding behind the tokens")
    with adaptive.patch(model, adaptive.TokenMerging(r=1)), refused:
        run(model, padded)
