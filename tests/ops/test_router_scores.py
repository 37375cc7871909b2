"""Laws of router_scores: the norm, the router and the function, of each token alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES, every_dtype
from routing_cases import normal, spread
from torch.autograd import Function, gradcheck

from adaptive.ops import _router_gradient, router_scores

FUNCTIONS = ("sigmoid", "softmax", "identity")


def exact(hidden, weight, norm_weight=None, eps=1e-6, function="sigmoid"):
    """The formula in float64."""
    x, weight = hidden.double(), weight.double()
    if norm_weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
    logits = x @ weight.T
    if function == "softmax":
        return torch.softmax(logits, -1)[..., 1]
    return torch.sigmoid(logits[..., 0]) if function == "sigmoid" else logits[..., 0]


def draw(*sizes, dtype=torch.float32, **options):
    return router_scores.make_inputs(*sizes, dtype=dtype, device="cpu", **options)


@every_dtype
@pytest.mark.parametrize("width", [8, 16, 24, 32, 40, 56, 64, 200, 1032])
def test_every_width(width, dtype, level):
    for function in FUNCTIONS:
        for norm in (False, True):
            arguments = draw(2, 3, width, norm, function=function, dtype=dtype)
            with torch.no_grad():
                made = router_scores(*arguments)
            torch.testing.assert_close(made.double(), exact(*arguments), rtol=3e-6, atol=3e-6)


@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.booleans(),
    st.sampled_from(FUNCTIONS), st.sampled_from(DTYPES), st.integers(0, 2**16),
)  # fmt: skip
def test_laws(batch, tokens, eighths, norm, function, dtype, seed):
    arguments = draw(batch, tokens, 8 * eighths, norm, function=function, dtype=dtype, seed=seed)
    hidden, weight, gain, eps, _ = arguments
    with torch.no_grad():
        made = router_scores(*arguments)
        one = router_scores(hidden[-1:, -1:], *arguments[1:])
        if function != "identity":
            assert ((made > 0) & (made < 1)).all()
        if function == "softmax":
            other = router_scores(hidden, weight.flip(0), gain, eps, function)
            torch.testing.assert_close(made + other, torch.ones_like(made))
        if function == "sigmoid":
            logits = router_scores(hidden, weight, gain, eps, "identity")
            torch.testing.assert_close(made, logits.sigmoid())
            both = torch.cat([torch.zeros_like(weight), weight])
            softmax = router_scores(hidden, both, gain, eps, "softmax")
            assert torch.equal(made, softmax)
        if norm:
            doubled = router_scores(hidden * 2, weight, gain, 4 * eps, function)
            torch.testing.assert_close(doubled, made)
    assert torch.equal(one[0, 0], made[-1, -1])
    torch.testing.assert_close(made.double(), exact(*arguments), rtol=3e-6, atol=3e-6)


@every_dtype
def test_strides_threads_and_neighbours_change_no_bit(dtype, level):
    hidden, weight, gain, *rest = draw(2, 701, 328, True, function="softmax", dtype=dtype)
    with torch.no_grad():
        right = router_scores(hidden, weight, gain, *rest)
        made = router_scores(spread(hidden, 8, 3), spread(weight, 8, 3), gain, *rest)
        assert torch.equal(made, right)
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        assert torch.equal(router_scores(hidden, weight, gain, *rest), right)
        torch.set_num_threads(before)
        hidden[1, 300] = torch.nan
        made = router_scores(hidden, weight, gain, *rest)
    assert made[1, 300].isnan()
    assert made.isnan().sum() == 1
    assert torch.equal(made[0], right[0])


class InFloat64(Function):
    """A forward pass in float64 before the backward pass that is tested."""

    @staticmethod
    def forward(ctx, *arguments):
        result = exact(*arguments)
        _router_gradient.setup_context(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx, grad):
        return _router_gradient.backward(ctx, grad)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_slopes(function, norm):
    hidden, weight, gain, *_ = draw(2, 3, 8, True, function=function)
    operands = [t.double().requires_grad_() for t in (hidden, weight, gain)]
    if not norm:
        assert gradcheck(
            lambda h, w: InFloat64.apply(h, w, None, 1e-6, function), operands[:2], atol=1e-6
        )
        return
    assert gradcheck(lambda *o: InFloat64.apply(*o, 1e-2, function), operands, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_of_the_formula(function, dtype):
    hidden, weight, gain, *_ = draw(2, 9, 64, True, function=function, dtype=dtype)
    slopes = normal(2, 9, seed=4)
    own = [t.clone().requires_grad_() for t in (hidden, weight, gain)]
    (router_scores(*own, function=function) * slopes).sum().backward()
    right = [t.double().requires_grad_() for t in (hidden, weight, gain)]
    (exact(*right, function=function) * slopes).sum().backward()
    for made, true in zip(own, right, strict=True):
        assert made.grad.dtype == dtype
        scale = true.grad.abs().max().item()
        torch.testing.assert_close(
            made.grad.double(), true.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * scale
        )


def test_compiled_is_what_eager_is():
    hidden, weight, gain, *_ = draw(2, 9, 64, True)

    def run(*operands):
        return router_scores(*operands).square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    both = [[t.clone().requires_grad_() for t in (hidden, weight, gain)] for _ in range(2)]
    for form, own in zip((run, compiled), both, strict=True):
        form(*own).backward()
    for left, right in zip(*both, strict=True):
        torch.testing.assert_close(left.grad, right.grad)
