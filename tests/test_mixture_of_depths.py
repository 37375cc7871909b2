"""Mixture-of-Depths per sequence: what runs, that nothing else does, and what the cache holds."""

import copy
import dataclasses
import json
import math

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
    parts,
    router,
    with_positions,
)

import adaptive


def mindskip(model, unit, seed=0, **fields):
    given = {"unit": unit, "decide": "sequence", **fields}
    return adaptive.MixtureOfDepths(router=router(model, seed=seed), **given)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_a_threshold_that_all_reach_is_the_model_bit_for_bit(case, unit):
    model, given = deep(case), padded(3)
    with adaptive.patch(model):
        exact = forward(model, given)
        tokens = greedy(model, given)
    with adaptive.patch(model, mindskip(model, unit, threshold=-math.inf)) as patched:
        assert torch.equal(forward(model, given), exact)
        assert torch.equal(greedy(model, given), tokens)
        assert patched.report().routing.share == 1.0


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_skip_are_those_of_the_masked_model(case, unit):
    """With some rows that run and some that skip, in one layer at least."""
    model, given = deep(case), padded(4)
    mixed = 0
    for seed in range(4):
        policy = mindskip(model, unit, seed)
        masked = MaskedDense(model, policy)
        wanted = masked(given)
        with adaptive.patch(model, policy) as patched:
            close(forward(model, given), wanted, given)
            log = patched.report().routing
        for layer in ROUTED:
            runs = masked.chosen[layer][:, 0]
            assert (log.layers[layer].offered, log.layers[layer].ran) == (4, int(runs.sum()))
            mixed += 0 < int(runs.sum()) < 4
    assert mixed


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_steps_follow_the_decision_of_the_prompt(case, unit):
    model, given = deep(case), padded(4, 20)
    policy = mindskip(model, unit, seed=1)
    first = MaskedDense(model, policy)
    first(with_positions({name: value[:, :12] for name, value in given.items()}))
    runs = {layer: chosen[:, 0] for layer, chosen in first.chosen.items()}
    wanted = MaskedDense(model, policy, runs)(with_positions(given))
    for ends in ([12, *range(13, 21)], [12, 20]):
        with adaptive.patch(model, policy):
            ours, cache = in_pieces(model, given, ends)
            close(ours, wanted, given, 5e-5)
            for layer in ROUTED:
                assert torch.equal(cache.layers[layer].runs, runs[layer])
                if unit != "mlp":
                    full = cache.layers[0].used_bytes()
                    if cache.layers[layer].is_sliding == cache.layers[0].is_sliding:
                        held = cache.layers[layer].used_bytes()
                        assert held == full * int(runs[layer].sum()) // 4
                    assert cache.layers[layer].get_seq_length() == 20


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "mixtral"])
def test_layers_that_are_dropped_are_not_there(case, unit):
    """Dropped blocks are a model without these layers; nothing of them is called."""
    model, given = deep(case), padded(3)
    calls = []
    policy = adaptive.MixtureOfDepths.drop(ROUTED, unit=unit)
    policy = dataclasses.replace(policy, audit_every=None)
    wanted = MaskedDense(model, policy)(given)
    with adaptive.patch(model, policy) as patched:
        for layer in ROUTED:
            for module in parts(model, unit)[0][layer].modules():
                if isinstance(module, torch.nn.Linear):
                    hook = module.register_forward_hook(lambda *_: calls.append(1))
                    calls.append(hook)
        forward(model, given)
        hooks = [hook for hook in calls if hook != 1]
        calls = [1 for call in calls if call == 1]
        for hook in hooks:
            hook.remove()
        close(forward(model, given), wanted, given)
        log = patched.report().routing
    assert (log.layers[2].calls, log.layers[2].skipped, log.share) == (2, 2, 0.0)
    # Of an MLP one token is run once, to see in which form it returns its output.
    assert not calls or unit == "mlp"


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "olmo2"])
def test_rows_do_not_influence_each_other(case):
    model, given = deep(case), padded(4)
    mixed = set()
    for seed in range(3):
        with adaptive.patch(model, mindskip(model, "attention", seed)) as patched:
            together = greedy(model, given, 10)
            mixed |= {layer.ran for layer in patched.report().routing.layers.values()}
            for row in range(4):
                real = given["attention_mask"][row].bool()
                alone = greedy(model, given["input_ids"][row : row + 1, real], 10)
                assert torch.equal(together[row, -10:], alone[0, -10:])
    assert len(mixed) > 1


