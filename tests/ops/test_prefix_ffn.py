"""Laws of prefix_ffn: the dense FFN under a mask, whatever the widths and the order of the rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from adaptive.ops import prefix_ffn
from adaptive.ops.prefix_ffn import reference


def draw(rows, neurons=48, width=24, out=16, gated=True, biased=False, dtype=torch.float64):
    rng = torch.Generator().manual_seed(rows)

    def made(*sizes):
        return torch.randn(*sizes, generator=rng, dtype=torch.float64).to(dtype)

    gate = made(neurons, width) if gated else None
    biases = (made(neurons) if gated else None, made(neurons), made(out))
    return {
        "input": made(rows, width),
        "gate": gate,
        "up": made(neurons, width),
        "down": made(out, neurons),
        "activation": functional.silu,
        "biases": biases if biased else (None, None, None),
    }


@settings(max_examples=60)
@given(
    widths=st.lists(st.sampled_from([0, 1, 8, 20, 33, 48]), max_size=40),
    gated=st.booleans(),
    biased=st.booleans(),
)
def test_it_is_the_masked_dense_ffn(widths, gated, biased):
    given = draw(len(widths), gated=gated, biased=biased)
    widths = torch.tensor(widths, dtype=torch.int64)
    made = prefix_ffn(widths=widths, **given)
    torch.testing.assert_close(made, reference(widths=widths, **given), rtol=1e-12, atol=1e-12)
    assert not made[widths == 0].any()


@settings(max_examples=20)
@given(
    widths=st.lists(st.sampled_from([0, 8, 20, 48]), min_size=1, max_size=30),
    seed=st.integers(0, 99),
)
def test_rows_in_another_order_give_the_results_in_that_order(widths, seed):
    given = draw(len(widths))
    widths = torch.tensor(widths)
    order = torch.randperm(len(widths), generator=torch.Generator().manual_seed(seed))
    made = prefix_ffn(widths=widths, **given)
    given["input"] = given["input"][order]
    other = prefix_ffn(widths=widths[order], **given)
    torch.testing.assert_close(other, made[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 60])
def test_full_widths_are_dense_bit_for_bit(rows):
    given = draw(rows, dtype=torch.float32)
    x, gate, up, down = (given[name] for name in ("input", "gate", "up", "down"))
    dense = functional.linear(
        functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down
    )
    assert torch.equal(prefix_ffn(widths=torch.full((rows,), 48), **given), dense)


@pytest.mark.parametrize("rows", [6, 40])
def test_no_neuron_is_computed_for_rows_that_do_not_use_it(rows):
    """Counted where the products are made, in multiplications of one row and one neuron."""
    given, counted = draw(rows), []
    widths = torch.tensor([0, 8, 20, 8, 20]).repeat(8)[:rows]

    def linear(x, weight, bias):
        counted.append((len(x), tuple(weight.shape)))
        return functional.linear(x, weight, bias)

    prefix_ffn(widths=widths, **given, linear=linear)
    if rows <= 16:  # each weight read once, up to the widest row, for rows that have a width
        many = int((widths > 0).sum())
        assert counted == [(many, (20, 24)), (many, (20, 24)), (many, (16, 20))]
        return
    first = [(n, shape[0]) for n, shape in counted if shape[1] == 24]
    assert sum(n * neurons for n, neurons in first) == 2 * int(widths.sum())  # gate and up
    last = [(n, shape[1]) for n, shape in counted if shape[0] == 16]
    assert sum(n * neurons for n, neurons in last) == int(widths.sum())


@pytest.mark.parametrize("rows", [1, 9, 30])
def test_weights_that_no_row_uses_do_not_count(rows):
    given = draw(rows)
    widths = torch.tensor([20, 8, 0]).repeat(10)[:rows]
    expected = prefix_ffn(widths=widths, **given)
    for name in ("gate", "up"):
        given[name][20:] = torch.nan
    given["down"][:, 20:] = torch.nan
    assert torch.equal(prefix_ffn(widths=widths, **given), expected)


def test_nothing_in_nothing_out():
    given = draw(0)
    assert prefix_ffn(widths=torch.zeros(0, dtype=torch.int32), **given).shape == (0, 16)
    given = draw(3)
    assert not prefix_ffn(widths=torch.zeros(3, dtype=torch.int32), **given).any()


@pytest.mark.parametrize("rows", [7, 25])
def test_gradients_are_those_of_the_masked_ffn(rows):
    widths = torch.tensor([48, 8, 0, 20, 8]).repeat(5)[:rows]
    found = []
    for form in (prefix_ffn, reference):
        given = draw(rows, biased=True)
        leaves = [given["input"], given["gate"], given["up"], given["down"], *given["biases"]]
        for leaf in leaves:
            leaf.requires_grad_()
        form(widths=widths, **given).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


BAD = {
    "below 0": (
        {"widths": torch.tensor([1, -1, 2])},
        ValueError,
        r"widths must be in 0\.\.48, got -1",
    ),
    "above all": (
        {"widths": torch.tensor([1, 49, 2])},
        ValueError,
        r"widths must be in 0\.\.48, got 49",
    ),
    "one too wide": (
        {"widths": torch.tensor([49]), "input": torch.ones(1, 24, dtype=torch.float64)},
        ValueError,
        "widths must be in 0",
    ),
    "too few": (
        {"widths": torch.tensor([1, 2])},
        ValueError,
        r"widths must have shape \[3\], got \[2\]",
    ),
    "shares": (
        {"widths": torch.ones(3)},
        TypeError,
        "widths must hold whole numbers, got torch.float32",
    ),
    "rank": (
        {"input": torch.ones(3)},
        ValueError,
        r"input must have 2 dimensions, got shape \[3\]",
    ),
    "gate": ({"gate": torch.ones(40, 24)}, ValueError, r"gate must have shape \[48, 24\]"),
    "up": ({"up": torch.ones(48, 20)}, ValueError, r"up must have shape \[48, 24\]"),
    "down": ({"down": torch.ones(16, 40)}, ValueError, r"down must have shape \[16, 48\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changed, error, message = BAD[name]
    given = {**draw(3), "widths": torch.tensor([1, 2, 3]), **changed}
    with pytest.raises(error, match="adaptive::prefix_ffn: " + message):
        prefix_ffn(**given)
