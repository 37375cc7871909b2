"""select_tokens chooses what a stable sort would choose, whatever the scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptive
from adaptive import _native
from adaptive.ops import select_tokens

LEVELS = ("baseline", "avx2", "avx512")
AVAILABLE = LEVELS[: LEVELS.index(_native.best_cpu_level()) + 1]
INF, NAN = math.inf, math.nan
LONG = 40_000  # enough that a bound is sampled

some_scores = st.lists(
    st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-45, 3e38]),
        st.floats(0, 1, width=32),
        st.just(-INF),
    ),
    min_size=1,
    max_size=200,
)


@pytest.fixture(params=AVAILABLE)
def level(request):
    adaptive.set_cpu_level(request.param)
    yield request.param
    adaptive.set_cpu_level(None)


def oracle(scores, budget, sinks=0, recent=0):
    """Chosen positions of one list, by sorting pairs; no mass."""
    seen = [i for i, score in enumerate(scores) if score != -INF]
    if not seen:
        return []
    forced = {i for i in seen if i < seen[0] + sinks or i >= len(scores) - recent}
    others = sorted((i for i in seen if i not in forced), key=lambda i: (-(scores[i] + 0.0), i))
    return sorted([*forced, *others[: budget - len(forced)]])


def chosen(scores, *arguments, **named):
    """What the op chooses from one list of scores."""
    indices, counts = select_tokens(torch.as_tensor(scores)[None, None], *arguments, **named)
    count = int(counts)
    assert (indices[0, 0, count:] == -1).all()
    return indices[0, 0, :count].tolist()


@given(some_scores, st.integers(1, 60), st.integers(0, 8), st.integers(0, 8))
def test_it_is_a_stable_sort(scores, more, sinks, recent):
    scores = torch.tensor(scores)
    budget = sinks + recent + more
    expected = oracle(scores.tolist(), budget, sinks, recent)
    assert chosen(scores, budget, None, sinks, recent) == expected


@given(
    st.sampled_from(["normal", "few", "steps", "rising", "falling", "one peak", "masked"]),
    st.sampled_from([1, 7, 100, 2048, 10_000, 30_000, LONG]),
    st.integers(0, 2**16),
)
def test_long_lists_of_any_shape(shape, budget, seed):
    """A sample cannot mislead it: not by order, not by ties, not by a few huge scores."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(LONG, generator=rng)
    scores = {
        "normal": noise,
        "few": torch.randint(0, 3, (LONG,), generator=rng).float(),
        "steps": (torch.arange(LONG) % 39 == 0).float() + 0.001 * noise,
        "rising": torch.arange(LONG).float(),
        "falling": -torch.arange(LONG).float(),
        "one peak": torch.zeros(LONG).scatter(0, torch.randint(0, LONG, (3,), generator=rng), 9.0),
        "masked": noise.masked_fill(torch.rand(LONG, generator=rng) < 0.97, -INF),
    }[shape]
    expected = scores.sort(descending=True, stable=True).indices[:budget]
    expected = expected[scores[expected] != -INF].sort().values
    assert chosen(scores, budget) == expected.tolist()


@given(some_scores, st.integers(1, 40), st.floats(0.01, 0.999))
def test_mass_is_the_smallest_set_with_that_share(scores, budget, mass):
    scores = torch.tensor(scores).clamp(max=1.0)
    picked = chosen(scores, budget, mass=mass)
    assert set(picked) <= set(oracle(scores.tolist(), budget))
    parts = scores.double().clamp(min=0)
    total = float(parts.sum())
    share = float(parts[picked].sum()) / total if total > 0 else 1.0
    unit = 200 * 2.0**-31
    if len(picked) < min(budget, int((scores != -INF).sum())):
        assert share >= mass - unit
    if picked and total > 0:
        least = min(picked, key=lambda i: (float(scores[i]), -i))
        assert float(parts[picked].sum() - parts[least]) / total < mass + unit


