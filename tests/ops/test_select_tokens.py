"""select_tokens is what sorting would choose, on every instruction set; wrong input is named."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from levels import AVAILABLE
from select_cases import chosen

import adaptive
from adaptive.ops import select_tokens

KINDS = ("normal", "exp", "ties", "equal", "rising", "falling", "tiny", "huge", "periodic")

every_level = pytest.mark.parametrize("level", AVAILABLE)
pytestmark = pytest.mark.usefixtures("_restored")


@pytest.fixture
def _restored():
    before = adaptive.cpu_level()
    with torch.no_grad():
        yield
    adaptive.set_cpu_level(before)


def scores_of(kind, size, seed, hidden=0.0):
    """A row of scores, none negative but for `normal` and `rising`; some of them -inf."""
    rng = torch.Generator().manual_seed(seed)
    position = torch.arange(size)
    line = {
        "normal": lambda: torch.randn(size, generator=rng),
        "exp": lambda: (4 * torch.randn(size, generator=rng)).exp(),
        "ties": lambda: torch.randint(0, 4, (size,), generator=rng).float(),
        "equal": lambda: torch.full((size,), 0.25),
        "rising": lambda: position - size / 2,
        "falling": lambda: torch.linspace(1, 0, size),
        "tiny": lambda: torch.rand(size, generator=rng) * 2.0**-140,
        "huge": lambda: torch.rand(size, generator=rng) * 2.0**127,
        "periodic": lambda: ((position % 64) == 5).float() * (1 + position / size),
    }[kind]()
    zeros = line == 0
    line[zeros & (torch.rand(size, generator=rng) < 0.5)] = -0.0
    line[torch.rand(size, generator=rng) < hidden] = -math.inf
    return line.float()


def check(scores, budget, lengths=None, sinks=0, recent=0, mass=1.0):
    indices, counts = select_tokens(scores, budget, lengths, sinks, recent, mass)
    batch, kv_heads, capacity = scores.shape
    assert indices.shape == (batch, kv_heads, min(budget, capacity))
    for row in range(batch):
        length = capacity if lengths is None else int(lengths[row])
        for head in range(kv_heads):
            line = scores[row, head, :length].tolist()
            expected = chosen(line, budget, sinks, recent, mass)
            made = indices[row, head].tolist()
            assert int(counts[row, head]) == len(expected)
            assert made[: len(expected)] == expected
            assert set(made[len(expected) :]) <= {-1}
    return indices, counts


@every_level
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=2),
    size=st.integers(0, 400),
    budget=st.integers(1, 420),
    sinks=st.integers(0, 30),
    recent=st.integers(0, 30),
    mass=st.none() | st.floats(0.001, 0.999),
    hidden=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    lengths=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    seed=st.integers(0, 1000),
)
def test_small_rows_are_what_sorting_chooses(  # noqa: PLR0913
    level, kinds, size, budget, sinks, recent, mass, hidden, lengths, seed
):
    adaptive.set_cpu_level(level)
    lines = [scores_of(kind, size, seed + i, hidden) for i, kind in enumerate(kinds)]
    scores = torch.stack([*lines, *lines]).view(2, 2, size)
    if mass is not None:
        scores = torch.where(scores < 0, scores.abs() * torch.sign(scores + math.inf), scores)
        scores = torch.where(scores.isnan() | (scores == math.inf), -math.inf, scores)
    ragged = torch.tensor([round(size * share) for share in lengths], dtype=torch.int32)
    check(scores, max(budget, sinks + recent), ragged, sinks, recent, mass or 1.0)


@every_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 2, 500, 2048, 9000, 20001])
def test_long_rows_are_what_sorting_chooses(level, kind, budget):
    """Long enough for the limit to be guessed from a sample; `periodic` misleads the guess."""
    adaptive.set_cpu_level(level)
    scores = scores_of(kind, 20011, seed=budget).view(1, 1, -1)
    check(scores, budget)
    scores[0, 0, :5000] = -math.inf
    check(scores, budget, torch.tensor([19000], dtype=torch.int32), sinks=1)


@every_level
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("normal", "rising")])
@pytest.mark.parametrize("mass", [1e-9, 0.1, 0.9, 0.98, 1 - 2.0**-53])
def test_long_rows_keep_their_share(level, kind, mass):
    adaptive.set_cpu_level(level)
    scores = scores_of(kind, 20011, seed=3, hidden=0.1).view(1, 1, -1)
    check(scores, 2000, mass=mass)
    check(scores, 20011, mass=mass, sinks=4, recent=64)


@every_level
def test_a_sample_that_saw_only_small_scores_costs_a_pass_not_the_result(level):
    """All but a few scores are equal, so what is not below the limit is nearly everything."""
    adaptive.set_cpu_level(level)
    scores = torch.zeros(1, 1, 30000)
    scores[0, 0, 17::1000] = torch.arange(30.0)
    indices, _ = check(scores, 100)
    assert set(range(1017, 30000, 1000)) <= set(indices[0, 0].tolist())


@given(seed=st.integers(0, 100), budget=st.integers(1, 60), mass=st.sampled_from([0.5, 1.0]))
@example(seed=0, budget=60, mass=1.0)
def test_what_is_not_in_use_changes_nothing(seed, budget, mass):
    scores = scores_of("exp", 60, seed).view(1, 1, -1)
    roomy = torch.full((1, 1, 90), math.nan)
    roomy[..., :60] = scores
    lengths = torch.tensor([60], dtype=torch.int32)
    expected, counts = select_tokens(scores, budget, mass=mass)
    made, made_counts = select_tokens(roomy, budget, lengths, mass=mass)
    assert torch.equal(counts, made_counts)
    assert torch.equal(made[..., : expected.shape[-1]], expected)
    assert (made[..., expected.shape[-1] :] == -1).all()


@given(seed=st.integers(0, 100), mass=st.sampled_from([0.7, 1.0]))
def test_a_permutation_of_different_scores_permutes_the_choice(seed, mass):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 2, 300, generator=rng) + torch.arange(300) * 1e-3
    order = torch.randperm(300, generator=rng)
    before = select_tokens(scores, 50, mass=mass)[0]
    after = select_tokens(scores[..., order].contiguous(), 50, mass=mass)[0]
    for head in range(2):
        taken = after[0, head][after[0, head] >= 0].long()
        assert sorted(order[taken].tolist()) == before[0, head][before[0, head] >= 0].tolist()


@given(seed=st.integers(0, 100), low=st.floats(0.01, 0.99), high=st.floats(0.01, 0.99))
def test_a_larger_share_contains_a_smaller_one(seed, low, high):
    scores = scores_of("exp", 300, seed).view(1, 1, -1)
    small, large = (select_tokens(scores, 300, mass=m)[0] for m in sorted((low, high)))
    assert set(small.flatten().tolist()) <= set(large.flatten().tolist()) | {-1}


def test_results_do_not_depend_on_threads_or_levels():
    scores = torch.stack([scores_of("exp", 30000, seed) for seed in range(6)]).view(2, 3, -1)
    lengths = torch.tensor([30000, 29999], dtype=torch.int32)
    threads = torch.get_num_threads()
    made = []
    try:
        for level in AVAILABLE:
            adaptive.set_cpu_level(level)
            for count in (1, 3):
                torch.set_num_threads(count)
                made += [select_tokens(scores, 5000, lengths, 4, 9, mass) for mass in (0.97, 1.0)]
    finally:
        torch.set_num_threads(threads)
    for i, (indices, counts) in enumerate(made):
        assert torch.equal(indices, made[i % 2][0])
        assert torch.equal(counts, made[i % 2][1])


def test_strided_rows_are_read_in_place():
    wide = torch.randn(3, 2, 2, 500)
    scores = wide[::2, :, 1, 100:400].transpose(0, 1)
    assert not scores.is_contiguous()
    check(scores, 40)


@every_level
@pytest.mark.parametrize("position", [0, 3, 40, 20010])
@pytest.mark.parametrize("budget", [7, 20011])
@pytest.mark.parametrize("mass", [0.5, 1.0])
def test_nan_is_refused_by_place(level, position, budget, mass):
    adaptive.set_cpu_level(level)
    scores = torch.rand(2, 3, 20011)
    scores[1, 2, position] = math.nan
    message = rf"adaptive::select_tokens: scores\[1, 2, {position}\] must .*, got -?nan"
    with pytest.raises(ValueError, match=message):
        select_tokens(scores, budget, sinks=2, recent=2, mass=mass)
    scores[0, 1, 5] = math.nan
    with pytest.raises(ValueError, match=r"scores\[0, 1, 5\] must"):
        select_tokens(scores, budget, sinks=7, mass=mass)
    select_tokens(scores, 9, torch.tensor([5, 0], dtype=torch.int32), mass=mass)


@every_level
@pytest.mark.parametrize("value", [-1.0, -1e-45, math.inf])
def test_shares_of_such_scores_are_refused(level, value):
    adaptive.set_cpu_level(level)
    scores = torch.rand(1, 2, 100)
    scores[0, 1, 77] = value
    check(scores, 50)
    with pytest.raises(ValueError, match=r"scores\[0, 1, 77\] must be finite and not negative"):
        select_tokens(scores, 50, mass=0.5)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "budget 0": ({"budget": 0}, ValueError, "budget must be at least 1, got 0"),
    "budget negative": ({"budget": -3}, ValueError, "budget must be at least 1, got -3"),
    "budget below the forced": (
        {"budget": 9, "sinks": 4, "recent": 6},
        ValueError,
        r"budget must be at least sinks \+ recent = 4 \+ 6, got 9",
    ),
    "forced overflow": (
        {"budget": 9, "sinks": 2**62, "recent": 2**62},
        ValueError,
        "budget must be at least sinks",
    ),
    "sinks negative": ({"sinks": -1}, ValueError, "sinks must be at least 0, got -1"),
    "recent negative": ({"recent": -1}, ValueError, "recent must be at least 0, got -1"),
    "mass 0": ({"mass": 0.0}, ValueError, "mass must be above 0 and at most 1, got 0.0"),
    "mass above 1": ({"mass": 1.5}, ValueError, "mass must be above 0 and at most 1, got 1.5"),
    "mass NaN": ({"mass": math.nan}, ValueError, "mass must be above 0 and at most 1, got nan"),
    "float16": ({"scores": torch.zeros(2, 2, 9).half()}, TypeError, "scores must be float32"),
    "rank 2": ({"scores": torch.zeros(2, 9)}, ValueError, "scores must have 3 dimensions"),
    "not contiguous": (
        {"scores": torch.zeros(2, 9, 2).transpose(1, 2)},
        ValueError,
        "scores must be contiguous in its last dimension, got stride 2",
    ),
    "lengths int64": ({"lengths": torch.tensor([1, 2])}, TypeError, "lengths must be int32"),
    "lengths of one row": (
        {"lengths": int32(1)},
        ValueError,
        "lengths must have size 2 in dimension 0",
    ),
    "length beyond": (
        {"lengths": int32(1, 10)},
        IndexError,
        r"lengths\[1\] must be in 0\.\.9, got 10",
    ),
    "length negative": (
        {"lengths": int32(-1, 3)},
        IndexError,
        r"lengths\[0\] must be in 0\.\.9, got -1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_is_refused_by_name(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        select_tokens(**{"scores": torch.zeros(2, 2, 9), "budget": 12, **changes})


@pytest.mark.parametrize("options", [{"sinks": 2**62}, {"recent": 2**62}, {}])
def test_a_budget_beyond_every_key_takes_all(options):
    check(torch.rand(1, 2, 70), 2**63 - 1, **options)
