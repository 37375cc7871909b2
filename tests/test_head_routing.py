"""HeadRouting in models: the heads of each token, as if attention gave 0 for the others."""

import copy
import pickle

import pytest
import torch
from head_cases import FOUR, LARGE, VARIANTS, Masked, fixed, query_of, routed
from models import greedy, make, token_ids

import adaptive
from adaptive import ExpertRouterWeights
from adaptive.layers import hf_head_attention
from adaptive.layers.hf_head_routing import OutputForward, QueryForward


def routed_projections(model):
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return [n for n, f in forwards.items() if isinstance(f, QueryForward | OutputForward)]


CASES = [
    *(("llama", variant, "sdpa") for variant in VARIANTS),
    *(("llama", variant, "eager") for variant in ("two", "fixed")),
    *((case, "two", "sdpa") for case in ("qwen3", "gemma3", "mistral_window", "qwen2", "mixtral")),
    ("gemma3", "fixed", "sdpa"),
    ("phi3", "two", "sdpa"),
    ("phi3", "weighted", "eager"),
    ("phi3", "fixed", "sdpa"),
]


@torch.no_grad()
@pytest.mark.parametrize(("case", "variant", "implementation"), CASES)
def test_chosen_heads_equal_the_masked_dense_model_and_are_counted(
    case, variant, implementation, monkeypatch
):
    monkeypatch.setattr(hf_head_attention, "BLOCK", 16)
    model, ids = make(case, implementation=implementation, **FOUR), token_ids(tokens=40)
    stock, policy = model(ids).logits, VARIANTS[variant]
    reference = Masked(model, policy)
    with adaptive.patch(model, policy) as patched:
        for tokens in (40, 9, 1):  # blocks, and the kernel for few tokens
            reference.runs.clear()
            wanted = reference(ids[:, :tokens]).logits
            patched.reset_stats()
            made = model(ids[:, :tokens]).logits
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
            log = patched.report().heads
            assert {n: layer.runs for n, layer in log.layers.items()} == reference.runs
            assert log.share == sum(map(sum, reference.runs.values())) / (
                ids.shape[0] * tokens * 4 * len(policy.layers)
            )
        assert not torch.allclose(model(ids).logits, stock, rtol=1e-2, atol=1e-2)
        assert not patched.report().exact
        with patched.disabled():
            assert torch.equal(model(ids).logits, stock)
    assert routed_projections(model) == []
    assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
def test_all_heads_are_the_model_as_it_is():
    model, ids = make("llama", **FOUR), token_ids(tokens=40)
    with adaptive.patch(model):
        stock = model(ids).logits
    every = tuple((layer, head) for layer in (0, 1) for head in range(4))
    for policy in (routed(4), fixed(*every)):
        with adaptive.patch(model, policy) as patched:
            assert routed_projections(model) == []
            assert torch.equal(model(ids).logits, stock)
            assert patched.report().heads is None
    with adaptive.patch(model, fixed(*every[:5])):
        assert routed_projections(model) == [
            f"model.layers.1.self_attn.{name}_proj" for name in "qo"
        ]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["two", "weighted", "fixed"])
def test_a_prompt_and_steps_equal_steps_and_chunks(variant):
    model, ids = make("llama", **FOUR), token_ids(tokens=40)
    with adaptive.patch(model, VARIANTS[variant]):
        wanted = model(ids).logits
        for cuts in ([1] * 40, [20, 1, 3, 16], [5, 30, 5]):
            cache, found = None, []
            for part in ids.split(cuts, 1):
                made = model(part, past_key_values=cache, use_cache=True)
                cache = made.past_key_values
                found.append(made.logits)
            torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [12, 30])