@given(st.integers(0, 2**16), st.floats(0.05, 0.99))
def test_mass_grows_with_the_share_asked_for(seed, mass):
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(0)
    fewer, more = chosen(scores, 3000, mass=mass), chosen(scores, 3000, mass=min(1.0, mass + 0.01))
    assert set(fewer) <= set(more)
    assert float(scores[fewer].sum()) >= mass - 1e-6


@pytest.mark.parametrize("mass", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 1000, LONG])
def test_every_level_agrees_with_the_reference(size, mass, level):
    rng = torch.Generator().manual_seed(size)
    scores = torch.randn(2, 3, size, generator=rng).exp()
    scores[torch.rand(scores.shape, generator=rng) < 0.2] = -INF
    lengths = torch.tensor([size, size // 2], dtype=torch.int32)
    arguments = (scores, min(size, 300) + 10, lengths, 4, 6, mass)
    made, right = select_tokens(*arguments), select_tokens.reference(*arguments)
    assert torch.equal(made[0], right[0])
    assert torch.equal(made[1], right[1])


def test_strides_are_followed():
    scores = torch.rand(3, 50, 2).transpose(1, 2).contiguous()[:, :, 5:45]
    made = select_tokens(scores, 7)
    assert torch.equal(made[0], select_tokens(scores.contiguous(), 7)[0])


def test_the_number_of_threads_changes_nothing():
    scores = torch.rand(5, 3, LONG, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(select_tokens(scores, 500, None, 4, 64, 0.9))
    torch.set_num_threads(before)
    assert all(torch.equal(made[0][i], other[i]) for other in made[1:] for i in (0, 1))


def test_minus_zero_is_zero():
    assert chosen([-0.0, 0.0, -0.0, 0.0], 3) == [0, 1, 2]


def test_nothing_to_choose_from():
    assert chosen([-INF, -INF], 2) == []
    assert chosen([0.0, 0.0], 2, mass=0.5) == []


BAD = {
    "budget 0": ({"budget": 0}, "budget must be at least 1"),
    "budget negative": ({"budget": -5}, "budget must be at least 1 .*got -5"),
    "budget below the forced": (
        {"budget": 5, "sinks": 4, "recent": 2},
        r"at least sinks \+ recent, 6, got 5",
    ),
    "sinks negative": ({"sinks": -1}, "sinks must be at least 0, got -1"),
    "recent negative": ({"recent": -2}, "recent must be at least 0, got -2"),
    "mass 0": ({"mass": 0.0}, "mass must be above 0 and at most 1, got 0"),
    "mass above 1": ({"mass": 1.5}, "mass must be above 0 and at most 1, got 1.5"),
    "mass NaN": ({"mass": NAN}, "mass must be above 0 .*got nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_options_are_refused_by_name(name):
    changes, message = BAD[name]
    with torch.no_grad(), pytest.raises(ValueError, match=f"adaptive::select_tokens: .*{message}"):
        select_tokens(torch.rand(1, 2, 30), **{"budget": 10, **changes})


@pytest.mark.parametrize(
    ("wrong", "mass", "message"),
    [
        (NAN, 1.0, "not be NaN"),
        (NAN, 0.5, "be finite and not negative"),
        (-0.25, 0.5, "be finite and not negative.*got -0.25"),
        (INF, 0.5, "be finite and not negative.*got inf"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 777, 8999, LONG - 1])
def test_a_wrong_score_is_refused_where_it_is(wrong, mass, message, place, level):
    scores = torch.rand(2, 2, LONG, generator=torch.Generator().manual_seed(0))
    scores[1, 0, place] = wrong
    where = rf"scores\[1, 0, {place}\] must {message}"
    with torch.no_grad(), pytest.raises(ValueError, match=where):
        select_tokens(scores, 100, None, 4, 64, mass)


def test_scores_beyond_the_length_are_not_judged():
    scores = torch.rand(1, 1, 30)
    scores[..., 20:] = NAN
    indices, counts = select_tokens(scores, 30, torch.tensor([20], dtype=torch.int32))
    assert indices[0, 0, : int(counts)].tolist() == list(range(20))
