"""Token merging and pruning in timm's vision transformers: the paper's own, and off means off."""

import copy
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm_models
import torch
from timm_models import CASES, FILE, SOURCES, embedded, images, make
from timm_reference import reduced

import adaptive
from adaptive.policy import Plan

WITH_CLASS = [case for case in CASES if case != "mean"]


def merging(r=5, **fields):
    return adaptive.TokenMerging(r=r, audit_every=None, **fields)


def pruning(keep=0.6, **fields):
    return adaptive.TokenPruning(keep=keep, audit_every=None, **fields)


POLICIES = {"merging": merging(), "pruning": pruning()}
both_sources = pytest.mark.parametrize("source", SOURCES)
either_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def held(model):
    """All that patch() could leave in a model, by module: attributes and hooks."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return {
        name: (sorted(module.__dict__), [list(getattr(module, table)) for table in tables])
        for name, module in model.named_modules()
    }


@both_sources
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fused", [True, False])
def test_off_is_the_model_bit_for_bit(source, case, fused):
    model = make(source, case, fused)
    before = held(model)
    with torch.no_grad():
        stock, features = model(images()), model.forward_features(images())
        with adaptive.patch(model) as patched:
            assert torch.equal(model(images()), stock)
            assert patched.report().exact
        for policy in (merging(r=0), pruning(keep=1), POLICIES["merging"]):
            if case == "mean" and isinstance(policy, adaptive.TokenPruning):
                continue
            with adaptive.patch(model, policy) as patched:
                if policy is not POLICIES["merging"]:
                    assert torch.equal(model(images()), stock)
                    assert torch.equal(model.forward_features(images()), features)
                made = model(images())
                with patched.disabled():
                    assert torch.equal(model(images()), stock)
                assert torch.equal(model(images()), made)
            assert held(model) == before
            assert torch.equal(model(images()), stock)


@both_sources
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_merging_is_that_of_the_paper(source, case, fused):
    model = make(source, case, fused)
    right = reduced(model, embedded(model, images()), merging())
    with adaptive.patch(model, merging()):
        made = model.forward_features(images())
    torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-4)


@both_sources
@pytest.mark.parametrize("case", WITH_CLASS)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_pruning_is_that_of_the_paper(source, case, fused):
    model = make(source, case, fused)
    right = reduced(model, embedded(model, images()), pruning())
    with adaptive.patch(model, pruning()):
        made = model.forward_features(images())
    torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-4)


@both_sources
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_report_counts_what_hooks_count(source, case):
    model = make(source, case)
    counted = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: counted.append(args[0].shape[1]))
    with adaptive.patch(model, merging()) as patched:
        model(images(3))
        model.forward_features(images(3))
        report = patched.report()
    tokens = 64 + model.num_prefix_tokens
    assert counted == [tokens - 5 * layer for layer in range(4)] * 2
    assert report.token_merging.tokens == [3 * 2 * count for count in counted[:4]]
    assert [layer.query_tokens for layer in report.layers] == report.token_merging.tokens
    assert report.forward_calls == report.token_merging.calls == 2
    assert report.native_calls == {"merge_tokens:cpu": 6}
    assert report.token_pruning is None


@both_sources
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_special_tokens_stay_alone(source, case):
    """Their states behind the first merge are those without it, to the bit."""
    model = make(source, case)
    seen = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images())
    with adaptive.patch(model, merging(r=99)):
        model(images())
    handle.remove()
    stock, merged = seen
    first = model.num_prefix_tokens
    assert merged.shape[1] < stock.shape[1]
    assert torch.equal(merged[:, :first], stock[:, :first])
    assert not torch.equal(merged[:, first:], stock[:, first : merged.shape[1]])


@both_sources
@either_policy
@torch.no_grad()
def test_no_images_make_no_features(source, policy):
    model = make(source)
    with adaptive.patch(model, policy):
        assert model.forward_features(images()[:0]).shape == (0, 64 + model.num_prefix_tokens, 64)
        assert model(images()[:0]).shape == (0, 10)


@both_sources
@either_policy
@torch.no_grad()
def test_audits_compare_the_features(source, policy):
    model = make(source)
    full = model.forward_features(images())[:, 0]
    policy = type(policy)(**{**vars(policy), "audit_every": 2, "pool": "first"})
    with adaptive.patch(model, policy) as patched:
        made, *_ = [model.forward_features(images())[:, 0] for _ in range(3)]
        report = patched.report()
    log = report.token_merging or report.token_pruning
    cosines = torch.cosine_similarity(made, full, dim=-1)
    assert (log.calls, log.audits, log.audited) == (3, 2, 4)
    assert log.agreement == pytest.approx((cosines.mean().item(), cosines.min().item()), abs=1e-5)
    assert cosines.max() < 0.9999


@both_sources
@either_policy
@torch.no_grad()
def test_copies_pickles_and_plans(source, policy, monkeypatch):
    if source == "layout":  # pickle looks for classes where they say that they are
        for name in ("timm", "timm.models", "timm.layers", FILE, "timm.layers.attention"):
            module = types.ModuleType(name)
            module.__path__ = []
            for kind in ("VisionTransformer", "Block", "Attention"):
                setattr(module, kind, getattr(timm_models, kind))
            monkeypatch.setitem(sys.modules, name, module)
    model = make("layout") if source == "layout" else make(source)
    stock = model(images())
    with adaptive.patch(model, policy) as patched:
        made = model(images())
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(images()), made)
            copied.norm.weight.data.zero_()
            assert torch.equal(adaptive.patched(copied).unpatch()(images()), copied(images()))
        assert torch.equal(model(images()), made)
        plan = Plan.from_dict(patched.plan.to_dict())
    with adaptive.patch(model, plan):
        assert torch.equal(model(images()), made)
    assert torch.equal(model(images()), stock)


@both_sources
@torch.no_grad()
def test_inside_another_module_and_verified(source):
    inner = make(source)
    model = torch.nn.ModuleDict({"backbone": inner, "head": torch.nn.Linear(10, 3)})
    stock = inner(images())
    with adaptive.patch(model, merging()) as patched:
        made = inner(images())
        assert patched.report().layers[1].name == "backbone.blocks.1.attn"
    assert not torch.equal(made, stock)
    with adaptive.patch(inner, merging()) as patched:
        found = patched.verify({"x": images()})
        assert patched.report().forward_calls == 0
    assert found.max_logit_error == pytest.approx(float((made - stock).abs().max()))
    with adaptive.patch(inner) as patched:
        assert patched.verify({"x": images()}).max_logit_error == 0


@both_sources
@pytest.mark.parametrize("fused", [True, False])
@either_policy
@torch.no_grad()
def test_bfloat16_and_autocast(source, fused, policy):
    model = make(source, fused=fused, dtype=torch.bfloat16)
    values = images(dtype=torch.bfloat16)
    with adaptive.patch(model, policy):
        made = model(values)
    assert made.dtype == torch.bfloat16
    wide = make(source, fused=fused).bfloat16().float()
    right = wide(images(dtype=torch.bfloat16).float())
    with adaptive.patch(wide, policy), torch.autocast("cpu", torch.bfloat16):
        cast = wide(images())
    for found in (made, cast):
        assert torch.isfinite(found).all()
        assert torch.cosine_similarity(found.float(), right, dim=-1).min() > 0.9


@both_sources
@either_policy
def test_gradients_flow(source, policy):
    model = make(source).train()
    with adaptive.patch(model, policy):
        model(images()).sum().backward()
    for parameter in model.blocks[0].parameters():
        assert torch.isfinite(parameter.grad).all()


@both_sources
@either_policy
@torch.no_grad()
def test_an_interrupted_pass_leaves_nothing(source, policy):
    model = make(source)
    stock, states = model(images()), embedded(model, images())
    with adaptive.patch(model, policy) as patched:
        right = model(images())

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = model.blocks[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(images())
        handle.remove()
        for block in model.blocks:  # by hand, outside of a pass: the blocks are stock
            states = block(states)
        assert torch.equal(model.forward_head(model.norm(states)), stock)
        assert torch.equal(model(images()), right)
        report = patched.report()
    assert (report.token_merging or report.token_pruning).calls == 2


@pytest.mark.parametrize("policy", ["TokenMerging(r=5)", "TokenPruning(keep=0.6)"])
def test_transformers_is_not_needed(policy):
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import adaptive, timm_models\n"
        "model = timm_models.make('layout')\n"
        f"with adaptive.patch(model, adaptive.{policy}) as patched:\n"
        "    model(timm_models.images())\n"
        "print(patched.report().forward_calls)\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr
