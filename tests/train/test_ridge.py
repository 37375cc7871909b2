"""fit_ridge(): samples left out are predicted as by fits without them."""

import torch

from adaptive.train._ridge import _STRENGTHS, fit_ridge


def samples(count, width, noise):
    rng = torch.Generator().manual_seed(count)
    x = torch.randn(count, width, generator=rng, dtype=torch.float64)
    weight = torch.randn(width, generator=rng, dtype=torch.float64)
    return x, 3 + x @ weight + noise * torch.randn(count, generator=rng, dtype=torch.float64)


def solve(x, y, penalty):
    """The same by the normal equations."""
    mean, middle = x.mean(0), y.mean()
    a = (x - mean).T @ (x - mean) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(a, (x - mean).T @ (y - middle))
    return weight, middle - mean @ weight


def test_left_out_is_left_out():
    for count, width, noise in ((20, 5, 0.5), (9, 30, 0.1), (40, 8, 5.0)):
        x, y = samples(count, width, noise)
        squares = torch.linalg.svdvals(x - x.mean(0)).square().mean()
        found = []
        for strength in _STRENGTHS:
            guesses = []
            for one in range(count):
                rest = torch.arange(count) != one
                weight, bias = solve(x[rest], y[rest], strength * squares)
                guesses.append(x[one] @ weight + bias)
            missed = (y - torch.stack(guesses)).square().sum()
            found.append((float(missed), strength, torch.stack(guesses)))
        missed, strength, guesses = min(found, key=lambda each: each[0])
        fit = fit_ridge(x.float(), y.float())
        weight, bias = solve(x, y, strength * squares)
        assert torch.allclose(fit.left_out, guesses, atol=1e-4)
        assert torch.allclose(fit.weight, weight, atol=1e-4)
        assert abs(fit.bias - float(bias)) < 1e-4
        wanted = 1 - missed / float((y - y.mean()).square().sum())
        assert abs(fit.explained - wanted) < 1e-4


def test_what_tells_nothing_explains_nothing():
    x, _ = samples(30, 10, 0.0)
    _, noise = samples(31, 10, 1.0)
    assert fit_ridge(x, noise[:30]).explained < 0.2
    flat = fit_ridge(torch.ones(9, 4), torch.ones(9))
    assert flat.explained == 0.0
    assert torch.equal(flat.left_out, torch.ones(9, dtype=torch.float64))
    assert not flat.weight.any()


def test_a_state_that_is_far_from_zero_hides_no_other():
    """Some states of language models are thousands in one dimension, and next to constant there."""
    x, y = samples(60, 12, 0.2)
    far = torch.cat([x, 3000 + 1e-3 * x[:, :1], torch.zeros(60, 2)], 1)
    fit = fit_ridge(far, y)
    left, values, right = torch.linalg.svd(far - far.mean(0), full_matrices=False)
    penalty = min(_STRENGTHS) * values.square().mean()
    weight = right.T @ (values / (values.square() + penalty) * (left.T @ (y - y.mean())))
    assert torch.allclose(fit.weight, weight, rtol=1e-8, atol=1e-10)
    assert torch.allclose(fit.bias + far @ fit.weight, y, atol=2.0)