@pytest.mark.parametrize(
    ("case", "variant"), [("llama", "two"), ("llama", "fixed"), ("phi3", "two")]
)
def test_padding_runs_nothing_and_changes_nothing(case, variant, tokens):
    model = make(case, **FOUR)
    ids, mask = token_ids(2, tokens), torch.ones(2, tokens, dtype=torch.long)
    mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with adaptive.patch(model, VARIANTS[variant]) as patched:
        alone = [model(ids[:1]).logits, model(ids[1:, 5:]).logits]
        one = patched.report().heads
        patched.reset_stats()
        made = model(ids, attention_mask=mask, position_ids=places).logits
        both = patched.report().heads
        torch.testing.assert_close(made[0], alone[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made[1, 5:], alone[1][0], rtol=1e-4, atol=1e-4)
        assert both.layers[0].rows == 2 * tokens - 5
        assert both.layers[0].runs == one.layers[0].runs
        rows = Masked(model, VARIANTS[variant])  # generation keeps the padding
        left = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**left), rows.model.generate(**left))
        nothing = model(ids, attention_mask=mask * 0).logits
        assert nothing.shape == made.shape


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_only_chosen_heads_are_read(case, dtype):
    """What is not chosen may hold anything: weights of NaN and keys of NaN change nothing."""
    model = make(case, dtype, **LARGE)
    attention, policy = model.model.layers[0].self_attn, fixed((0, 1), (0, 3))
    reference = Masked(model, policy).model.float()
    ids = token_ids(1, 40)
    wanted = reference(ids).logits
    rest = [*range(256), *range(512, 768)]
    query_of(attention).weight[rest] = torch.nan
    attention.o_proj.weight[:, rest] = torch.nan
    for tokens in (1, 9, 40):
        with adaptive.patch(model, policy) as patched:
            made = model(ids[:, :tokens]).logits.float()
            calls = patched.report().native_calls
        error = (made - wanted[:, :tokens]).norm() / wanted[:, :tokens].norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)
        if tokens == 1:
            assert calls["decode_attention:cpu"] == 1
    key_rows = [*range(128), *range(256, 384)]
    if case == "phi3":
        attention.qkv_proj.weight[[1024 + row for row in key_rows]] = torch.nan
    else:
        attention.k_proj.weight[key_rows] = torch.nan
    with adaptive.patch(model, policy):
        made = model(ids[:, :9]).logits.float()
    assert (made - wanted[:, :9]).norm() / wanted[:, :9].norm() < 2e-2


@torch.no_grad()
def test_equal_scores_choose_the_first():
    router = ExpertRouterWeights.from_tensors({0: torch.zeros(4, 128), 1: torch.zeros(4, 128)})
    model, ids = make("llama", **FOUR), token_ids(tokens=24)
    with adaptive.patch(model, fixed((0, 0), (0, 1), (1, 0), (1, 1))):
        wanted = model(ids).logits
    for weighted in (False, True):  # equal scores weigh 1
        with adaptive.patch(model, routed(router=router, weighted=weighted)) as patched:
            torch.testing.assert_close(model(ids).logits, wanted)
            assert patched.report().heads.layers[0].runs == [48, 48, 0, 0]


@pytest.mark.parametrize("variant", ["two", "fixed", "weighted"])
def test_gradients_are_those_of_the_masked_model(variant):
    for tokens in (9, 30):
        model, ids = make("llama", **FOUR), token_ids(tokens=tokens)
        reference = Masked(model, VARIANTS[variant])
        with adaptive.patch(model, VARIANTS[variant]):
            model(ids).logits.square().mean().backward()
        reference(ids).logits.square().mean().backward()
        pairs = zip(model.named_parameters(), reference.model.parameters(), strict=True)
        for (name, ours), right in pairs:
            torch.testing.assert_close(ours.grad, right.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_generation_copies_pickles_and_other_policies():
    model, ids = make("llama", **FOUR), token_ids(tokens=12)
    ours = VARIANTS["two"]
    wanted = greedy(Masked(model, ours).model, ids)
    with adaptive.patch(model, ours):
        assert torch.equal(greedy(model, ids), wanted)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(greedy(twin, ids), wanted)
            adaptive.patched(twin).unpatch()
            assert routed_projections(twin) == []
    others = (
        adaptive.EarlyExit(layers=(1,), threshold=0.0),
        adaptive.TokenRouting(widths=0.5),
        adaptive.FeedForwardExperts(experts=6, top_k=2, split="cut"),
        adaptive.Exact(),
    )
    reference = Masked(model, ours).model
    for other in others:
        with adaptive.patch(reference, other):
            wanted = greedy(reference, ids)
        for policies in ((ours, other), (other, ours)):
            with adaptive.patch(model, *policies):
                assert torch.equal(greedy(model, ids), wanted)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["two", "fixed"])
