"""What a search proposes and keeps: by itself, against scores that a formula gives."""

import random
from statistics import mean

import pytest
import torch

from adaptive.layers import skip_search
from adaptive.layers.gaussian_process import GaussianProcess
from adaptive.layers.skip_search import SkipSearch

MIDDLE = tuple(range(1, 11))
HARM = {place: harm for place, harm in enumerate([0.0, 0.01, 0.05, 0.1, 0.2] * 4)}


def rate(matchness, cost):
    """Tokens per pass with the best of some numbers of drafts, where a check costs one pass."""
    return max(sum(matchness**i for i in range(k + 1)) / (k * cost + 1) for k in range(1, 9))


def share_right(chosen):
    """The true matchness of a set."""
    right = 1.0
    for place in chosen:
        right *= 1 - HARM[place]
    return right


def run(trials, seed=0, tokens=16, **options):
    search = SkipSearch(MIDDLE, MIDDLE, seed=seed, **options)
    search.shares = (0.07, 0.05)
    coin = random.Random(seed + 100)
    proposed = []
    while search.tried < trials and not search.finished:
        chosen = search.propose(rate)
        proposed.append(chosen)
        right = sum(coin.random() < share_right(chosen) for _ in range(tokens))
        search.score(chosen, right, tokens, rate)
    return search, proposed


def true_rate(search):
    return rate(share_right(search.best), search.cost(search.best))


def test_the_same_seed_gives_the_same_search():
    (one, first), (two, second), (_, other) = run(40), run(40), run(40, seed=1)
    assert first == second
    assert one.best == two.best
    assert one.log() == two.log()
    assert first != other


@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.7])
def test_every_candidate_has_the_size_asked_for(ratio):
    _, proposed = run(60, ratio=ratio)
    assert {len(chosen) for chosen in proposed} == {round(ratio * 20)}
    assert len(set(proposed)) > 40


def test_sizes_are_searched_too():
    _, proposed = run(60)
    sizes = {len(chosen) for chosen in proposed}
    assert len(sizes) > 5
    assert min(sizes) >= 1


def test_the_process_finds_better_sets_than_draws_do():
    """The mean over seeds of what the sets are truly worth."""
    with_process = mean(true_rate(run(30, seed=seed)[0]) for seed in range(6))
    drawn = mean(true_rate(run(30, seed=seed, bayes_every=None)[0]) for seed in range(6))
    assert with_process > drawn + 0.08
    assert with_process > 1.25  # the best set is worth 1.53


def test_a_lucky_score_does_not_win():
    search = SkipSearch(MIDDLE, MIDDLE, ratio=0.2)
    steady, lucky = frozenset({0, 1, 2, 3}), frozenset({4, 5, 6, 7})
    for place in range(8, 16):
        search.score(frozenset({place, 17, 18, 19}), 8, 16, rate)
    search.score(steady, 180, 200, rate)
    search.score(lucky, 4, 4, rate)
    assert search.best == steady


def test_checked_drafts_are_evidence():
    search = SkipSearch(MIDDLE, MIDDLE, ratio=0.2)
    good, other = frozenset({0, 1, 2, 3}), frozenset({4, 5, 6, 7})
    search.score(good, 16, 16, rate)
    search.confirm(good, 20, 200)
    search.score(other, 12, 16, rate)
    assert search.best == other


def test_it_ends():
    search, _ = run(1000)
    assert search.finished in (skip_search.SETTLED, skip_search.SPENT)
    assert search.tried <= skip_search.MOST_TRIALS
    assert not search.due
    hopeless = SkipSearch(MIDDLE, MIDDLE)
    while not hopeless.finished:
        hopeless.score(hopeless.propose(rate), 1, 16, rate)
    assert hopeless.finished == skip_search.NONE_PAYS
    assert not hopeless.drafts


def test_its_time_is_a_share_of_all():
    search = SkipSearch(MIDDLE, MIDDLE)
    search.spent, search.seconds = 10.0, 0.99
    assert search.due
    search.seconds = 1.01
    assert not search.due


def test_a_process_knows_what_it_saw_and_doubts_what_is_far():
    sets = torch.eye(6, dtype=torch.float64)
    values = torch.tensor([0.9, 0.5, 0.1, 0.5, 0.9, 0.1], dtype=torch.float64)
    process = GaussianProcess(sets, values, torch.full((6,), 1e-6, dtype=torch.float64))
    means, deviations = process.at(sets)
    assert means == pytest.approx(values.tolist(), abs=0.02)
    assert max(deviations) < 0.02
    _, far = process.at(torch.ones(1, 6, dtype=torch.float64))
    assert far[0] > 5 * max(deviations)


def test_a_process_of_one_value_expects_it_everywhere():
    one = torch.ones(1, 4, dtype=torch.float64)
    noise = torch.full((1,), 0.01, dtype=torch.float64)
    process = GaussianProcess(one, torch.tensor([0.7], dtype=torch.float64), noise)
    means, _ = process.at(torch.zeros(1, 4, dtype=torch.float64))
    assert means[0] == pytest.approx(0.7)


def test_what_seems_good_enough_comes_again_until_it_is_sure():
    search = SkipSearch(MIDDLE, MIDDLE, ratio=0.2)
    search.shares = (0.07, 0.05)
    first = search.propose(rate)
    search.score(first, 16, 16, rate)
    while not search.finished:
        assert search.propose(rate) == first
        search.score(first, 16, 16, rate)
    assert search.finished == skip_search.GOOD
    assert search.trials[first].seen == skip_search.ENOUGH_TOKENS
    unsure = SkipSearch(MIDDLE, MIDDLE, ratio=0.2)
    unsure.score(first, 16, 16, rate)
    unsure.score(first, 8, 16, rate)
    assert unsure.propose(rate) != first
