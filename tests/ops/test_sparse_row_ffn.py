"""Laws of sparse_row_ffn: the dense product of the active neurons, summed in float32."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES, every_dtype, far_apart, of_each_number_of_threads

from adaptive.ops import sparse_row_ffn


def draw(rows, neurons, in_features, out_features, active, dtype, seed=0):
    return sparse_row_ffn.make_inputs(
        rows, neurons, in_features, out_features, active, dtype=dtype, device="cpu", seed=seed
    )


def assert_right(made, activations, x, up, down):
    """Within half a last place of the exact result, and what summing in float32 costs."""
    activations, x, up, down = (t.double() for t in (activations, x, up, down))
    exact = (activations * (x @ up.T)) @ down
    terms = (activations.abs() * (x.abs() @ up.abs().T)) @ down.abs()
    summed = 8 * torch.finfo(torch.float32).eps * (terms + exact.abs())
    rounded = 0.51 * torch.finfo(made.dtype).eps * exact.abs() + torch.finfo(made.dtype).tiny
    assert ((made.double() - exact).abs() <= summed + rounded).all()


@every_dtype
@pytest.mark.parametrize("width", [*range(32, 137, 8), 1000])
def test_every_width_is_summed_whole(width, dtype, level):
    for sizes in ((3, 90, width, 48), (3, 90, 48, width)):
        arguments = draw(*sizes, 0.3, dtype)
        assert_right(sparse_row_ffn(*arguments), *arguments)


@every_dtype
@pytest.mark.parametrize("rows", range(17))
def test_every_number_of_rows(rows, dtype, level):
    arguments = draw(rows, 1100, 72, 88, 0.1, dtype)
    assert_right(sparse_row_ffn(*arguments), *arguments)


@pytest.mark.parametrize("active", [0.0, 0.01, 0.5, 1.0])
def test_every_share_of_active_neurons(active, level):
    arguments = draw(2, 1601, 64, 64, active, torch.float32)
    assert_right(sparse_row_ffn(*arguments), *arguments)


@given(
    rows=st.integers(1, 16),
    neurons=st.integers(1, 1200),
    active=st.sampled_from([0.02, 0.2, 0.9]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_a_row_does_not_depend_on_the_others(rows, neurons, active, dtype, seed):
    activations, x, up, down = draw(rows, neurons, 40, 56, active, dtype, seed)
    made = sparse_row_ffn(activations, x, up, down)
    alone = [
        sparse_row_ffn(a[None], own[None], up, down) for a, own in zip(activations, x, strict=True)
    ]
    assert torch.equal(made, torch.cat(alone))


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype):
    arguments = draw(2, 9000, 512, 512, 0.2, dtype)
    made = of_each_number_of_threads(lambda: sparse_row_ffn(*arguments))
    assert all(torch.equal(made[0], other) for other in made[1:])


@every_dtype
def test_strides_are_followed_and_idle_neurons_are_not_read(dtype, level):
    activations, x, up, down = draw(5, 700, 104, 72, 0.05, dtype)
    expected = sparse_row_ffn(activations, x, up, down)
    idle = (activations == 0).all(0)
    assert idle.any()
    up[idle], down[idle] = torch.nan, torch.nan
    activations[activations == 0] = -0.0  # which is zero, too

    apart = far_apart(activations, 707), far_apart(x, 131), far_apart(up, 113), far_apart(down, 79)
    assert torch.equal(sparse_row_ffn(*apart), expected)


@every_dtype
def test_whole_numbers_are_exact(dtype, level):
    rng = torch.Generator().manual_seed(1)

    def whole(low, high, *sizes):
        return torch.randint(low, high, sizes, generator=rng).to(dtype)

    activations = whole(0, 3, 4, 40) * (whole(0, 8, 4, 40) == 0)
    x, up, down = whole(-1, 2, 4, 32), whole(-1, 2, 40, 32), whole(-1, 2, 40, 40)
    exact = (activations.double() * (x.double() @ up.double().T)) @ down.double()
    assert torch.equal(sparse_row_ffn(activations, x, up, down), exact.to(dtype))


@every_dtype
def test_nan_and_infinity_stay_where_they_are(dtype, level):
    activations, x, up, down = draw(4, 60, 40, 48, 0.5, dtype)
    activations[:, 3] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    activations[:, 5] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    activations[3, 7] = torch.nan
    expected = sparse_row_ffn(activations, x, up, down)
    assert expected[3].isnan().all()
    up[3, 9], down[5, 11] = torch.nan, torch.inf
    made = sparse_row_ffn(activations, x, up, down)
    assert made[0].isnan().all()
    assert torch.equal(made[1], expected[1])  # needs neither neuron
    assert made[2].isnan().all()
    assert made[3].isnan().all()


def test_the_order_of_neurons_is_that_of_the_weights():
    """What a neuron adds is its own row of down, weighed by its own product."""
    activations = torch.zeros(1, 1500)
    up, down = torch.zeros(1500, 32), torch.zeros(1500, 32)
    x = torch.ones(1, 32)
    for place, neuron in enumerate((0, 511, 512, 513, 1023, 1499)):
        activations[0, neuron] = 1.0
        up[neuron, place] = 2.0**place
        down[neuron, place] = 3.0
    made = sparse_row_ffn(activations, x, up, down)[0]
    assert made[:6].tolist() == [3.0 * 2**place for place in range(6)]
    assert not made[6:].any()


def test_numpy_comes_back_as_numpy():
    activations, x, up, down = (t.numpy() for t in draw(2, 64, 40, 48, 0.2, torch.float32))
    made = sparse_row_ffn(activations, x, up, down)
    assert isinstance(made, np.ndarray)
    np.testing.assert_allclose(made, (activations * (x @ up.T)) @ down, rtol=1e-5, atol=1e-5)


A, X, UP, DOWN = torch.ones(2, 50), torch.ones(2, 64), torch.ones(50, 64), torch.ones(50, 40)
BAD = {
    "17 rows": (
        (torch.ones(17, 50), torch.ones(17, 64), UP, DOWN), ValueError,
        r"activations must have at most 16 rows.*17"),
    "rows of input": ((A, X[:1], UP, DOWN), ValueError, "input must have size 2 in dimension 0"),
    "neurons of up": ((A, X, UP[1:], DOWN), ValueError, "up must have size 50 in dimension 0"),
    "neurons of down": ((A, X, UP, DOWN[1:]), ValueError, "down must have size 50 in dimension 0"),
    "width of up": ((A, X, UP[:, :56], DOWN), ValueError, "up must have size 64 in dimension 1"),
    "24 features": (
        (A, X[:, :24], UP[:, :24], DOWN), ValueError, r"input must have a multiple.*\[2, 24\]"),
    "36 out": ((A, X, UP, DOWN[:, :36]), ValueError, r"down must have a multiple of 8.*\[50, 36\]"),
    "rank 1": ((A[0], X, UP, DOWN), ValueError, r"activations must have 2 dimensions.*\[50\]"),
    "float64": ((A.double(), X.double(), UP, DOWN), TypeError, "activations must be float32 or"),
    "other dtype": ((A, X, UP.half(), DOWN), TypeError, "up must be float32, got torch.float16"),
    "down not transposed": (
        (A, X, UP, torch.ones(40, 50).T), ValueError, "down must be contiguous in its last dim"),
    "activations transposed": (
        (torch.ones(50, 2).T, X, UP, DOWN), ValueError, "activations must be contiguous in its"),
    "no tensor": ((A, X, UP, [1.0]), TypeError, "down must be a strided .*got list"),
    "sparse": ((A, X, UP.to_sparse(), DOWN), TypeError, "up must be a strided"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    arguments, error, message = BAD[name]
    with torch.no_grad(), pytest.raises(error, match="adaptive::sparse_row_ffn: " + message):
        sparse_row_ffn(*arguments)


def test_a_wrong_output_is_refused_by_name():
    given = {"activations": A, "input": X, "up": UP, "down": DOWN}
    with pytest.raises(TypeError, match=r"out must be float32, got torch\.float16"):
        sparse_row_ffn.into(torch.ones(2, 40).half(), **given)
    with pytest.raises(ValueError, match="out must have size 40 in dimension 1"):
        sparse_row_ffn.into(torch.ones(2, 48), **given)
