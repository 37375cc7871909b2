"""Laws of the LayerSkip schedules: dropout probabilities, curricula, weights of the exits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.train import curriculum_mask, dropout_probabilities, exit_weights

layer_counts = st.integers(2, 100)
step_counts = st.integers(1, 200)
shares = st.floats(0, 0.99)
scales = st.floats(0, 10)
rotations = st.integers(1, 40)
curricula = st.sampled_from(["rotational", "gradual", None])


def dropout(step, steps, layers, highest, timescale="constant"):
    return dropout_probabilities(
        step, steps=steps, layers=layers, highest=highest, timescale=timescale
    )


def mask_at(step, steps, layers, curriculum, rotation=8):
    return curriculum_mask(
        step, steps=steps, layers=layers, curriculum=curriculum, rotation=rotation
    )


@given(steps=step_counts, layers=layer_counts, highest=shares, data=st.data())
@pytest.mark.parametrize("timescale", ["constant", "exponential"])
def test_dropout_rises_with_depth_and_time_and_stays_below_the_highest(
    timescale, steps, layers, highest, data
):
    step = data.draw(st.integers(0, steps - 1))
    now = dropout(step, steps, layers, highest, timescale)
    assert now[0] == 0
    assert now == sorted(now)
    assert all(0 <= p <= highest * (1 + 1e-9) for p in now)
    later = dropout(min(step + 1, steps - 1), steps, layers, highest, timescale)
    assert all(a <= b for a, b in zip(now, later, strict=True))
    final = dropout(steps - 1, steps, layers, highest, timescale)
    assert math.isclose(final[-1], highest, rel_tol=1e-9, abs_tol=1e-12)
    if timescale == "constant":
        assert now == final


def test_dropout_doubles_as_the_paper_says():
    """At half the depth, sqrt(2) - 1; over time the same, and the two multiply."""
    half = math.sqrt(2) - 1
    assert dropout(0, 1, 33, 0.1)[16] == pytest.approx(0.1 * half)
    assert dropout(50, 101, 33, 0.1, "exponential")[16] == pytest.approx(0.1 * half * half)
    assert dropout(0, 101, 33, 0.1, "exponential") == [0.0] * 33


@given(
    steps=step_counts,
    layers=layer_counts,
    rotation=rotations,
    scale=scales,
    data=st.data(),
)
def test_weights_sum_to_one_and_masked_layers_weigh_nothing(steps, layers, rotation, scale, data):
    step = data.draw(st.integers(0, steps - 1))
    mask = mask_at(step, steps, layers, data.draw(curricula), rotation)
    weights = exit_weights(mask, scale)
    assert mask[-1]
    assert math.isclose(sum(weights), 1, rel_tol=1e-9)
    assert weights[-1] == max(weights) > 0
    assert all(w >= 0 for w in weights)
    assert all(w == 0 for w, counts in zip(weights, mask, strict=True) if not counts)
    counted = [w for w, counts in zip(weights, mask, strict=True) if counts]
    assert counted == sorted(counted)


def test_weights_by_hand():
    """Four layers, scale 0.5: e = 0, .5, 1.5, 3 + 1.5; without the third, 0, .5, 4.5."""
    assert exit_weights([True] * 4, 0.5) == pytest.approx([0, 0.5 / 6.5, 1.5 / 6.5, 4.5 / 6.5])
    assert exit_weights([True, True, False, True], 0.5) == pytest.approx([0, 0.1, 0, 0.9])


@given(layers=layer_counts)
def test_scale_zero_is_plain_training(layers):
    assert exit_weights([True] * layers, 0) == [0.0] * (layers - 1) + [1.0]


@given(layers=layer_counts, rotation=rotations, start=st.integers(0, 1000))
def test_one_rotation_visits_every_layer_once(layers, rotation, start):
    visits = [0] * layers
    for step in range(start, start + rotation):
        mask = mask_at(step, 5000, layers, "rotational", rotation)
        visits = [n + counts for n, counts in zip(visits, mask, strict=True)]
    assert visits[:-1] == [1] * (layers - 1)
    assert visits[-1] == rotation


@given(steps=step_counts, layers=layer_counts)
def test_gradual_opens_downward_and_is_open_after_half_the_steps(steps, layers):
    masks = [mask_at(step, steps, layers, "gradual") for step in range(steps)]
    open_layers = [sum(mask) for mask in masks]
    assert masks[0] == [False] * (layers - 1) + [True]
    assert open_layers == sorted(open_layers)
    assert all(mask == sorted(mask) for mask in masks)
    for step, mask in enumerate(masks):
        assert all(mask) == (2 * step * layers >= (layers - 1) * steps)
        assert all(mask) or 2 * step < steps


@given(layers=layer_counts)
def test_no_curriculum_counts_every_exit(layers):
    assert all(mask_at(3, 10, layers, None))
