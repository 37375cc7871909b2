"""FeedForwardExperts and TokenRouting in encoders: FFNs without a gate, fused, in two modules."""

import copy
import functools
import pickle

import pytest
import torch
from encoder_models import OLD, SUPPORTED, TEXTS, inputs, make, run
from ffn_reference import Experts, First, halves, masked

import adaptive
from adaptive import FeedForwardExperts, TokenRouting, WidthRouter
from adaptive.adapters import family_for
from adaptive.layers.feed_forward import HandOn
from adaptive.layers.hf_ffn_experts import ExpertsForward
from adaptive.layers.hf_width import PrefixForward

FORMS = "bert", "distilbert", "modernbert", "vit", "dinov2", "dinov3_vit"
"""One of each way of writing an FFN; others are written like one of these."""
CASES = [case for case in SUPPORTED if case in FORMS]
TWO = "deit" if OLD else "bert"
"""A model whose FFNs are two modules each."""
NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")


@functools.cache
def stock(case):
    return make(case, implementation="eager")


def given_for(case, batch=3):
    return inputs(case, batch=batch, side="right" if case in TEXTS else "")


def layers_of(model):
    return family_for(model).layer_names(model)


def ours(model):
    kinds = PrefixForward | ExpertsForward | HandOn
    return [n for n, m in model.named_modules() if isinstance(vars(m).get("forward"), kinds)]


def experts(top_k=2, **fields):
    return FeedForwardExperts(**{"experts": 4, "top_k": top_k, "audit_every": None, **fields})


def real(made, given):
    mask = given.get("attention_mask")
    return made if mask is None or made.shape[:2] != mask.shape else made[mask.bool()]


