"""Laws of prefix_row_ffn: the masked dense FFN, summed in float32, whatever the other rows use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, EVERY, every_dtype, set_for_a_test
from torch.nn import functional

from adaptive.ops import prefix_row_ffn
from adaptive.ops.prefix_row_ffn import ACTIVATIONS

level = set_for_a_test(EVERY)


def draw(widths, neurons, in_features=72, out_features=21, dtype=torch.float32, **options):
    """Arguments with these widths."""
    given = list(
        prefix_row_ffn.make_inputs(
            len(widths), neurons, in_features, out_features, dtype=dtype, device="cpu", **options
        )
    )
    given[1] = torch.tensor(widths, dtype=torch.int64)
    return given


def assert_right(made, x, widths, gate, up, down, activation):
    """Within half a last place of the exact result, and what summing in float32 costs."""
    function = ACTIVATIONS[activation]
    x, up, down = (t.double() for t in (x, up, down))
    used = torch.arange(len(up)) < widths[:, None]
    if gate is None:
        hidden, terms = function(x @ up.T), x.abs() @ up.abs().T
    else:
        before, after = x @ gate.double().T, x @ up.T
        hidden = function(before) * after
        terms = (x.abs() @ gate.double().abs().T) * after.abs()
        terms = terms + function(before).abs() * (x.abs() @ up.abs().T)
    exact = (hidden * used) @ down.T
    terms = (terms * used) @ down.abs().T + (hidden.abs() * used) @ down.abs().T
    summed = 16 * torch.finfo(torch.float32).eps * terms
    rounded = 0.51 * torch.finfo(made.dtype).eps * exact.abs() + torch.finfo(made.dtype).tiny
    assert ((made.double() - exact).abs() <= summed + rounded).all()


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(gated, activation, dtype, level):
    given = draw([8, 0, 130, 41], 136, dtype=dtype, gated=gated, activation=activation)
    assert_right(prefix_row_ffn(*given), *given)
    given[0] *= 40  # far from 0, where a function is flat or a line
    assert_right(prefix_row_ffn(*given), *given)


@every_dtype
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(rows, dtype, level):
    given = draw([37 * (row + 3) % 201 for row in range(rows)], 200, dtype=dtype)
    assert_right(prefix_row_ffn(*given), *given)


@every_dtype
def test_every_width_ends_where_it_should(dtype, level):
    """Widths around the borders of vectors, groups of four neurons and chunks."""
    for first in range(0, 130, 13):
        widths = [(first + step) % 137 for step in range(13)]
        given = draw(widths, 136, 40, 9, dtype=dtype)
        assert_right(prefix_row_ffn(*given), *given)


@every_dtype
def test_every_number_of_features(dtype, level):
    for in_features in (*range(32, 100, 8), 1000):
        given = draw([3, 50, 72], 72, in_features, in_features // 3, dtype=dtype)
        assert_right(prefix_row_ffn(*given), *given)


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(0, 600), min_size=1, max_size=16),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_a_row_does_not_depend_on_the_others(widths, dtype, seed):
    x, widths, *rest = draw(widths, 600, 40, 24, dtype=dtype, seed=seed)
    made = prefix_row_ffn(x, widths, *rest)
    alone = [
        prefix_row_ffn(x[row : row + 1], widths[row : row + 1], *rest) for row in range(len(x))
    ]
    assert torch.equal(made, torch.cat(alone))
    assert not made[widths == 0].any()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(prefix_row_ffn(x[order], widths[order], *rest), made[order])


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype):
    given = draw([4000, 1300, 9, 2200, 4096], 4096, 256, 512, dtype=dtype)
    before, made = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        made.append(prefix_row_ffn(*given))
    torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made[1:])


@every_dtype
@pytest.mark.parametrize("widest", [56, 61])
def test_strides_are_followed_and_neurons_of_no_row_are_not_read(widest, dtype, level):
    x, widths, gate, up, down, activation = draw([20, widest, 0, 7], 200, 104, 30, dtype=dtype)
    expected = prefix_row_ffn(x, widths, gate, up, down, activation)
    x[2], gate[widest:], up[widest:] = torch.nan, torch.nan, torch.nan
    down[:, 8 * -(-widest // 8) :] = torch.nan

    def spread(tensor, pitch):
        wide = torch.full((len(tensor), pitch), torch.nan, dtype=dtype)
        return wide[:, 3 : 3 + tensor.shape[1]].copy_(tensor)

    apart = spread(x, 131), widths, spread(gate, 113), spread(up, 117), spread(down, 211)
    assert torch.equal(prefix_row_ffn(*apart, activation), expected)


@every_dtype
def test_whole_numbers_are_exact(dtype, level):
    """Small whole numbers: each neuron is its own, and is summed once."""
    rng = torch.Generator().manual_seed(1)

    def whole(*sizes):
        return torch.randint(-1, 2, sizes, generator=rng).to(dtype)

    x, gate, up, down = whole(6, 32), whole(40, 32), whole(40, 32), whole(17, 40) * 0
    down[:, ::5] = whole(17, 8)
    widths = torch.tensor([1, 40, 17, 6, 0, 33])
    used = torch.arange(40) < widths[:, None]
    hidden = functional.relu(x.double() @ gate.double().T) * (x.double() @ up.double().T) * used
    made = prefix_row_ffn(x, widths, gate, up, down, "relu")
    assert torch.equal(made, (hidden @ down.double().T).to(dtype))


@every_dtype
def test_nan_stays_in_its_row(dtype, level):
    given = draw([50, 20, 64], 64, dtype=dtype)
    expected = prefix_row_ffn(*given)
    given[0][1, 5] = torch.nan
    made = prefix_row_ffn(*given)
    assert made[1].isnan().all()
    assert torch.equal(made[::2], expected[::2])
    given[0][1, 5] = 1.0
    expected = prefix_row_ffn(*given)
    given[3][30] = torch.nan  # a neuron that the second row does not compute
    made = prefix_row_ffn(*given)
    assert made[::2].isnan().all()
    assert torch.equal(made[1], expected[1])


def test_numpy_comes_back_as_numpy():
    x, widths, gate, up, down, _ = draw([5, 16], 16)
    made = prefix_row_ffn(*(t.numpy() for t in (x, widths, gate, up, down)))
    assert torch.equal(torch.from_numpy(made), prefix_row_ffn(x, widths, gate, up, down))


X, W = torch.ones(2, 64), torch.tensor([3, 48])
GATE, UP, DOWN = torch.ones(48, 64), torch.ones(48, 64), torch.ones(40, 48)
BAD = {
    "17 rows": (
        {"input": torch.ones(17, 64), "widths": torch.ones(17, dtype=torch.int64)}, ValueError,
        r"input must have at most 16 rows.*17"),
    "24 features": (
        {"input": X[:, :24], "up": UP[:, :24]}, ValueError,
        r"input must have a multiple.*\[2, 24\]"),
    "neurons of gate": ({"gate": GATE[1:]}, ValueError, "gate must have size 48 in dimension 0"),
    "neurons of down": ({"down": DOWN[:, 8:]}, ValueError, "down must have size 48 in dimension 1"),
    "width of up": ({"up": UP[:, :56]}, ValueError, "up must have size 64 in dimension 1"),
    "44 neurons": (
        {"gate": GATE[:44], "up": UP[:44], "down": DOWN[:, :44]}, ValueError,
        r"up must have a multiple of 8 neurons, got shape \[44, 64\]"),
    "rank 1": ({"input": X[0]}, ValueError, r"input must have 2 dimensions.*\[64\]"),
    "float64": ({"input": X.double()}, TypeError, "input must be float32 or"),
    "other dtype": ({"gate": GATE.half()}, TypeError, "gate must be float32, got torch.float16"),
    "down transposed": (
        {"down": torch.ones(48, 40).T}, ValueError, "down must be contiguous in its last dim"),
    "no tensor": ({"down": [1.0]}, TypeError, "down must be a strided .*got list"),
    "widths of one row": ({"widths": W[:1]}, ValueError, "widths must have size 2 in dimension 0"),
    "int32 widths": ({"widths": W.int()}, TypeError, "widths must be int64, got torch.int32"),
    "strided widths": (
        {"widths": torch.tensor([1, 2, 3, 4])[::2]}, ValueError, "widths must be contiguous"),
    "a width too many": (
        {"widths": torch.tensor([3, 49])}, IndexError, r"widths\[1\] must be in 0\.\.48, got 49"),
    "a negative width": (
        {"widths": torch.tensor([-1, 4])}, IndexError, r"widths\[0\] must be in 0\.\.48, got -1"),
    "another function": (
        {"activation": "gelu"}, ValueError, "activation must be silu, gelu_tanh or relu, got gelu"),
    "no function": (
        {"activation": 3}, ValueError, "activation must be silu, gelu_tanh or relu, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changed, error, message = BAD[name]
    given = {"input": X, "widths": W, "gate": GATE, "up": UP, "down": DOWN, **changed}
    with torch.no_grad(), pytest.raises(error, match="adaptive::prefix_row_ffn: " + message):
        prefix_row_ffn(**given)


def test_a_wrong_output_is_refused_and_nothing_is_written():
    given = {"input": X, "widths": W, "gate": GATE, "up": UP, "down": DOWN}
    with pytest.raises(TypeError, match=r"out must be float32, got torch\.float16"):
        prefix_row_ffn.into(torch.ones(2, 40).half(), **given)
    with pytest.raises(ValueError, match="out must have size 40 in dimension 1"):
        prefix_row_ffn.into(torch.ones(2, 48), **given)
    out = torch.full((2, 40), 7.0)
    with pytest.raises(IndexError):
        prefix_row_ffn.into(out, **{**given, "widths": torch.tensor([3, 99])})
    assert (out == 7).all()