@pytest.mark.parametrize("unit", UNITS)
def test_beams_keep_the_decision_of_their_row(unit):
    model, given = deep("llama"), padded(4)
    with adaptive.patch(model, mindskip(model, unit, seed=1)):
        together = greedy(model, given, 6, num_beams=3)
        for row in range(4):
            real = given["attention_mask"][row].bool()
            alone = greedy(model, given["input_ids"][row : row + 1, real], 6, num_beams=3)
            assert torch.equal(together[row, -6:], alone[0, -6:])


def test_counts_are_those_of_hooks():
    model, given = deep("llama"), padded(4)
    rows = {layer: [] for layer in ROUTED}
    policy = dataclasses.replace(
        mindskip(model, "attention", seed=1), audit_every=None
    )  # audits run all rows
    with adaptive.patch(model, policy) as patched:
        hooks = [
            model.model.layers[layer].self_attn.o_proj.register_forward_hook(
                lambda _, args, __, layer=layer: rows[layer].append(len(args[0]))
            )
            for layer in ROUTED
        ]
        greedy(model, given, 5)
        log = patched.report().routing
        for hook in hooks:
            hook.remove()
        for layer in ROUTED:
            found = log.layers[layer]
            assert (found.offered, found.ran) == (4 * 5, sum(rows[layer]))
            quiet = found.calls + found.decode_calls - found.skipped - found.decode_skipped
            assert quiet == len(rows[layer])
        text = str(patched.report())
        assert "modules not run:" in text
        values = json.loads(json.dumps(patched.report().to_dict()))
        assert values["routing"]["layers"]["2"]["ran"] == log.layers[2].ran
        patched.reset_stats()
        assert patched.report().routing.share is None


def test_a_row_of_padding_alone_does_not_run():
    model, given = deep("llama"), padded(3)
    given["attention_mask"][1] = 0
    with adaptive.patch(model, mindskip(model, "mlp", threshold=-math.inf)) as patched:
        forward(model, given)
        assert patched.report().routing.layers[2].ran == 2


def test_undone_it_is_the_model_bit_for_bit():
    model, given = deep("llama"), padded(3)
    stock, state = forward(model, given), set(model.state_dict())
    with adaptive.patch(model, mindskip(model, "block")) as patched:
        assert not torch.equal(forward(model, given), stock)
        assert set(model.state_dict()) == state
        with patched.disabled():
            assert torch.equal(forward(model, given), stock)
        twin = copy.deepcopy(model)
        ours = forward(model, given)
    assert torch.equal(forward(model, given), stock)
    assert torch.equal(forward(twin, given), ours)
    adaptive.patched(twin).unpatch()
    assert torch.equal(forward(twin, given), stock)


def test_a_plan_brings_its_routers_along(tmp_path):
    model, given = deep("llama"), padded(3)
    weights = router(model)
    biased = dataclasses.replace(weights, bias=(0.1, -0.2))
    for known in (weights, biased):
        known.save(tmp_path / "router.safetensors")
        assert adaptive.RouterWeights.load(tmp_path / "router.safetensors") == known
    policy = adaptive.MixtureOfDepths.mindskip(biased)
    assert adaptive.Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    with adaptive.patch(model, policy) as patched:
        wanted = forward(model, given)
        patched.plan.save(tmp_path / "plan.json")
    with adaptive.patch(model, adaptive.Plan.load(tmp_path / "plan.json")):
        assert torch.equal(forward(model, given), wanted)


def test_verify_sees_what_skipping_costs():
    model = deep("llama")
    with adaptive.patch(model, mindskip(model, "attention", threshold=-math.inf)) as patched:
        assert patched.verify(token_ids(2), 4).token_agreement == 1.0
    with adaptive.patch(model, adaptive.MixtureOfDepths.drop(ROUTED)) as patched:
        found = patched.verify(token_ids(2), 4)
        assert found.max_logit_error > 0.01 * found.max_logit
