"""Wrong arguments of gather_tokens, combine_tokens and router_scores: the error names them."""

import math

import pytest
import torch
from routing_cases import listed

from adaptive.ops import combine_tokens, gather_tokens, router_scores

HIDDEN, UPDATE, TOKENS = torch.ones(2, 5, 8), torch.ones(2, 3, 8), listed([[0, 2, -1], [4, 1, 3]])
WEIGHTS, ROUTER = torch.ones(2, 3), torch.ones(1, 8)


def having(row, place, value):
    made = TOKENS.clone()
    made[row, place] = value
    return made


LISTS = {
    "tokens of rank 1": (TOKENS[0], ValueError, r"tokens must have 2 dimensions, got shape \[3\]"),
    "tokens int64": (TOKENS.long(), TypeError, "tokens must be int32, got torch.int64"),
    "tokens of another batch": (TOKENS[:1], ValueError, "tokens must have size 2 in dimension 0"),
    "tokens transposed": (
        listed([[0, 1], [1, 0], [2, 2]]).T, ValueError, "tokens must be contiguous in its last"),
    "a position too large": (
        having(1, 2, 5), IndexError, r"tokens\[1, 2\] must be -1 or in 0\.\.4, got 5"),
    "a position below -1": (
        having(0, 0, -2), IndexError, r"tokens\[0, 0\] must be -1 or in 0\.\.4, got -2"),
    "a token twice": (
        having(1, 1, 4), IndexError, r"tokens\[1, 1\] must be listed once in its row, got 4"),
}  # fmt: skip
COMBINE = {
    "hidden of rank 2": ({"hidden": HIDDEN[0]}, ValueError, "hidden must have 3 dimensions"),
    "float64": ({"hidden": HIDDEN.double()}, TypeError, "hidden must be float32 or float16 or"),
    "hidden transposed": (
        {"hidden": torch.ones(2, 8, 5).mT}, ValueError, "hidden must be contiguous in its last"),
    "update of another dtype": ({"update": UPDATE.half()}, TypeError, "update must be float32"),
    "update of another width": (
        {"update": UPDATE[..., :7]}, ValueError, "update must have size 8 in dimension 2"),
    "too few updates": ({"update": UPDATE[:, :2]}, ValueError, "update must have size 3 in dim"),
    "update is None": ({"update": None}, TypeError, "update must be .*got None"),
    "weights of 16 bits": ({"weights": WEIGHTS.half()}, TypeError, "weights must be float32"),
    "too few weights": ({"weights": WEIGHTS[:, :2]}, ValueError, "weights must have size 3 in"),
}  # fmt: skip
SCORES = {
    "hidden of rank 2": ({"hidden": HIDDEN[0]}, ValueError, "hidden must have 3 dimensions"),
    "width 12": (
        {"hidden": torch.ones(2, 5, 12), "weight": torch.ones(1, 12)}, ValueError,
        r"hidden must have a width that is a multiple of 8, got shape \[2, 5, 12\]"),
    "width 0": (
        {"hidden": HIDDEN[..., :0], "weight": ROUTER[:, :0]}, ValueError,
        "hidden must have a width that is a multiple of 8"),
    "a router of another width": (
        {"weight": torch.ones(1, 16)}, ValueError, "weight must have size 8 in dimension 1"),
    "a router of another dtype": ({"weight": ROUTER.half()}, TypeError, "weight must be float32"),
    "a sigmoid of two": (
        {"weight": torch.ones(2, 8)}, ValueError, r"weight must have size 1 in dim.*\[2, 8\]"),
    "a softmax of one": ({"function": "softmax"}, ValueError, "weight must have size 2 in dim"),
    "a norm of another width": (
        {"norm_weight": torch.ones(7)}, ValueError, "norm_weight must have size 8 in dimension 0"),
    "an unknown function": (
        {"function": "relu"}, ValueError, "function must be sigmoid, softmax or identity, got rel"),
    "eps below 0": ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    "eps of NaN": ({"eps": math.nan}, ValueError, "eps must be finite in float32, got nan"),
    "eps is None": ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", LISTS)
def test_bad_lists_are_refused_by_name(name):
    tokens, error, message = LISTS[name]
    with pytest.raises(error, match="adaptive::gather_tokens: " + message):
        gather_tokens(HIDDEN, tokens)
    update = torch.ones(2, tokens.shape[-1], 8)
    with pytest.raises(error, match="adaptive::combine_tokens: " + message):
        combine_tokens(HIDDEN, update, tokens)


@pytest.mark.parametrize("name", COMBINE)
def test_bad_input_of_combine_tokens_is_refused_by_name(name):
    changes, error, message = COMBINE[name]
    good = {"hidden": HIDDEN, "update": UPDATE, "tokens": TOKENS, "weights": WEIGHTS}
    with pytest.raises(error, match="adaptive::combine_tokens: " + message):
        combine_tokens(**{**good, **changes})


@pytest.mark.parametrize("name", SCORES)
def test_bad_input_of_router_scores_is_refused_by_name(name):
    changes, error, message = SCORES[name]
    with pytest.raises(error, match="adaptive::router_scores: " + message):
        router_scores(**{"hidden": HIDDEN, "weight": ROUTER, **changes})


def test_wrong_outputs_are_refused_by_name():
    with pytest.raises(ValueError, match="gather_tokens: out must have size 3 in dimension 1"):
        gather_tokens.into(torch.ones(2, 4, 8), hidden=HIDDEN, tokens=TOKENS)
    with pytest.raises(ValueError, match="out must be hidden itself or other memory"):
        combine_tokens.into(
            HIDDEN[:1].expand(2, -1, -1), hidden=HIDDEN, update=UPDATE, tokens=TOKENS
        )
    with pytest.raises(TypeError, match="router_scores: scores must be float32"):
        router_scores.into(torch.ones(2, 5).half(), hidden=HIDDEN, weight=ROUTER)
