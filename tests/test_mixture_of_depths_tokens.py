"""Mixture-of-Depths per token: what runs, which keys it sees, and what decoding makes of it."""

import math
from dataclasses import replace

import pytest
import torch
from models import greedy, padded, token_ids
from routed_models import (
    CASES,
    ROUTED,
    UNITS,
    MaskedDense,
    close,
    deep,
    forward,
    in_pieces,
    router,
    with_positions,
)

import adaptive

RULES = [
    {"threshold": 0.5},
    {"capacity": 0.25},
    {"threshold": 0.4, "weighted": True},
    {"capacity": 0.5, "weighted": True},
]


def tokenwise(model, unit, seed=0, **fields):
    return adaptive.MixtureOfDepths(router=router(model, seed=seed), unit=unit, **fields)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_all_tokens_are_the_model_bit_for_bit(case, unit):
    model, given = deep(case), {"input_ids": token_ids(3)}
    with adaptive.patch(model):
        exact = forward(model, given)
        tokens = greedy(model, given)
    for rule in ({"threshold": -math.inf}, {"capacity": 1.0, "decode_threshold": 0}):
        with adaptive.patch(model, tokenwise(model, unit, **rule)) as patched:
            assert torch.equal(forward(model, given), exact)
            assert torch.equal(greedy(model, given), tokens)
            assert patched.report().routing.share == 1.0


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_tokens_that_skip_are_those_of_the_masked_model(case, unit, rule):
    model, given = deep(case), padded(3)
    policy = tokenwise(model, unit, **rule)
    masked = MaskedDense(model, policy)
    wanted = masked(given)
    with adaptive.patch(model, policy) as patched:
        close(forward(model, given), wanted, given)
        log = patched.report().routing
    for layer in ROUTED:
        assert log.layers[layer].offered == int(given["attention_mask"].sum())
        assert (
            0 < log.layers[layer].ran == int(masked.chosen[layer].sum()) < log.layers[layer].offered
        )


@pytest.mark.parametrize("kv", ["kept", "dropped"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_a_prompt_then_steps_then_chunks_are_one_pass(case, unit, kv):
    """By threshold a token's decision is its own, so all are the masked model in one pass."""
    if kv == "kept" and unit == "mlp":
        pytest.skip("an MLP has no keys")
    model, given = deep(case), padded(3, 24)
    policy = tokenwise(model, unit, kv=kv)
    wanted = MaskedDense(model, policy)(with_positions(given))
    for ends in ([24], [10, *range(11, 25)], [10, 16, 24]):
        with adaptive.patch(model, policy):
            close(in_pieces(model, given, ends)[0], wanted, given, 5e-5)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_cache_holds_the_tokens_that_ran(case):
    model, given = deep(case), padded(3, 24)
    policy = tokenwise(model, "block")
    masked = MaskedDense(model, policy)
    masked(with_positions(given))
    with adaptive.patch(model, policy):
        cache = in_pieces(model, given, [10, *range(11, 25)])[1]
    for layer in ROUTED:
        held = cache.layers[layer]
        ran = masked.chosen[layer]
        assert held.lengths.tolist() == ran.sum(1).tolist()
        for row, count in enumerate(held.lengths.tolist()):
            assert held.positions[row, :count].tolist() == ran[row].nonzero()[:, 0].tolist()
        full = cache.layers[0]
        assert held.used_bytes() == full.used_bytes() * int(ran.sum()) // ran.numel()


@pytest.mark.parametrize("rule", [{"threshold": 0.5}, {"capacity": 0.3}], ids=str)
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "olmo2"])
def test_rows_do_not_influence_each_other(case, rule):
    model, given = deep(case), padded(3)
    with adaptive.patch(model, tokenwise(model, "block", **rule)):
        together = greedy(model, given, 12)
        for row in range(3):
            real = given["attention_mask"][row].bool()
            alone = greedy(model, given["input_ids"][row : row + 1, real], 12)
            assert torch.equal(together[row, -12:], alone[0, -12:])


def test_cropping_and_reordering_are_those_of_the_tokens():
    model, given = deep("llama"), padded(3, 24)
    policy = tokenwise(model, "block")
    with adaptive.patch(model, policy):
        short = in_pieces(model, {k: v[:, :16] for k, v in given.items()}, [16])[1]
        cache = in_pieces(model, given, [10, 24])[1]
        cache.crop(-8)
        order = torch.tensor([2, 0, 1])
        for layer in ROUTED:
            ours, theirs = cache.layers[layer], short.layers[layer]
            assert ours.get_seq_length() == 16
            assert torch.equal(ours.lengths, theirs.lengths)
            theirs.reorder_cache(order)
            ours.reorder_cache(order)
            for row, count in enumerate(theirs.lengths.tolist()):
                for name in ("keys", "values"):
                    a, b = (
                        getattr(ours, name)[row, :, :count],
                        getattr(theirs, name)[row, :, :count],
                    )
                    assert torch.allclose(a, b, atol=1e-5)
        beams = greedy(model, given, 6, num_beams=3)
        assert torch.equal(beams, greedy(model, given, 6, num_beams=3, use_cache=False))


@pytest.mark.parametrize("unit", ["block", "attention"])
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_compact_positions_count_the_tokens_that_ran(case, unit):
    """Step by step as in one pass, and other than with original positions."""
    model, ids = deep(case), token_ids(1, 24)
    policy = tokenwise(model, unit, positions="compact")
    with adaptive.patch(model, policy):
        whole = forward(model, {"input_ids": ids})
        pieces = in_pieces(
            model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [9, *range(10, 25)]
        )[0]
    close(pieces, whole, {}, 5e-5)
    with adaptive.patch(model, tokenwise(model, unit)):
        assert (forward(model, {"input_ids": ids}) - whole).abs().max() > 1e-3


def test_gamma_mod_weighs_the_mlp_alone():
    """One layer by hand: attention as it is, the MLP times the score, positions of the chosen."""
    model, ids = deep("llama"), token_ids(1, 24)
    shared = adaptive.RouterWeights.from_tensors(
        {2: torch.randn(2, 128, generator=torch.Generator().manual_seed(3)) / 8}
    )
    policy = adaptive.MixtureOfDepths.gamma_mod(shared, threshold=0.5)
    policy = replace(policy, audit_every=None)  # a hook would see the audit's pass, too
    seen = {}
    layer = model.model.layers[2]
    with torch.no_grad():
        hook = layer.register_forward_pre_hook(
            lambda _, args, kw: seen.update(kw, x=args[0]), with_kwargs=True
        )
        model(ids)
        hook.remove()
        x = seen["x"]
        weight = torch.tensor(shared.weight[0])
        score = (layer.input_layernorm(x) @ weight).sigmoid()[0]
        places = (score >= 0.5).nonzero()[:, 0]
        some, positions = x[:, places], torch.arange(len(places))[None]
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(some),
            position_embeddings=model.model.rotary_emb(some, positions),
            attention_mask=None,
        )
        some = some + attended
        some = some + layer.mlp(layer.post_attention_layernorm(some)) * score[places, None]
        wanted = x.clone()
        wanted[:, places] = some
        found = {}
        with adaptive.patch(model, policy):
            hook = model.model.layers[3].register_forward_pre_hook(
                lambda _, args: found.update(x=args[0])
            )
            model(ids)
            hook.remove()
    assert 0 < len(places) < 24
    assert torch.allclose(found["x"], wanted, atol=1e-5)