@torch.no_grad()
@pytest.mark.parametrize("split", ["clusters", "cut"])
@pytest.mark.parametrize("case", CASES)
def test_experts_equal_the_masked_dense_encoder_and_padding_runs_none(case, split):
    model, given = copy.deepcopy(stock(case)), given_for(case)
    whole = run(model, given)
    tokens = given.get("attention_mask", torch.ones(0)).sum()
    ran = []
    for layer in map(model.get_submodule, layers_of(model)):
        halves(layer)[-1].register_forward_hook(lambda *call: ran.append(call[-1].numel()))
    with adaptive.patch(model, experts(split=split)) as patched:
        reference, chosen = masked(model, layers_of(model), Experts)
        wanted = run(reference, given)
        ran.clear()
        made = run(model, given)
        torch.testing.assert_close(real(made, given), real(wanted, given), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(real(made, given), real(whole, given), rtol=1e-2, atol=1e-2)
        log = patched.report().experts
        for number, layer in enumerate(chosen):
            runs = layer.chosen[-1]
            if case in TEXTS:
                runs = runs[given["attention_mask"].bool()]
                assert log.layers[number].rows == tokens
            runs = runs.flatten(0, -2)
            assert log.layers[number].rows == len(runs)
            assert log.layers[number].runs == runs.sum(0).long().tolist()
        neurons = halves(model.get_submodule(layers_of(model)[0]))[3].in_features
        assert sum(sum(layer.runs) for layer in log.layers.values()) * neurons // 4 == sum(ran)
        assert log.share == 0.5
        with patched.disabled():
            assert torch.equal(run(model, given), whole)
    assert ours(model) == []
    assert torch.equal(run(model, given), whole)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_all_experts_and_full_widths_are_the_dense_encoder(case):
    model, given = stock(case), given_for(case)
    whole = run(model, given)
    with adaptive.patch(model, experts(top_k=4)):
        made = run(model, given)
        torch.testing.assert_close(real(made, given), real(whole, given), rtol=1e-4, atol=1e-5)
    for policy in (TokenRouting(widths=1.0), experts(top_k=4, split="cut")):
        with adaptive.patch(model, policy):
            assert ours(model) == []


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_prefixes_equal_the_masked_dense_encoder(case):
    model, given = copy.deepcopy(stock(case)), given_for(case)
    whole = run(model, given)
    neurons = halves(model.get_submodule(layers_of(model)[0]))[3].in_features
    with adaptive.patch(model, TokenRouting(widths=0.5, audit_every=None)) as patched:
        reference, _ = masked(model, layers_of(model), lambda _: First(neurons // 2))
        wanted = run(reference, given)
        made = run(model, given)
        torch.testing.assert_close(real(made, given), real(wanted, given), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(real(made, given), real(whole, given), rtol=1e-2, atol=1e-2)
        assert patched.report().widths.used_share == 0.5
        with patched.disabled():
            assert torch.equal(run(model, given), whole)
    assert torch.equal(run(model, given), whole)


@torch.no_grad()
def test_a_width_for_each_token():
    case = TWO if OLD else "distilbert"
    model, given = stock(case), given_for(case)
    whole = run(model, given)
    bias = {layer: torch.zeros(2) for layer in (0, 1)}
    for always, share in ((0, 0.0), (1, 1.0)):
        for values in bias.values():
            values.copy_(torch.nn.functional.one_hot(torch.tensor(always), 2))
        router = WidthRouter.from_tensors({0: torch.zeros(2, 128), 1: torch.zeros(2, 128)}, bias)
        with adaptive.patch(model, TokenRouting(widths=(0, 1), router=router)) as patched:
            made = run(model, given)
            assert patched.report().widths.used_share == share
            same = torch.allclose(real(made, given), real(whole, given), rtol=1e-4, atol=1e-5)
            assert same == bool(always)
    router = WidthRouter.random((0, 1), 128, choices=2)
    with adaptive.patch(model, TokenRouting(widths=(0, 1), router=router)) as patched:
        run(model, given)
        assert 0 < patched.report().widths.used_share < 1


@pytest.mark.parametrize("policy", [experts(), TokenRouting(widths=0.5)], ids=["experts", "widths"])
@pytest.mark.parametrize("case", [TWO, "vit"] if OLD else [TWO, "modernbert"])
def test_gradients_are_those_of_the_masked_encoder(case, policy):
    model, given = copy.deepcopy(stock(case)), given_for(case, batch=1)
    with adaptive.patch(model, policy):
        runs_of = Experts if isinstance(policy, FeedForwardExperts) else lambda _: First(48)
        other, _ = masked(model, layers_of(model), runs_of)
        model(**given)[0].square().mean().backward()
    other(**given)[0].square().mean().backward()
    for (name, mine), right in zip(model.named_parameters(), other.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-3, atol=1e-6, msg=name)


@NEEDS_5
@torch.no_grad()
def test_padding_that_is_no_number_does_not_matter():
    model, given = stock("bert"), given_for("bert", batch=2)
    model = copy.deepcopy(model)
    padding = given["attention_mask"] == 0

    def spoil(module, args, made):
        return made.masked_fill(padding[..., None], torch.nan)

    for policy in (experts(), experts(top_k=4), experts(split="cut")):
        with adaptive.patch(model, policy) as patched:
            layer = model.get_submodule(layers_of(model)[-1])
            wanted = run(model, given)
            handle = layer.attention.register_forward_hook(
                lambda module, args, made: (spoil(module, args, made[0]), *made[1:])
            )
            made = run(model, given)
            handle.remove()
            assert torch.equal(real(made, given), real(wanted, given))
            assert patched.report().experts.layers[1].rows == 2 * int((~padding).sum())


@NEEDS_5
@torch.no_grad()
def test_policies_that_send_rows_or_tokens_away_compose():
    model, given = stock("bert"), given_for("bert")
    tokens = int(given["attention_mask"].sum())
    leave = adaptive.EncoderExit(layer=1, audit_every=None)
    merge = adaptive.TokenMerging(r=4, audit_every=None)
    prune = adaptive.TokenPruning(keep=0.5, layers=(0,), audit_every=None)
    for policy in (experts(), TokenRouting(widths=0.5, audit_every=None)):
        for other in (leave, merge, prune):
            seen = []
            for policies in ((policy, other), (other, policy)):
                with adaptive.patch(model, *policies) as patched:
                    seen.append(run(model, given))
                    report = patched.report()
                    kept = report.token_merging or report.token_pruning
                    log = report.experts or report.widths
                    counted = [
                        layer.rows if report.experts else sum(layer.tokens.values())
                        for layer in log.layers.values()
                    ]
                    assert counted == ([tokens] if other is leave else kept.tokens)
                    assert counted[-1] < tokens or other is leave
            assert torch.equal(*seen)


@NEEDS_5
@torch.no_grad()
def test_sequences_that_go_on_know_their_padding():
    model, given = stock("bert"), {k: v[1:] for k, v in given_for("bert", batch=4).items()}
    lengths = given["attention_mask"].sum(1)
    with adaptive.patch(model, experts()):
        states = model(**given, output_hidden_states=True).hidden_states[:2]
    mask = given["attention_mask"][..., None]
    before, after = ((each * mask).sum(1) / mask.sum(1) for each in states)
    cosines = torch.cosine_similarity(before, after)
    for threshold in (cosines.sort().values[1:] + cosines.sort().values[:-1]) / 2:
        leave = adaptive.EncoderExit(threshold=float(threshold), audit_every=None)
        with adaptive.patch(model, experts(), leave) as patched:
            run(model, given)
            rows = patched.report().experts.layers[1].rows
            assert rows == lengths[cosines < threshold].sum()


@torch.no_grad()
@pytest.mark.parametrize("policy", [experts(), TokenRouting(widths=0.5)], ids=["experts", "widths"])
def test_copies_and_parts_of_copies(policy):
    # of its own: where states were once asked for, transformers leaves hooks that do not pickle
    model, given = make(TWO, implementation="eager"), given_for(TWO)
    layer = model.get_submodule(layers_of(model)[0])
    x = torch.randn(2, 5, 128)
    hidden = layer.intermediate(x)
    down = layer.output.dense(hidden)
    with adaptive.patch(model, policy):
        wanted = run(model, given)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin, given), wanted)
            adaptive.patched(twin).unpatch()
            assert ours(twin) == []
        # a copy of one of the two modules is no FFN any more, and does what its class does
        assert torch.equal(copy.deepcopy(layer.intermediate)(x), hidden)
        assert torch.equal(copy.deepcopy(layer.output.dense)(hidden), down)
        both = copy.deepcopy(layer)
        assert not torch.allclose(both.output.dense(both.intermediate(x)), down, rtol=1e-2)


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_behind():
    model, given = copy.deepcopy(stock(TWO)), given_for(TWO)
    with adaptive.patch(model, experts()):
        wanted = run(model, given)

        def stop(*_):
            raise KeyboardInterrupt

        layer = model.get_submodule(layers_of(model)[1])
        handle = layer.intermediate.intermediate_act_fn.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, given)
        handle.remove()
        assert torch.equal(run(model, given), wanted)


@torch.no_grad()
def test_audits_do_not_count_what_drops_out():
    model = copy.deepcopy(stock("vit" if OLD else "distilbert"))
    given = given_for("vit" if OLD else "distilbert")
    with adaptive.patch(model, experts(audit_every=1)) as patched:
        run(model, given)
        assert patched.report().experts.error[0] > 0
        assert patched.verify(given).max_logit_error > 0
        patched.reset_stats()
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
        drops = any("ffn" in name for name in names)
        run(model.train(), given)
        assert (patched.report().experts.error is None) == drops
