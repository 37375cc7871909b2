"""Laws of skinny_linear: a linear layer, summed in float32, row by row."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES, EVERY, every_dtype, far_apart, of_each_number_of_threads, set_for_a_test

from adaptive.ops import skinny_linear
from adaptive.ops.skinny_linear import supports

level = set_for_a_test(EVERY)


def draw(rows, in_features, out_features, dtype, bias=True, seed=0):
    return skinny_linear.make_inputs(
        rows, in_features, out_features, bias, dtype=dtype, device="cpu", seed=seed
    )


def assert_right(made, x, weight, bias=None):
    """Within half a last place of the exact result, and what summing in float32 costs."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    terms = F.linear(x.double().abs(), weight.double().abs())
    summed = 8 * torch.finfo(torch.float32).eps * (terms + exact.abs())
    rounded = 0.51 * torch.finfo(made.dtype).eps * exact.abs() + torch.finfo(made.dtype).tiny
    assert made.dtype == x.dtype
    assert ((made.double() - exact).abs() <= summed + rounded).all()


@every_dtype
@pytest.mark.parametrize("in_features", [*range(32, 137, 8), 1000, 4104])
def test_every_width_is_summed_whole(in_features, dtype, level):
    arguments = draw(5, in_features, 7, dtype)
    assert_right(skinny_linear(*arguments), *arguments)


@every_dtype
@pytest.mark.parametrize("rows", range(17))
def test_every_number_of_rows(rows, dtype, level):
    arguments = draw(rows, 328, 21, dtype, bias=rows % 2 == 0)
    assert_right(skinny_linear(*arguments), *arguments)


