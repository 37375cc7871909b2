"""hidden_cosine against float64, and what is true of it for every input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import hidden_cosine

sizes = {"rows": st.integers(0, 5), "width": st.integers(1, 70), "seed": st.integers(0, 2**16)}


def draw(rows, width, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, width, generator=rng).unbind(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(**sizes)
def test_is_the_cosine(dtype, rows, width, seed):
    hidden, previous = (t.to(dtype) for t in draw(rows, width, seed))
    made = hidden_cosine(hidden, previous)
    assert made.dtype == torch.float32
    assert made.shape == (rows,)
    a, b = hidden.double(), previous.double()
    exact = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=1e-6)


@given(**sizes, exponent=st.integers(-126, 120))
def test_magnitudes_do_not_matter(rows, width, seed, exponent):
    hidden, previous = draw(rows, width, seed)
    plain = hidden_cosine(hidden, previous)
    scaled = hidden_cosine(hidden * 2.0**exponent, previous)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-4)  # small ones lose digits
    torch.testing.assert_close(hidden_cosine(-hidden, previous), -plain, rtol=0, atol=0)
    torch.testing.assert_close(hidden_cosine(previous, hidden), plain, rtol=0, atol=0)


@given(**sizes)
def test_of_a_row_with_itself_is_1_and_never_more(rows, width, seed):
    hidden, _ = draw(rows, width, seed)
    made = hidden_cosine(hidden, hidden)
    assert (made <= 1).all()
    torch.testing.assert_close(made, torch.ones(rows), rtol=0, atol=1e-6)
    assert (hidden_cosine(hidden, -hidden) >= -1).all()


def test_zeros_and_what_is_not_finite():
    hidden = torch.ones(6, 8)
    previous = torch.ones(6, 8)
    hidden[0] = previous[1] = hidden[2] = previous[2] = 0
    hidden[3, 2], previous[4, 1] = math.nan, math.inf
    made = hidden_cosine(hidden, previous)
    assert made[:3].tolist() == [0, 0, 0]
    assert made[3:5].isnan().all()
    torch.testing.assert_close(made[5], torch.tensor(1.0))


def test_a_gradient_flows():
    hidden, previous = draw(3, 16, 0)
    hidden.requires_grad_()
    (slope,) = torch.autograd.grad(hidden_cosine(hidden, previous).sum(), hidden)
    assert slope.isfinite().all()
    assert (slope * hidden).sum().abs() < 1e-5  # lengthening a row does not turn it
