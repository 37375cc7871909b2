"""Laws of int8 weights: what rounding costs, and that ops multiply exactly what it left."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES, EVERY, every_dtype, of_each_number_of_threads, set_for_a_test

from adaptive.ops import exit_confidence, quantize_weight, skinny_linear
from adaptive.ops.quantize_weight import dequantize_weight

GROUPS = (32, 64, 128)

every_group = pytest.mark.parametrize("group", GROUPS)

level = set_for_a_test(EVERY)


def draw(rows, in_features, out_features, dtype, group, bias=True, seed=0):
    return skinny_linear.make_inputs(
        rows, in_features, out_features, bias, group, dtype=dtype, device="cpu", seed=seed
    )


def assert_right(made, x, weight, bias, scales):
    """Within half a last place of the exact product with the rounded weight, and float32's sums."""
    wide = (
        weight.double().unflatten(1, (scales.shape[1], -1)) * scales.double()[..., None]
    ).flatten(1)
    exact = F.linear(x.double(), wide, None if bias is None else bias.double())
    terms = F.linear(x.double().abs(), wide.abs())
    summed = 10 * torch.finfo(torch.float32).eps * (terms + exact.abs())
    rounded = 0.51 * torch.finfo(made.dtype).eps * exact.abs() + torch.finfo(made.dtype).tiny
    assert made.dtype == x.dtype
    assert ((made.double() - exact).abs() <= summed + rounded).all()