@given(
    rows=st.integers(1, 16),
    steps=st.integers(4, 40),
    out_features=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_a_row_does_not_depend_on_the_others(rows, steps, out_features, dtype, seed):
    x, weight, bias = draw(rows, 8 * steps, out_features, dtype, seed=seed)
    made = skinny_linear(x, weight, bias)
    alone = [skinny_linear(row[None], weight, bias) for row in x]
    assert torch.equal(made, torch.cat(alone))
    halves = [skinny_linear(x, part) for part in weight.split(out_features // 2 + 1)]
    assert torch.equal(skinny_linear(x, weight), torch.cat(halves, dim=1))


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype):
    arguments = draw(3, 1032, 1501, dtype)
    made = of_each_number_of_threads(lambda: skinny_linear(*arguments))
    assert all(torch.equal(made[0], other) for other in made[1:])


@every_dtype
def test_strides_are_followed_and_nothing_between_rows_is_read(dtype, level):
    x, weight, bias = draw(5, 104, 19, dtype)
    expected = skinny_linear(x, weight, bias)

    assert torch.equal(skinny_linear(far_apart(x, 131), far_apart(weight, 113), bias), expected)
    same = skinny_linear(x[:1].expand(4, -1), weight, bias)
    assert torch.equal(same, expected[:1].expand(4, -1))


@every_dtype
def test_whole_numbers_are_exact(dtype, level):
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (6, 64), generator=rng).to(dtype)
    weight = torch.randint(-1, 2, (40, 64), generator=rng).to(dtype)
    assert torch.equal(skinny_linear(x, weight), (x.double() @ weight.double().T).to(dtype))


@every_dtype
def test_nan_and_infinity_stay_where_they_are(dtype, level):
    x, weight, bias = draw(4, 72, 30, dtype)
    expected = skinny_linear(x, weight, bias)
    x[1, 70], weight[7, 3], bias[9] = torch.nan, torch.inf, -torch.inf
    made = skinny_linear(x, weight, bias)
    assert made[1].isnan().all()
    rows = [0, 2, 3]
    assert torch.equal(made[rows, 7], torch.inf * x[rows, 3].sign())
    assert (made[rows, 9] == -torch.inf).all()
    others = [n for n in range(30) if n not in (7, 9)]
    assert torch.equal(made[rows][:, others], expected[rows][:, others])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_value_passes_through(dtype, level):
    """Zero weights and every value as the bias; then every value times one."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    zeros = torch.zeros(1, 32, dtype=dtype)
    made = skinny_linear(zeros, zeros.expand(2**16, -1), values)
    torch.testing.assert_close(made[0], values, rtol=0, atol=0, equal_nan=True)
    values = values[values.isfinite()]
    weight = torch.zeros(len(values), 32, dtype=dtype)
    weight[:, 5] = values
    made = skinny_linear(torch.ones(1, 32, dtype=dtype), weight)
    if dtype == torch.bfloat16 and level == "avx512_bf16":  # its products take these for 0
        values[values.abs() < torch.finfo(dtype).tiny] = 0
    torch.testing.assert_close(made[0], values, rtol=0, atol=0)


def test_sums_of_bfloat16_below_the_smallest_normal_number(level):
    tiny = torch.full((1, 32), 1e-20).bfloat16()
    bias = torch.full((1,), 1e-39).bfloat16()
    summed = 0 if level == "avx512_bf16" else (tiny.double() ** 2).sum()
    made = skinny_linear(tiny, tiny, bias)[0]
    right = (summed + bias.double()).bfloat16()
    torch.testing.assert_close(made, right, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding_is_that_of_torch(dtype, level):
    """Sums of two terms, exact in float32: ties, subnormals and overflow among them."""
    rng = torch.Generator().manual_seed(2)
    scale = 2.0 ** torch.randint(-26, 18, (4096, 1), generator=rng)
    terms = torch.randn(4096, 2, generator=rng) * scale
    terms[:, 1] *= 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    weight = torch.zeros(4096, 32, dtype=dtype)
    weight[:, :2] = terms.to(dtype)
    made = skinny_linear(torch.ones(1, 32, dtype=dtype), weight)
    assert torch.equal(made[0], weight[:, :2].float().sum(1).to(dtype))


def test_numpy_comes_back_as_numpy():
    x, weight, bias = (t.numpy() for t in draw(2, 64, 9, torch.float32))
    made = skinny_linear(x, weight, bias)
    assert isinstance(made, np.ndarray)
    np.testing.assert_allclose(made, x @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_supports_says_what_the_kernel_takes():
    assert supports(2048, torch.bfloat16)
    assert not any(supports(n, torch.float32) for n in (24, 36, 2050))
    assert not supports(2048, torch.float64)


X, WEIGHT = torch.ones(2, 64), torch.ones(5, 64)
BAD = {
    "17 rows": ((torch.ones(17, 64), WEIGHT), ValueError, r"input must have at most 16 rows.*17"),
    "24 features": (
        (X[:, :24], WEIGHT[:, :24]), ValueError, r"input must have a multiple of 8.*\[2, 24\]"),
    "60 features": (
        (X[:, :60], WEIGHT[:, :60]), ValueError, r"input must have a multiple of 8.*\[2, 60\]"),
    "input of rank 3": ((X[None], WEIGHT), ValueError, r"input must have 2 dim.*\[1, 2, 64\]"),
    "weight of rank 1": ((X, WEIGHT[0]), ValueError, r"weight must have 2 dimensions.*\[64\]"),
    "weight of other width": (
        (X, WEIGHT[:, :56]), ValueError, "weight must have size 64 in dimension 1"),
    "weight of other dtype": ((X, WEIGHT.half()), TypeError, "weight must be float32"),
    "weight is None": ((X, None), TypeError, "weight must be .*got None"),
    "float64": ((X.double(), WEIGHT.double()), TypeError, "input must be float32 or float16 or"),
    "weight transposed": (
        (X, torch.ones(64, 5).T), ValueError, "weight must be contiguous in its last dim"),
    "input transposed": (
        (torch.ones(64, 2).T, WEIGHT), ValueError, "input must be contiguous in its last dim"),
    "bias of other size": (
        (X, WEIGHT, torch.ones(4)), ValueError, "bias must have size 5 in dimension 0"),
    "bias of other dtype": (
        (X, WEIGHT, torch.ones(5).half()), TypeError, "bias must be float32, got torch.float16"),
    "bias with gaps": (
        (X, WEIGHT, torch.ones(10)[::2]), ValueError, "bias must be contiguous, got stride 2"),
    "bias is a list": ((X, WEIGHT, [1.0] * 5), TypeError, "bias must be a strided .*got list"),
    "weight sparse": ((X, WEIGHT.to_sparse()), TypeError, "weight must be a strided"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    arguments, error, message = BAD[name]
    with torch.no_grad(), pytest.raises(error, match="adaptive::skinny_linear: " + message):
        skinny_linear(*arguments)


def test_a_wrong_output_is_refused_by_name():
    with pytest.raises(TypeError, match=r"out must be float32, got torch\.float16"):
        skinny_linear.into(torch.ones(2, 5).half(), input=X, weight=WEIGHT)
    with pytest.raises(ValueError, match="out must have size 5 in dimension 1"):
        skinny_linear.into(torch.ones(2, 6), input=X, weight=WEIGHT)
