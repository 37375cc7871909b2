"""Token pruning in stock encoders: what is left equals masks, and what follows sees all tokens."""

import copy
import itertools
import pickle

import pytest
import torch
from encoder_exits import DEPTH, deep, given_for, layers_of, seen
from encoder_models import IMAGES, OLD, SUPPORTED, TEXTS, run
from pruning_reference import pruned_by_masks

import adaptive
from adaptive.layers import token_prunes
from adaptive.layers.cosine_audit import CosineAudits
from adaptive.policy import Plan

CASES = [c for c in SUPPORTED if c not in ("modernbert", "dinov3_vit", "siglip_vision")]
PRUNED_TEXTS = [case for case in TEXTS if case in CASES]
NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")
FORMS = [
    {"rule": rule, "fused": fused, "restore": restore}
    for rule, fused, restore in itertools.product(
        ("attention", "information"), ("sum", "mean", "none"), ("cached", "fused")
    )
    if (fused, restore) != ("none", "fused")
]


def pruning(**fields):
    return adaptive.TokenPruning(**{"keep": 0.6, "audit_every": None, **fields})


@pytest.mark.parametrize("case", CASES)
def test_keeping_all_is_the_model_bit_for_bit(case):
    model, given = deep(case), given_for(case, 3)
    stock = run(model, given)
    with adaptive.patch(model):
        exact = run(model, given)
    with adaptive.patch(model, pruning(keep=1)) as patched:
        assert torch.equal(run(model, given), exact)
        assert patched.report().token_pruning.kept_share == 1
        assert patched.report().token_merging is None
    if case in IMAGES:  # without padding stock attention answers
        assert torch.equal(exact, stock)
    assert torch.equal(run(model, given), stock)


@pytest.mark.parametrize("case", CASES)
def test_layers_get_fewer_tokens_and_outputs_keep_their_shape(case):
    model, given = deep(case), given_for(case, 3)
    stock = run(model, given)
    counted = seen(model)
    with adaptive.patch(model, pruning()) as patched:
        made = run(model, given)
        log = patched.report().token_pruning
        protect = patched._record.token_reduction.protect
    assert counted[0] == counted[1]
    wanted = [counted[0], counted[0]]
    for _ in range(2):  # after layers 1 and 2 of four; the third quarter is the last layer
        free = wanted[-1] - protect
        wanted.append(protect + -(-free * 6 // 10) + 1)
    assert counted == wanted
    if case in IMAGES:
        assert log.tokens == [3 * count for count in counted]
    assert made.shape == stock.shape
    assert torch.isfinite(made).all()
    assert not torch.equal(made, stock)


@NEEDS_5
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_what_is_left_equals_masks_on_all_tokens(form):
    """Every method against a dense pass in which nothing moves, and its gradients."""
    model, given = copy.deepcopy(deep("bert")), given_for("bert", 3)
    policy = pruning(**form)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        right = pruned_by_masks(model.bert, given, policy)
        with adaptive.patch(model, policy):
            made = model.bert(**given)[0]
    torch.testing.assert_close(made[real], right[real], rtol=1e-4, atol=1e-4)

    weight = torch.randn(right[real].shape, generator=torch.Generator().manual_seed(2))
    grads = []
    parameters = [model.bert.embeddings.word_embeddings.weight]
    parameters += list(layers_of(model)[1].attention.self.query.parameters())
    with adaptive.patch(model, policy):
        learned = model.bert(**given)[0]
    for states in (learned, pruned_by_masks(model.bert, given, policy)):
        grads.append(torch.autograd.grad((states[real] * weight).sum(), parameters))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@NEEDS_5
@pytest.mark.parametrize("case", PRUNED_TEXTS[:1] + PRUNED_TEXTS[-1:])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4]], ids=lambda form: "-".join(form.values()))
def test_rows_and_padding_do_not_matter_to_each_other(case, form):
    model, given = deep(case), given_for(case, 3)
    with adaptive.patch(model, pruning(**form)):
        made = run(model, given)
        for row, length in enumerate(given["attention_mask"].sum(1).tolist()):
            alone = run(model, {k: v[row : row + 1, :length] for k, v in given.items()})
            wanted = made[row : row + 1, :length] if made.dim() == 3 else made[row : row + 1]
            torch.testing.assert_close(alone, wanted, rtol=1e-3, atol=1e-4)


@NEEDS_5
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stock_attention_gets_the_mask_of_what_is_left(implementation):
    """Where a gradient is wanted no kernel answers; a fully padded row stays finite."""
    model, given = deep("bert", implementation=implementation), given_for("bert", 3)
    given["attention_mask"][2] = 0
    real = given["attention_mask"].bool()
    some = {name: values[:2] for name, values in given.items()}
    right = pruned_by_masks(deep("bert").bert, some, pruning())  # in stock's form of masks for sdpa
    with adaptive.patch(model, pruning()) as patched:
        made = model.bert(**given)[0].detach()
        calls = [dict(layer.stock_calls) for layer in patched.report().layers]
    assert [sum(reasons.values()) for reasons in calls] == [1] * DEPTH
    assert torch.isfinite(made).all()
    torch.testing.assert_close(made[real], right[real[:2]].detach(), rtol=1e-4, atol=1e-4)