@given(
    rows=st.integers(0, 9),
    groups=st.integers(1, 4),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_rounding_costs_half_a_level(rows, groups, group, dtype, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, groups * group, generator=rng) * scale).to(dtype)
    quantized, scales = quantize_weight(weight, group)
    assert (quantized.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert quantized.shape == weight.shape
    assert scales.shape == (rows, groups)
    error = (dequantize_weight(quantized, scales) - weight.float()).abs().unflatten(1, (groups, -1))
    assert (error <= 0.5001 * scales[..., None]).all()
    largest = weight.float().abs().unflatten(1, (groups, -1)).amax(-1)
    torch.testing.assert_close(scales * 127, largest)
    assert (quantized.int().abs() <= 127).all()


def test_many_rows_are_rounded_as_few_are():
    weight = torch.randn(9000, 32, generator=torch.Generator().manual_seed(3))
    whole = quantize_weight(weight, 32)
    last = quantize_weight(weight[-5:], 32)
    assert all(torch.equal(a[-5:], b) for a, b in zip(whole, last, strict=True))


def test_zeros_stay_zero_and_what_is_not_finite_becomes_nan():
    weight = torch.ones(3, 64)
    weight[0], weight[1, 5], weight[2, 40] = 0, torch.inf, torch.nan
    back = dequantize_weight(*quantize_weight(weight, 32))
    assert (back[0] == 0).all()
    assert back[1, :32].isnan().all()
    assert (back[1, 32:] == 1).all()
    assert back[2, 32:].isnan().all()
    assert (back[2, :32] == 1).all()


BAD_WEIGHTS = {
    "rank 1": ((torch.ones(64),), ValueError, r"weight must have 2 dim.*\[64\]"),
    "float64": ((torch.ones(2, 64).double(),), TypeError, "weight must be float32 or .*float64"),
    "group 48": ((torch.ones(2, 96), 48), ValueError, "group must be 32, 64 or 128 .*got 48"),
    "group too wide": ((torch.ones(2, 96), 64), ValueError, ".*divide the 96 columns.*got 64"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_cannot_be_rounded_are_refused(name):
    arguments, error, message = BAD_WEIGHTS[name]
    with pytest.raises(error, match="adaptive::quantize_weight: " + message):
        quantize_weight(*arguments)


@every_dtype
@every_group
@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_every_width_is_summed_whole(groups, group, dtype, level):
    arguments = draw(5, groups * group, 7, dtype, group)
    assert_right(skinny_linear(*arguments), *arguments)


@every_dtype
@pytest.mark.parametrize("rows", range(17))
def test_every_number_of_rows(rows, dtype, level):
    arguments = draw(rows, 320, 21, dtype, 64, bias=rows % 2 == 0)
    assert_right(skinny_linear(*arguments), *arguments)


@given(
    rows=st.integers(1, 16),
    groups=st.integers(1, 5),
    group=st.sampled_from(GROUPS),
    out_features=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
)
def test_a_row_does_not_depend_on_the_others(rows, groups, group, out_features, dtype):
    x, weight, bias, scales = draw(rows, groups * group, out_features, dtype, group)
    made = skinny_linear(x, weight, bias, scales)
    alone = [skinny_linear(row[None], weight, bias, scales) for row in x]
    assert torch.equal(made, torch.cat(alone))
    ends = [[t[n : n + 1] for t in (weight, bias, scales)] for n in (0, out_features - 1)]
    for place, end in zip((0, -1), ends, strict=True):
        assert torch.equal(skinny_linear(x, *end)[:, 0], made[:, place])


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype):
    arguments = draw(3, 1024, 2501, dtype, 64)
    made = of_each_number_of_threads(lambda: skinny_linear(*arguments))
    assert all(torch.equal(made[0], other) for other in made[1:])


@every_dtype
def test_strides_are_followed_and_nothing_between_rows_is_read(dtype, level):
    x, weight, bias, scales = draw(5, 128, 19, dtype, 32)

    def spread(tensor, around):
        wide = torch.full((len(tensor), tensor.shape[1] + 9), around, dtype=tensor.dtype)
        return wide[:, 3 : 3 + tensor.shape[1]].copy_(tensor)

    made = skinny_linear(spread(x, torch.nan), spread(weight, 99), bias, spread(scales, torch.nan))
    assert torch.equal(made, skinny_linear(x, weight, bias, scales))


@every_dtype
def test_every_level_passes_through(dtype, level):
    """All 256 values times one, by a factor of two; even -128, which is not made here."""
    levels = torch.arange(-128, 128).to(torch.int8)
    weight = torch.zeros(256, 32, dtype=torch.int8)
    weight[torch.arange(256), torch.arange(256) % 32] = levels
    made = skinny_linear(torch.ones(1, 32, dtype=dtype), weight, None, torch.full((256, 1), 2.0))
    assert torch.equal(made[0], (2.0 * levels.float()).to(dtype))


@every_dtype
def test_confidence_is_that_of_the_rounded_head(dtype, level):
    hidden, weight, bias, scales = draw(9, 192, 300, dtype, 64)
    wide = dequantize_weight(weight, scales)
    made = exit_confidence(hidden, weight, bias, 4.0, 20.0, scales)
    right = exit_confidence.reference(hidden.double(), wide.double(), bias, 4.0, 20.0)
    assert torch.equal(made[0], right[0])
    for own, true in zip(made[1:], right[1:], strict=True):
        torch.testing.assert_close(own, true.float(), rtol=2e-5, atol=2e-5)
    alone = exit_confidence(hidden[3:4], weight, bias, 4.0, 20.0, scales)
    assert all(torch.equal(a, b[3:4]) for a, b in zip(alone, made, strict=True))


X, WEIGHT, SCALES = torch.ones(2, 64), torch.ones(5, 64).to(torch.int8), torch.ones(5, 1)
BAD = {
    "int8 without scales": ((X, WEIGHT), TypeError, r"weight must be float32, got torch\.int8"),
    "scales of a float weight": (
        (X, WEIGHT.float(), None, SCALES), TypeError, r"weight must be int8, got torch\.float32"),
    "scales of other rows": (
        (X, WEIGHT, None, SCALES[:4]), ValueError, "weight_scales must have size 5 in dimension 0"),
    "groups of 16": (
        (X, WEIGHT, None, torch.ones(5, 4)), ValueError,
        "weight_scales must have one column.*64 f"),
    "groups of 21": ((X, WEIGHT, None, torch.ones(5, 3)), ValueError, r"got.*\[5, 3\]"),
    "no group": ((X, WEIGHT, None, torch.ones(5, 0)), ValueError, r"got.*\[5, 0\]"),
    "scales of rank 1": (
        (X, WEIGHT, None, torch.ones(5)), ValueError, "weight_scales must have 2 dimensions"),
    "scales in bfloat16": (
        (X, WEIGHT, None, SCALES.bfloat16()), TypeError, "weight_scales must be float32, got"),
    "scales transposed": (
        (X, WEIGHT, None, torch.ones(2, 5).T), ValueError, "weight_scales must be contiguous"),
    "a width that is no group": (
        (X[:, :40], WEIGHT[:, :40], None, SCALES), ValueError, "of the 40 features"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("op", [skinny_linear, exit_confidence], ids=str)
def test_bad_input_is_refused_by_name(op, name):
    arguments, error, message = BAD[name]
    tensors = dict(zip(("weight", "bias", "weight_scales"), arguments[1:], strict=False))
    with torch.no_grad(), pytest.raises(error, match=f"adaptive::{op.name}: .*{message}"):
        op(arguments[0], **tensors)
