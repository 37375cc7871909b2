"""The window rule for linear biases: the formula, and that it keeps what it promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.policy import ModelShape, Plan, RazorAttention, alibi_windows


def test_the_formula():
    slopes = [2.0 ** -(8 / 8 * head) for head in range(1, 9)]
    windows = alibi_windows(slopes, [3.0] * 8, eps=1e-3)
    assert windows == tuple(math.ceil((2 * 3 + math.log(1000)) / slope) for slope in slopes)
    assert windows[0] == 26


@given(st.floats(0.01, 2), st.floats(0, 4), st.floats(1e-6, 0.5), st.integers(0, 10**6))
def test_what_lies_outside_weighs_at_most_eps(slope, norm, eps, seed):
    (window,) = alibi_windows([slope], [norm], eps)
    tokens = min(window + 50, 3000)
    rng = torch.Generator().manual_seed(seed)
    scores = (torch.rand(tokens, generator=rng, dtype=torch.float64) * 2 - 1) * norm
    scores[0] = norm  # the worst: the furthest key scores best, the query's own worst
    scores[-1] = -norm
    distance = torch.arange(tokens - 1, -1, -1)
    weights = torch.softmax(scores - slope * distance, 0)
    assert (weights[distance >= window] <= eps).all()


@pytest.mark.parametrize(
    ("slopes", "norms", "eps", "message"),
    [
        ([1.0], [1.0, 2.0], 0.1, "norms must be as many as slopes, 1, got 2"),
        ([0.0], [1.0], 0.1, "slopes must be above 0, got 0.0"),
        ([math.nan], [1.0], 0.1, "slopes must be above 0, got nan"),
        ([math.inf], [1.0], 0.1, "slopes must be above 0, got inf"),
        ([1.0], [-1.0], 0.1, "norms must be 0 or more, got -1.0"),
        ([1.0], [1.0], 0.0, "eps must be above 0 and below 1, got 0.0"),
        ([1.0], [1.0], 1.0, "eps must be above 0 and below 1, got 1.0"),
    ],
)
def test_what_it_refuses(slopes, norms, eps, message):
    with pytest.raises(ValueError, match=message):
        alibi_windows(slopes, norms, eps)


def test_heads_that_see_further_than_the_window_keep_every_key():
    windows = [alibi_windows([0.5, 0.01], [1.0, 1.0]), alibi_windows([0.02, 0.25], [1.0, 1.0])]
    policy = RazorAttention.for_alibi(windows, most=100)
    assert policy.heads == ((0, 1), (1, 0))
    assert (policy.window, policy.sinks, policy.compensation) == (100, 0, False)
    shape = ModelShape(model_type="x", heads=(2, 2), kv_heads=(2, 2), head_dim=(64, 64))
    assert Plan.make(shape, [policy]).rows == (("window", "dense"), ("dense", "window"))
    with pytest.raises(ValueError, match="must be for a model with 3 layers"):
        Plan.make(
            ModelShape(
                **{
                    **vars(shape),
                    **dict.fromkeys(("heads", "kv_heads", "head_dim"), (2, 2, 2)),
                    "windows": (),
                }
            ),
            [policy],
        )
