"""Laws of route_tokens: exactly the tokens that the words say, in order, of each row alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import route_tokens


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Few values, so that many are equal; what compares oddly is among them.
VALUES = st.sampled_from([0.0, -0.0, 0.5, 0.25, -1.0, 1e-45, math.inf, -math.inf])
ROWS = st.integers(1, 40).flatmap(
    lambda n: st.lists(
        st.tuples(
            st.lists(VALUES | st.floats(width=32, allow_nan=False), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
        ),
        min_size=1,
        max_size=3,
    )
)
CAPACITIES = st.integers(1, 45) | st.floats(0, 1, exclude_min=True)


def tensors(rows):
    scores = torch.tensor([scores for scores, _ in rows])
    return scores, torch.tensor([valid for _, valid in rows])


def check_row(routed, tokens, count, slots):
    """The three results say the same: these positions, ascending."""
    length = len(tokens)
    assert count == len(routed)
    assert tokens == sorted(routed) + [-1] * (length - count)
    assert slots == [sorted(routed).index(t) if t in routed else -1 for t in range(length)]


@given(ROWS, VALUES | st.floats(width=32, allow_nan=False))
def test_a_threshold_takes_all_valid_tokens_that_reach_it(rows, threshold):
    scores, valid = tensors(rows)
    made = route_tokens(scores, threshold, valid=valid)
    for (row, here), *results in zip(rows, *(t.tolist() for t in made), strict=True):
        routed = {t for t, score in enumerate(row) if here[t] and score >= threshold}
        check_row(routed, *results)


@given(ROWS, CAPACITIES)
def test_a_capacity_takes_the_best_valid_tokens_and_of_equals_the_first(rows, capacity):
    scores, valid = tensors(rows)
    made = route_tokens(scores, capacity=capacity, valid=valid)
    for (row, here), *results in zip(rows, *(t.tolist() for t in made), strict=True):
        ranked = sorted((t for t in range(len(row)) if here[t]), key=lambda t: (-row[t], t))
        room = max(1, int(capacity * len(ranked))) if isinstance(capacity, float) else capacity
        check_row(set(ranked[:room]), *results)


@given(ROWS, st.data())
def test_a_row_depends_on_itself_alone_and_on_no_hidden_score(rows, data):
    scores, valid = tensors(rows)
    option = data.draw(
        st.sampled_from([{"threshold": 0.25}, {"capacity": 3}, {"capacity": 0.5}]), "option"
    )
    right = route_tokens(scores, valid=valid, **option)
    hidden = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 7.0]), "hidden")
    other = scores.masked_fill(~valid, hidden)
    for row in range(len(rows)):
        made = route_tokens(other[row : row + 1], valid=valid[row : row + 1], **option)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(made, right, strict=True))


@given(ROWS, CAPACITIES, st.data())
def test_tokens_that_change_places_are_routed_where_they_are(rows, capacity, data):
    """Of distinct scores, whatever the order: a choice of tokens, not of places."""
    length = len(rows[0][0])
    scores = torch.randperm(length, generator=torch.Generator().manual_seed(length)).float()
    order = torch.tensor(data.draw(st.permutations(range(length)), "order"))
    slots = route_tokens(scores[None], capacity=capacity)[2][0]
    moved = route_tokens(scores[order][None], capacity=capacity)[2][0]
    assert torch.equal(moved >= 0, (slots >= 0)[order])


@pytest.mark.parametrize("option", [{"threshold": -math.inf}, {"capacity": 1.0}, {"capacity": 99}])
def test_all_valid_tokens_are_routed_by_what_keeps_all(option):
    scores = torch.tensor([[0.5, -math.inf, 3.0, 0.0], [math.inf, 1.0, -2.0, 1.0]])
    tokens, counts, slots = route_tokens(scores, **option)
    assert counts.tolist() == [4, 4]
    assert tokens.tolist() == slots.tolist() == [[0, 1, 2, 3]] * 2
    valid = torch.tensor([[False, True, True, False], [False] * 4])
    tokens, counts, slots = route_tokens(scores, valid=valid, **option)
    assert counts.tolist() == [2, 0]
    assert tokens.tolist() == [[1, 2, -1, -1], [-1] * 4]
    assert slots.tolist() == [[-1, 0, 1, -1], [-1] * 4]


def test_a_share_is_rounded_down_and_routes_at_least_one():
    scores = torch.rand(1, 9, generator=torch.Generator().manual_seed(0))
    counts = [route_tokens(scores, capacity=c)[1].item() for c in (1e-9, 0.2, 0.25, 0.5, 0.999)]
    assert counts == [1, 1, 2, 4, 8]
    assert route_tokens(scores, capacity=1)[1].item() == 1


def test_the_threshold_is_compared_in_float32():
    """What reads as the same number is the same, though 0.7 is not in float32."""
    assert route_tokens(torch.tensor([[0.7]]), 0.7)[1].item() == 1
    assert route_tokens(torch.tensor([[0.1]]), 0.1)[1].item() == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_many_long_rows_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for option in ({"capacity": 0.125}, {"threshold": 0.5}):
        arguments = route_tokens.make_inputs(5, 70_000, padded=True, device="cpu", **option)
        made, right = route_tokens(*arguments), route_tokens.reference(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))
    torch.set_num_threads(before)


def test_strides_are_followed():
    wide = torch.full((3, 20), math.nan)
    wide[:, 4:11] = torch.rand(3, 7, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True, False, True, True, True, True, False]]).expand(3, -1)
    made = route_tokens(wide[:, 4:11], capacity=3, valid=valid)
    right = route_tokens(wide[:, 4:11].contiguous(), capacity=3, valid=valid.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))


def test_numpy_comes_back_as_numpy():
    tokens, counts, _ = route_tokens(np.array([[0.1, 0.9, 0.5]], dtype=np.float32), capacity=2)
    assert isinstance(tokens, np.ndarray)
    assert tokens.tolist() == [[1, 2, -1]]
    assert counts.tolist() == [2]


@pytest.mark.parametrize("option", [{"threshold": 0.5}, {"capacity": 3}, {"capacity": 0.3}])
def test_compiled_is_what_eager_is(option):
    scores = torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    valid = scores > 0.1
    run = torch.compile(
        lambda s, v: route_tokens(s, valid=v, **option), backend="aot_eager", fullgraph=True
    )
    for made, right in zip(
        run(scores, valid), route_tokens(scores, valid=valid, **option), strict=True
    ):
        assert torch.equal(made, right)


SCORES = torch.tensor([[0.5, 0.25, 0.75], [0.0, 1.0, 0.5]])
NAN = torch.tensor([[0.5, 0.25, 0.75], [0.0, 1.0, math.nan]])
BAD = {
    "rank 1": ({"scores": SCORES[0], "capacity": 1}, ValueError, "scores must have 2 dimensions"),
    "float64": ({"scores": SCORES.double(), "capacity": 1}, TypeError, "scores must be float32"),
    "scores transposed": (
        {"scores": SCORES.T, "capacity": 1}, ValueError, "scores must be contiguous in its last"),
    "neither": ({}, ValueError, "capacity must be given, or threshold, and not both, got neither"),
    "both": ({"capacity": 1, "threshold": 0.5}, ValueError, "capacity must be given.*got both"),
    "capacity 0": ({"capacity": 0}, ValueError, "capacity must be at least 1 token.*got 0"),
    "capacity below 0": ({"capacity": -3}, ValueError, "capacity must be at least 1.*got -3"),
    "share 0": ({"capacity": 0.0}, ValueError, "capacity must be a share above 0.*got 0.0"),
    "share above 1": ({"capacity": 1.5}, ValueError, "capacity must be a share.*at most 1.*1.5"),
    "share of NaN": ({"capacity": math.nan}, ValueError, "capacity must be a share.*got nan"),
    "capacity is text": ({"capacity": "3"}, TypeError, "capacity must be a whole number, got str"),
    "capacity is True": ({"capacity": True}, TypeError, "capacity must be a whole number"),
    "threshold of NaN": ({"threshold": math.nan}, ValueError, "threshold must not be NaN, got nan"),
    "threshold is text": ({"threshold": "high"}, TypeError, "threshold must be a number, got 'h"),
    "valid float": (
        {"capacity": 1, "valid": SCORES}, TypeError, "valid must be bool, got torch.float32"),
    "valid of another length": (
        {"capacity": 1, "valid": SCORES[:, :2] > 0}, ValueError, "valid must have size 3 in dim"),
    "NaN": ({"scores": NAN, "capacity": 1}, ValueError, r"scores\[1, 2\] must not be NaN, got nan"),
    "NaN by threshold": (
        {"scores": NAN, "threshold": 0.5}, ValueError, r"scores\[1, 2\] must not be NaN, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match="adaptive::route_tokens: " + message):
        route_tokens(**{"scores": SCORES, **changes})


def test_gradients_and_wrong_outputs_are_refused():
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="route_tokens: has no back"):
        route_tokens(SCORES.clone().requires_grad_(), 0.5)
    tokens, counts, slots = route_tokens.outputs(SCORES)
    with pytest.raises(TypeError, match="slots must be int32"):
        route_tokens.into(tokens, counts, slots.long(), scores=SCORES, capacity=1)
