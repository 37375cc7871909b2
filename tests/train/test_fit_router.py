"""fit_router(): what a layer will change is told beforehand, and the policy keeps its laws."""

import dataclasses
import functools
import json
import math

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from models import PAD, greedy, make, padded, token_ids
from routed_models import (
    ROUTED,
    UNITS,
    MaskedDense,
    close,
    deep,
    forward,
    in_pieces,
    with_positions,
)

import adaptive
from adaptive.train import fit_router
from adaptive.train.fit_router import _level

CASES = ["llama", "gpt2", "gpt_neox", "olmo2", "gemma2"]


@functools.cache
def fitted(case, unit="attention", decide="sequence", **fields):
    """A model of four layers, and routers that were fitted to 24 of its sequences."""
    model = deep(case)
    batches = [token_ids(8, 20, seed=seed) for seed in range(10, 13)]
    given = {"layers": ROUTED, "unit": unit, "decide": decide, **fields}
    return model, fit_router(model, batches, **given)


def mixed(log):
    """Whether some rows ran and some did not."""
    return any(0 < layer.ran < layer.offered for layer in log.layers.values())


@pytest.mark.parametrize("decide", ["sequence", "token"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_capacity_1_is_the_model_bit_for_bit(case, unit, decide):
    model, fit = fitted(case, unit, decide, capacity=1)
    assert fit.shares == (1.0, 1.0)
    # Where tokens are routed, padding never runs.
    given = padded(3) if decide == "sequence" else {"input_ids": token_ids(3)}
    with adaptive.patch(model):
        exact, tokens = forward(model, given), greedy(model, given)
    with adaptive.patch(model, fit.policy) as patched:
        assert torch.equal(forward(model, given), exact)
        assert torch.equal(greedy(model, given), tokens)
        assert patched.report().routing.share == 1.0


@pytest.mark.parametrize("unit", UNITS)
def test_with_all_skipped_the_layers_are_not_there(unit):
    model, fit = fitted("llama", unit)
    none = dataclasses.replace(fit.policy, threshold=math.inf)
    given = padded(3)
    with adaptive.patch(model, adaptive.MixtureOfDepths.drop(ROUTED, unit=unit)):
        wanted = greedy(model, given), forward(model, given)
    with adaptive.patch(model, none) as patched:
        ours = greedy(model, given), forward(model, given)
        assert patched.report().routing.share == 0.0
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("decide", ["sequence", "token"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_what_runs_is_what_the_masked_model_runs(case, unit, decide, per_layer):
    model, fit = fitted(case, unit, decide, per_layer=per_layer)
    given = padded(6)
    wanted = MaskedDense(model, fit.policy)(given)
    with adaptive.patch(model, fit.policy) as patched:
        close(forward(model, given), wanted, given)
        assert mixed(patched.report().routing) or not per_layer


@pytest.mark.parametrize("unit", UNITS)
def test_steps_follow_the_prompt(unit):
    model, fit = fitted("llama", unit, per_layer=True)
    given = padded(6, 20)
    first = MaskedDense(model, fit.policy)
    first(with_positions({name: value[:, :15] for name, value in given.items()}))
    runs = {layer: chosen[:, -1] for layer, chosen in first.chosen.items()}
    assert any(0 < int(each.sum()) < 6 for each in runs.values())
    wanted = MaskedDense(model, fit.policy, runs)(with_positions(given))
    with adaptive.patch(model, fit.policy):
        ours, cache = in_pieces(model, given, [15, *range(16, 21)])
        close(ours, wanted, given, 5e-5)
        assert all(torch.equal(cache.layers[layer].runs, runs[layer]) for layer in ROUTED)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2"])
def test_rows_do_not_influence_each_other(case, unit):
    model, fit = fitted(case, unit, per_layer=True)
    given = padded(6)
    with adaptive.patch(model, fit.policy) as patched:
        together = greedy(model, given, 6)
        assert mixed(patched.report().routing)
        for row in range(6):
            real = given["attention_mask"][row].bool()
            alone = greedy(model, given["input_ids"][row : row + 1, real], 6)
            assert torch.equal(together[row, -6:], alone[0, -6:])


@pytest.mark.parametrize("decide", ["sequence", "token"])
@pytest.mark.parametrize("unit", UNITS)
def test_padding_never_counts(unit, decide):
    """What stands where the mask hides it changes no bit, and no padding changes next to none."""
    model, ids = deep("llama"), token_ids(12, 16)
    pad = torch.full((12, 5), PAD)
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], 1)
    given = {"layers": ROUTED, "unit": unit, "decide": decide, "per_layer": True}
    fits = []
    for hidden in (pad, token_ids(12, 5, seed=7)):
        batch = {"input_ids": torch.cat([hidden, ids], 1), "attention_mask": mask}
        places = (mask.cumsum(1) - 1).clamp(min=0)
        fits.append(fit_router(model, [{**batch, "position_ids": places}], **given))
    assert fits[0].policy == fits[1].policy
    plain = fit_router(model, [ids], **given)
    assert (plain.samples, plain.shares) == (fits[0].samples, fits[0].shares)
    assert plain.similarity == pytest.approx(fits[0].similarity, abs=1e-6)
    assert plain.explained == pytest.approx(fits[0].explained, abs=1e-2)


def test_rows_of_padding_alone_are_no_samples():
    model, ids = deep("llama"), token_ids(10, 16)
    mask = torch.ones_like(ids)
    mask[3] = 0
    fit = fit_router(model, [{"input_ids": ids, "attention_mask": mask}], layers=ROUTED)
    assert fit.samples == 9


def kinds(seed=0):
    """A model for which tokens from 64 on have large states, which layers hardly turn."""
    model = make("llama", num_hidden_layers=4)
    with torch.no_grad():
        model.model.embed_tokens.weight[64:] *= 100.0
        model.model.embed_tokens.weight[64:, 0] = 30.0
    ids = token_ids(32, 24, seed=seed) % 62 + 2
    large = torch.arange(32) % 3 == 0
    ids[large] += 64
    return model, ids, large


@pytest.mark.parametrize("unit", UNITS)
def test_sequences_that_a_layer_hardly_changes_skip_it(unit):
    model, ids, large = kinds()
    share = float((~large).float().mean())
    fit = fit_router(model, ids.split(8), capacity=share, layers=(2,), unit=unit, per_layer=True)
    assert fit.explained[0] > 0.5
    assert fit.shares == (share,)
    _, others, large = kinds(seed=5)
    masked = MaskedDense(model, fit.policy)
    masked({"input_ids": others})
    assert torch.equal(masked.chosen[2][:, 0], ~large)
    with adaptive.patch(model, fit.policy) as patched:
        forward(model, {"input_ids": others})
        assert patched.report().routing.layers[2].ran == int((~large).sum())


def test_noise_is_not_explained_and_alike_is_alike():
    """Where nothing can be told beforehand it says so; of equal sequences all run, or none."""
    model = deep("llama")
    fit = fit_router(model, [token_ids(1, 20).expand(12, -1)], layers=ROUTED, per_layer=True)
    assert fit.shares == (1.0, 1.0)
    assert all(told <= 0 for told in fit.explained)
    with adaptive.patch(model, fit.policy) as patched:
        forward(model, {"input_ids": token_ids(1, 20).expand(3, -1)})
        assert patched.report().routing.share == 1.0


def test_given_routers_get_thresholds():
    model, ids = deep("llama"), token_ids(16)
    given = adaptive.RouterWeights.random(ROUTED[:1], 128, seed=2)
    fit = fit_router(model, [ids], capacity=0.3, router=given)
    assert fit.explained is None
    assert fit.shares == (4 / 16,)
    with adaptive.patch(model, fit.policy) as patched:
        forward(model, {"input_ids": ids})
        assert patched.report().routing.share == 4 / 16
    ours, theirs = (torch.tensor(each.weight[0]) for each in (fit.policy.router, given))
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) == pytest.approx(1.0)


def test_the_shares_are_those_that_were_asked_for():
    for capacity in (0.1, 0.25, 0.8):
        _, each = fitted("llama", capacity=capacity, per_layer=True)
        assert each.shares == (int(capacity * 24 + 1e-9) / 24,) * 2
        _, both = fitted("llama", capacity=capacity)
        assert sum(both.shares) == pytest.approx(int(capacity * 48 + 1e-9) / 24)


@for_all(
    st.lists(st.integers(-20, 20), min_size=2, max_size=40),
    st.floats(0, 1, exclude_min=True),
)
def test_a_level_lets_a_share_run_and_alike_alike(values, capacity):
    scores = torch.tensor(values, dtype=torch.float64)
    level, scale = _level(scores, capacity)
    runs = scores >= level
    most = max(int(capacity * len(values) + 1e-9), 1)
    least = scores.sort(descending=True).values[most - 1]
    assert torch.equal(runs, scores >= least)
    assert scale > 0


def test_it_is_the_same_every_time_and_makes_the_round_trip(tmp_path):
    model, fit = fitted("llama", per_layer=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batches = (token_ids(8, 20, seed=seed) for seed in range(10, 13))
    again = fit_router(model, batches, layers=ROUTED, per_layer=True)
    assert again == fit
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    values = json.loads(json.dumps(fit.to_dict()))
    assert adaptive.Policy.from_dict(values["policy"]) == fit.policy
    fit.policy.router.save(tmp_path / "routers.safetensors")
    loaded = adaptive.RouterWeights.load(tmp_path / "routers.safetensors")
    assert loaded == fit.policy.router
    with adaptive.patch(model, fit.policy) as patched:
        logits = forward(model, padded(3))
        patched.plan.save(tmp_path / "plan.json")
    with adaptive.patch(model, adaptive.Plan.load(tmp_path / "plan.json")):
        assert torch.equal(forward(model, padded(3)), logits)
    for layer, share in zip(ROUTED, fit.shares, strict=True):
        assert f"layer {layer}: cosine " in str(fit)
        assert f"runs for {share:.0%}" in str(fit)


@pytest.mark.parametrize("unit", UNITS)
def test_nan_is_named_by_its_layer(unit):
    model = make("llama", num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = math.nan
        model.model.layers[2].self_attn.o_proj.weight[3, 5] = math.nan
    with pytest.raises(FloatingPointError, match="what layer 2 reads and puts out must be finite"):
        fit_router(model, [token_ids(8)], layers=(1, 2, 3), unit=unit)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "above 0 and at most 1, got 0; to run nothing, Mixture"),
        ({"capacity": 1.5}, ValueError, "capacity must be above 0 and at most 1, got 1.5"),
        ({"unit": "head"}, ValueError, "unit must be one of block, attention, mlp, got 'head'"),
        ({"decide": "row"}, ValueError, "decide must be one of sequence, token, got 'row'"),
        ({"per_layer": 1}, TypeError, "per_layer must be True or False, got 1"),
        ({"layers": (0,)}, ValueError, "layers must leave out the first layer"),
        ({"router": [1.0]}, TypeError, "router must be RouterWeights, got list"),
        (
            {"router": adaptive.RouterWeights.random((2,), 64)},
            ValueError,
            "router must read states of the model's width 128, got 64",
        ),
        (
            {"router": adaptive.RouterWeights.random((2,), 128), "layers": (3,)},
            ValueError,
            r"layers must be those of router \(2,\), got \(3,\)",
        ),
    ],
)
def test_settings(fields, error, message):
    with pytest.raises(error, match=message):
        fit_router(deep("llama"), [token_ids(8)], **fields)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([token_ids(7)], ValueError, "hold 8 sequences or more to fit routers to, got 7"),
        ([], ValueError, "batches must hold a batch, got none"),
        (token_ids(8), TypeError, "batches must be an iterable of batches, got Tensor"),
    ],
)
def test_batches_that_are_not_enough(batches, error, message):
    with pytest.raises(error, match=message):
        fit_router(deep("llama"), batches, layers=ROUTED)


def test_a_router_of_another_width_is_refused_by_patch():
    _, fit = fitted("llama")
    narrow = make("llama", num_hidden_layers=4, hidden_size=64)
    with pytest.raises((ValueError, adaptive.UnsupportedModel), match="64"):
        adaptive.patch(narrow, fit.policy)