@NEEDS_5
def test_rows_of_few_tokens_and_empty_ones():
    model, given = deep("bert"), given_for("bert", batch=4)
    for row, length in enumerate((0, 1, 3)):
        given["attention_mask"][row, length:] = 0
    with adaptive.patch(model, pruning(audit_every=1)) as patched:
        made = run(model, given)
        log = patched.report().token_pruning
    # 18 of 19 tokens are free: 11 stay beside the first and the fused one, then 8 of 12
    assert log.tokens == [4 + 19, 4 + 19, 4 + 13, 4 + 10]
    assert torch.isfinite(made).all()
    assert log.audited == 3


def test_the_report_measures_the_error_of_the_pooled_output():
    model, given = deep("vit"), given_for("vit", 3)
    base = model.vit
    full = base(**given)[0][:, 0].detach()
    with adaptive.patch(model, pruning(audit_every=2)) as patched:
        states = [base(**given)[0][:, 0].detach() for _ in range(3)]
        log = patched.report().token_pruning
    cosines = torch.cosine_similarity(states[0], full, dim=-1)
    assert (log.calls, log.audits, log.audited) == (3, 2, 6)
    assert log.agreement == pytest.approx((cosines.mean().item(), cosines.min().item()), abs=1e-5)
    assert log.to_dict()["kept_shares"] == pytest.approx([1, 1, 41 / 65, 26 / 65])
    assert "token pruning: " in str(log)
    assert "6 audited" in str(patched.report())


def test_outputs_that_are_no_numbers_are_the_worst():
    log = CosineAudits()
    log.count_audit([0.5, 0.9], 0.0)
    assert log.agreement == (0.7, 0.5)
    for cosines in ([0.8, torch.nan], [0.9]):
        log.count_audit(cosines, 0.0)
        assert [str(number) for number in log.agreement] == ["nan", "nan"]


def test_the_class_token_s_attention_is_not_computed_for_all_tokens():
    """One query per head and pruning layer, by the kernel; nothing where nothing goes."""
    model, given = deep("vit"), given_for("vit", 3)
    for keep, calls in ((0.6, 2), (1, 0)):
        with adaptive.patch(model, pruning(keep=keep)) as patched:
            run(model, given)
            assert patched.report().native_calls.get("score_tokens:cpu", 0) == calls


def test_an_interrupted_pass_leaves_nothing():
    model, given = deep("vit"), given_for("vit", 3)
    with adaptive.patch(model, pruning()) as patched:
        right = run(model, given)

        def interrupt(*_):
            raise KeyboardInterrupt

        for layer in layers_of(model)[1:]:
            handle = layer.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(model, given)
            handle.remove()
            assert torch.equal(run(model, given), right)
        assert patched.report().token_pruning.calls == DEPTH


def test_copies_pickles_and_disabled():
    model, given = deep("vit"), given_for("vit", 3)
    stock = run(model, given)
    with adaptive.patch(model, pruning(rule="information")) as patched:
        left = run(model, given)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(copied, given), left)
            copied.vit.layernorm.weight.data.zero_()
        with patched.disabled():
            assert torch.equal(run(model, given), stock)
        assert torch.equal(run(model, given), left)
        plan = Plan.from_dict(patched.plan.to_dict())
    with adaptive.patch(model, plan):
        assert torch.equal(run(model, given), left)
    assert torch.equal(run(model, given), stock)


def test_layers_that_prune_are_those_of_the_paper():
    assert pruning().reducing_layers(12) == (3, 6, 9)
    assert [pruning().reducing_layers(depth) for depth in (1, 2, 4)] == [(), (0,), (1, 2)]
    # 0.55 * 20 is 11.000000000000002 in floats; 11 stay. A lone token that goes would be itself.
    assert pruning(keep=0.55, fused="none", restore="cached").removed(21, 1) == 9
    assert pruning(keep=0.9).removed(11, 1) == 0
    assert pruning(keep=0.9, fused="none", restore="cached").removed(11, 1) == 1


@torch.no_grad()
def test_nan_is_counted_where_asking_would_stop_the_device(monkeypatch):
    """As on a GPU, whose answers come late: passes are counted, and the report says it."""
    monkeypatch.setattr(token_prunes, "_answers_at_once", lambda scores: False)
    model, given = deep("vit"), given_for("vit", 2)
    broken = {"pixel_values": given["pixel_values"].clone()}
    broken["pixel_values"][1, 0, 0, 0] = torch.nan
    with adaptive.patch(model, pruning()) as patched:
        wanted = run(model, given)
        assert patched.report().token_pruning.nan_calls == 0
        assert "NaN" not in str(patched.report().token_pruning)
        for _ in range(2):
            made = run(model, broken)
        assert torch.equal(made[0], wanted[0])
        found = patched.report().token_pruning
        assert found.to_dict()["nan_calls"] == found.nan_calls == 2
        assert "NaN chose the tokens of 2 of 3 passes" in str(found)
        run(model, given)
        assert patched.report().token_pruning.nan_calls == 2
        patched.reset_stats()
        assert patched.report().token_pruning.nan_calls == 0
