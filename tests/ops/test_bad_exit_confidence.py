"""Wrong arguments of exit_confidence and hidden_cosine: the error names the argument."""

import math

import pytest
import torch

from adaptive.ops import exit_confidence, hidden_cosine

HIDDEN, WEIGHT = torch.ones(2, 64), torch.ones(5, 64)
BAD = {
    "17 rows": (
        (torch.ones(17, 64), WEIGHT), ValueError, r"hidden must have at most 16 rows.*\[17, 64\]"),
    "width 24": (
        (HIDDEN[:, :24], WEIGHT[:, :24]), ValueError, r"hidden must have a multiple of 8.*24\]"),
    "width 60": (
        (HIDDEN[:, :60], WEIGHT[:, :60]), ValueError, r"hidden must have a multiple of 8.*60\]"),
    "no vocabulary": (
        (HIDDEN, WEIGHT[:0]), ValueError, r"weight must have a row for each token.*\[0, 64\]"),
    "no vocabulary and no row": (
        (HIDDEN[:0], WEIGHT[:0]), ValueError, r"weight must have a row for each.*\[0, 64\]"),
    "hidden of rank 3": (
        (HIDDEN[None], WEIGHT), ValueError, r"hidden must have 2 dimensions.*\[1, 2, 64\]"),
    "weight of rank 1": ((HIDDEN, WEIGHT[0]), ValueError, r"weight must have 2 dim.*\[64\]"),
    "weight of other width": (
        (HIDDEN, WEIGHT[:, :56]), ValueError, "weight must have size 64 in dimension 1"),
    "weight of other dtype": (
        (HIDDEN, WEIGHT.half()), TypeError, r"weight must be float32, got torch\.float16"),
    "weight is None": ((HIDDEN, None), TypeError, "weight must be .*got None"),
    "float64": (
        (HIDDEN.double(), WEIGHT.double()), TypeError, "hidden must be float32 or float16 or"),
    "weight transposed": (
        (HIDDEN, torch.ones(64, 5).T), ValueError, "weight must be contiguous in its last dim"),
    "hidden transposed": (
        (torch.ones(64, 2).T, WEIGHT), ValueError, "hidden must be contiguous in its last dim"),
    "bias of other size": (
        (HIDDEN, WEIGHT, torch.ones(4)), ValueError, "bias must have size 5 in dimension 0"),
    "bias of other dtype": (
        (HIDDEN, WEIGHT, torch.ones(5).half()), TypeError, "bias must be float32, got"),
    "bias with gaps": (
        (HIDDEN, WEIGHT, torch.ones(10)[::2]), ValueError, "bias must be contiguous, got stride"),
    "weight sparse": ((HIDDEN, WEIGHT.to_sparse()), TypeError, "weight must be a strided"),
    "scale is NaN": (
        (HIDDEN, WEIGHT, None, math.nan), ValueError, "scale must be finite in float32, got nan"),
    "scale is None": (
        (HIDDEN, WEIGHT, None, None), TypeError, "scale must be a number, got NoneType"),
    "softcap negative": (
        (HIDDEN, WEIGHT, None, 1.0, -1.0), ValueError, "softcap must be 0 .*got -1"),
    "softcap infinite": (
        (HIDDEN, WEIGHT, None, 1.0, math.inf), ValueError, "softcap must be finite .*got inf"),
    "softcap is text": (
        (HIDDEN, WEIGHT, None, 1.0, "30"), TypeError, "softcap must be a number, got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    arguments, error, message = BAD[name]
    with torch.no_grad(), pytest.raises(error, match="adaptive::exit_confidence: " + message):
        exit_confidence(*arguments)


def test_unknown_arguments_and_gradients_are_refused():
    with pytest.raises(TypeError, match=r"arguments must be hidden, .*unexpected .*'temperature'"):
        exit_confidence(HIDDEN, WEIGHT, temperature=2.0)
    with pytest.raises(NotImplementedError, match="exit_confidence: has no backward"):
        exit_confidence(HIDDEN.clone().requires_grad_(), WEIGHT)


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (0, torch.zeros(2, 2, dtype=torch.int32), TypeError, "tokens must be int64, got"),
        (0, torch.zeros(2, 3).long(), ValueError, "tokens must have size 2 in dimension 1"),
        (0, torch.zeros(2, 2).long().T, ValueError, "tokens must be contiguous"),
        (1, torch.zeros(2, 2).half(), TypeError, "top must be float32, got torch.float16"),
        (2, torch.zeros(3), ValueError, "lse must have size 2 in dimension 0"),
        (3, torch.zeros(4)[::2], ValueError, "entropy must be contiguous"),
        (3, torch.zeros(2, 1), ValueError, "entropy must have 1 dimensions"),
    ],
)
def test_a_wrong_output_is_refused_by_name(place, wrong, error, message):
    outputs = list(exit_confidence.outputs(HIDDEN, WEIGHT))
    outputs[place] = wrong
    with pytest.raises(error, match="adaptive::exit_confidence: " + message):
        exit_confidence.into(*outputs, hidden=HIDDEN, weight=WEIGHT)


COSINE = {
    "rank 1": ((HIDDEN[0], HIDDEN[0]), ValueError, r"hidden must be \[rows, width\].*\[64\]"),
    "width 0": ((HIDDEN[:, :0], HIDDEN[:, :0]), ValueError, r"hidden must be .*\[2, 0\]"),
    "other rows": ((HIDDEN, HIDDEN[:1]), ValueError, r"previous must have shape \[2, 64\], got"),
    "other width": ((HIDDEN, HIDDEN[:, :32]), ValueError, r"previous must have .*got \[2, 32\]"),
    "whole numbers": ((HIDDEN, HIDDEN.int()), TypeError, "previous must be floating-point, got"),
    "complex": ((HIDDEN * 1j, HIDDEN), TypeError, "hidden must be floating-point, got"),
}  # fmt: skip


@pytest.mark.parametrize("name", COSINE)
def test_hidden_cosine_refuses_by_name(name):
    arguments, error, message = COSINE[name]
    with pytest.raises(error, match="adaptive::hidden_cosine: " + message):
        hidden_cosine(*arguments)