def test_beams_and_many_prompts(variant):
    model, ids = make("llama", **FOUR), token_ids(tokens=12)
    reference = Masked(model, VARIANTS[variant]).model
    fields = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompts = [ids[0, :5], ids[1], ids[0, :9]]
    with adaptive.patch(model, VARIANTS[variant]) as patched:
        beams = model.generate(ids, num_beams=3, **fields)
        assert torch.equal(beams, reference.generate(ids, num_beams=3, **fields))
        found = patched.generate_many(prompts, batch_size=2, max_new_tokens=5)
    for prompt, made in zip(prompts, found, strict=True):
        assert torch.equal(made, reference.generate(prompt[None], **fields)[0])


@torch.no_grad()
def test_audits_measure_the_distance_from_all_heads():
    model = make("llama", num_hidden_layers=1, **FOUR)
    policy = routed(router=ExpertRouterWeights.random((0,), 4, 128, seed=2), audit_every=2)
    found = []
    handle = model.model.layers[0].self_attn.register_forward_hook(
        lambda *call: found.append(call[-1][0].flatten(0, 1))
    )
    for tokens, step in ((12, 1), (40, 3)):
        ids = token_ids(1, tokens)
        found.clear()
        model(ids)
        with adaptive.patch(model, policy) as patched:
            model(ids)
            model(ids)
            log = patched.report().heads
            values = patched.report().to_dict()["heads"]
            text = str(patched.report())
            patched.reset_stats()
            assert patched.report().heads.error is None
        full, made = (rows[::step] for rows in found[:2])
        assert torch.equal(found[1], found[2])
        assert (log.layers[0].calls, log.layers[0].audits, log.layers[0].audited) == (
            2,
            1,
            len(full),
        )
        errors = (made - full).norm(dim=1) / full.norm(dim=1)
        assert log.error == pytest.approx((float(errors.mean()), float(errors.max())), rel=1e-4)
        assert values["error_mean"] == log.error[0]
        assert f"attention {log.error[0]:.3f}" in text
    handle.remove()


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_behind():
    model, ids = make("llama", **FOUR), token_ids(tokens=24)
    with adaptive.patch(model, VARIANTS["two"]) as patched:
        wanted = model(ids).logits

        def stop(*_):
            raise KeyboardInterrupt

        handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        handle.remove()
        twin = copy.deepcopy(model)
        with patched.disabled():
            stock = model(ids[:, :5]).logits
        for one in (model, twin):
            assert torch.equal(one(ids).logits, wanted)
        assert patched.report().heads.layers[1].calls == 2
    torch.testing.assert_close(model(ids[:, :5]).logits, stock, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", [{"top_k": 2}, {"top_k": 3, "weighted": True}], ids=str)
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_autocast_runs_the_heads_that_float32_scores_choose(case, variant):
    """In the first layer, whose states have no rounding behind them that could decide near ties."""
    rng = torch.Generator().manual_seed(3)
    alike = torch.randn(1, 128, generator=rng) + 0.01 * torch.randn(4, 128, generator=rng)
    router = ExpertRouterWeights.from_tensors({0: alike})  # what 16 bits cannot tell apart
    policy, ids = routed(router=router, **variant), token_ids(tokens=40)
    model = make(case, **FOUR)
    with adaptive.patch(model, policy) as patched:
        model(ids)
        outside = patched.report().heads.layers[0].runs
        for tokens in (40, 9, 1):
            reference = Masked(model, policy)
            patched.reset_stats()
            with torch.autocast("cpu", torch.bfloat16):
                wanted, made = reference(ids[:, :tokens]).logits, model(ids[:, :tokens]).logits
            assert made.dtype == wanted.dtype
            assert patched.report().heads.layers[0].runs == reference.runs[0]
            torch.testing.assert_close(made, wanted, rtol=0, atol=0.1)
            assert tokens < 40 or reference.runs[0] == outside
