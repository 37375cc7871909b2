"""Decoding by a predictor: it decides after the prompt, and the capacity does in it."""

import dataclasses

import pytest
import torch
from models import greedy, padded
from routed_models import ROUTED, UNITS, close, deep, in_pieces, router, with_positions

import adaptive
from adaptive import MixtureOfDepths, RouterPredictor


def like(weights, sign=1.0):
    """A predictor whose logits are those of the routers, times ``sign``."""
    rows = [torch.tensor(row) for row in weights.weight]
    named = [
        {
            "inner.weight": torch.stack([row, -row]),
            "inner.bias": torch.zeros(2),
            "outer.weight": torch.tensor([sign, -sign]),
            "outer.bias": torch.zeros(1),
        }
        for row in rows
    ]
    return dataclasses.replace(weights, predictor=RouterPredictor.from_tensors(named))


@pytest.mark.parametrize("kv", ["kept", "dropped"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_one_that_says_what_the_router_says(case, unit, kv):
    if kv == "kept" and unit == "mlp":
        pytest.skip("an MLP has no keys")
    model, given = deep(case), padded(3, 24)
    weights, found = router(model, seed=2), []
    ends = [10, *range(11, 25)]
    for fields in (
        {"router": weights},
        {"router": like(weights), "decode": "predictor"},
        {"router": like(weights, -1.0), "decode": "predictor"},
    ):
        policy = MixtureOfDepths(capacity=0.25, unit=unit, kv=kv, audit_every=None, **fields)
        with adaptive.patch(model, policy) as patched:
            logits, _ = in_pieces(model, given, ends)
            log = patched.report().routing
            found.append((logits, {i: layer.ran for i, layer in log.layers.items()}))
            if fields.get("decode"):
                chunks, _ = in_pieces(model, given, [10, 17, 24])
                close(chunks, logits, with_positions(given), 5e-5)
    by_threshold, same, other = found
    close(same[0], by_threshold[0], given)
    assert same[1] == by_threshold[1]
    first = given["attention_mask"][:, :10].sum(1)
    prompt = sum(max(1, int(0.25 * int(row))) for row in first)
    later = int(given["attention_mask"][:, 10:].sum())
    layer = ROUTED[0]  # of the later tokens that it reads exactly those run that did not
    assert same[1][layer] - prompt + other[1][layer] - prompt == later


def test_a_threshold_of_its_own_and_what_weighs():
    """What runs is the predictor's; what it is multiplied by stays the router's logit."""
    model, given = deep("llama"), padded(2, 16)
    weights = router(model)
    loud = {"router": like(weights), "capacity": 0.5, "weighted": True, "audit_every": None}
    plain = {**loud, "router": weights, "decode": "threshold"}
    for least in (0.0, 0.4, 2.0):
        outs = []
        for fields in (plain, {**loud, "decode": "predictor"}):
            with adaptive.patch(model, MixtureOfDepths(**fields, decode_threshold=least)):
                outs.append(in_pieces(model, given, [8, *range(9, 17)])[0])
        close(outs[1], outs[0], given)
    policy = MixtureOfDepths.mod(like(weights), capacity=0.5)
    with adaptive.patch(model, policy) as patched:
        greedy(model, given, 6)
        assert patched.report().routing.agreement is not None


def test_guesses_that_are_no_numbers_name_the_layer():
    model, given = deep("llama"), padded(2)
    named = [
        {
            "inner.weight": torch.full((1, 128), 3e38),
            "inner.bias": torch.zeros(1),
            "outer.weight": torch.zeros(1),
            "outer.bias": torch.zeros(1),
        }
    ]
    weights = router(model, layers=(2,))
    weights = dataclasses.replace(weights, predictor=RouterPredictor.from_tensors(named))
    policy = MixtureOfDepths(router=weights, capacity=0.5, decode="predictor")
    with (
        adaptive.patch(model, policy),
        pytest.raises(ValueError, match="scores of layer 2 must be numbers, got NaN"),
    ):
        in_pieces(model, with_positions(given), [4, *range(5, 17)])
