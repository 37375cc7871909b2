"""How many tokens are drafted: what pays by the measured times, and none where nothing pays."""

import random

import pytest

from adaptive.layers.draft_length import BINS, Average, DraftLength, Line


def simulate(share, draft_s, verify_s, plain_s, steps=600, seed=1, confidence=None, length=None):
    """Run the controller against drafts right with probability ``share``; tokens per second."""
    rng = random.Random(seed)
    length = length or DraftLength(fixed=None, most=15)
    tokens, seconds, drafted = 0, 0.0, []
    for _ in range(steps):
        if not length.wants(0, 1.0, 15):
            length.plain.add(plain_s)
            tokens, seconds = tokens + 1, seconds + plain_s
            drafted.append(0)
            continue
        made, reach = 0, 1.0
        while made == 0 or length.wants(made, reach, 15):
            made += 1
            length.draft.add(draft_s)
            seconds += draft_s
            reach *= length.accepts(confidence or share)
        right = 0
        while right < made and rng.random() < share:
            right += 1
        for i in range(min(right + 1, made)):
            length.learn(confidence or share, i < right)
        length.verify.add(made + 1, verify_s(made + 1))
        seconds += verify_s(made + 1)
        tokens += right + 1
        drafted.append(made)
    return tokens / seconds, drafted, length


def best_fixed(share, draft_s, verify_s):
    """Tokens per second of the best constant number of drafts, by arithmetic."""
    rates = []
    for drafts in range(1, 16):
        expected = sum(share**i for i in range(drafts + 1))
        rates.append(expected / (drafts * draft_s + verify_s(drafts + 1)))
    return max(rates)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("draft_s", [0.1, 0.3])
def test_within_a_tenth_of_the_best_constant_length(share, draft_s):
    def verify_s(rows):
        return 0.9 + 0.02 * rows

    rate, _, _ = simulate(share, draft_s, verify_s, plain_s=1.0)
    assert rate > 0.9 * max(best_fixed(share, draft_s, verify_s), 1.0)


def test_no_drafts_where_none_pays():
    rate, drafted, length = simulate(0.2, 0.5, lambda rows: 1.0, plain_s=1.0)
    assert rate > 0.95
    assert length.turned_off > 0
    assert sum(count > 0 for count in drafted[100:]) < 0.1 * len(drafted[100:])


def test_surer_drafts_make_longer_ones():
    _, few, _ = simulate(0.6, 0.1, lambda rows: 0.9, plain_s=1.0)
    _, many, _ = simulate(0.95, 0.1, lambda rows: 0.9, plain_s=1.0)
    assert sum(many[50:]) > 2 * sum(few[50:])


def test_a_fixed_length_is_kept_up_to_the_room():
    length = DraftLength(fixed=4, most=15)
    assert [length.wants(made, 1.0, 15) for made in range(6)] == [True] * 4 + [False] * 2
    assert [length.wants(made, 1.0, 2) for made in range(3)] == [True, True, False]
    assert not length.wants(0, 1.0, 0)


def test_acceptance_is_learned_by_confidence():
    length = DraftLength(fixed=None, most=15)
    for _ in range(200):
        length.learn(0.95, True)
        length.learn(0.05, False)
    assert length.accepts(0.95) > 0.95
    assert length.accepts(0.05) < 0.05
    assert length.accepts(1.0) == length.accepts(1 - 0.5 / BINS)
    assert length.acceptance == pytest.approx(0.5, abs=0.02)


def test_a_line_is_found_through_noise_and_outliers():
    line, rng = Line(), random.Random(3)
    for turn in range(400):
        rows = rng.randint(1, 12)
        slow = 50.0 if turn % 41 == 40 else 1.0  # the machine was busy elsewhere
        line.add(rows, (2.0 + 0.5 * rows) * rng.uniform(0.98, 1.02) * slow)
    assert line.at(1) == pytest.approx(2.5, rel=0.1)
    assert line.at(12) == pytest.approx(8.0, rel=0.1)
    assert line.slope == pytest.approx(0.5, rel=0.2)


def test_one_number_of_rows_says_nothing_of_the_slope():
    line = Line()
    for _ in range(5):
        line.add(4, 1.0)
    assert line.slope == 0.0
    assert line.at(9) == pytest.approx(1.0)


def test_longer_passes_are_believed_after_three():
    average, line = Average(), Line()
    for _ in range(10):
        average.add(1.0)
        line.add(4, 1.0)
    for _ in range(2):
        average.add(50.0)
        line.add(4, 50.0)
    assert average.value == 1.0
    assert line.at(4) == pytest.approx(1.0)
    average.add(50.0)
    line.add(4, 50.0)
    assert average.value == 50.0
    assert line.at(4) == pytest.approx(50.0)


def test_what_was_learned_makes_short_calls_as_good_as_the_best_length():
    def verify_s(rows):
        return 0.8 + 0.02 * rows

    _, _, length = simulate(0.8, 0.3, verify_s, plain_s=1.0, steps=60)
    rates = []
    for seed in range(40):
        length.begin()
        rates.append(simulate(0.8, 0.3, verify_s, 1.0, steps=20, seed=seed, length=length)[0])
    assert sum(rates) / len(rates) > 0.95 * best_fixed(0.8, 0.3, verify_s)


def test_drafts_that_are_unsure_but_right_are_found_out():
    """A draft that is thought to be wrong is not checked, so nothing is learned of it alone."""
    length, rng = DraftLength(fixed=None, most=15), random.Random(4)
    for _ in range(60):
        length.learn(rng.uniform(0.7, 1.0), True)
    assert length.accepts(0.4) > 0.9
    for _ in range(30):
        length.learn(0.4, False)
    assert length.accepts(0.4) < 0.3
    assert length.accepts(0.9) > 0.9


def test_sure_drafts_that_are_wrong_make_unsure_ones_unlikely():
    length = DraftLength(fixed=None, most=15)
    for turn in range(60):
        length.learn(0.9, turn % 2 == 0)
    assert length.accepts(0.9) == pytest.approx(0.5, abs=0.06)
    assert length.accepts(0.4) < 0.2


@pytest.mark.parametrize("before", [0.1, 0.2])
def test_a_call_on_easier_text_is_tried_at_once(before):
    def verify_s(rows):
        return 0.8 + 0.02 * rows

    _, _, length = simulate(before, 0.4, verify_s, plain_s=1.0, steps=200)
    assert length.turned_off > 0
    length.begin()
    rate, _, _ = simulate(0.95, 0.4, verify_s, plain_s=1.0, steps=40, length=length)
    assert rate > 0.85 * best_fixed(0.95, 0.4, verify_s)


def test_hard_text_costs_few_trials_in_each_call():
    length, rates = None, []
    for seed in range(20):
        if length is not None:
            length.begin()
        rate, _, length = simulate(
            0.3, 0.4, lambda rows: 0.8 + 0.02 * rows, 1.0, steps=60, seed=seed, length=length
        )
        rates.append(rate)
    assert sum(rates) / len(rates) > 0.97


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_drafts_that_are_always_or_never_right_have_chances(acceptance):
    length = DraftLength(fixed=None, most=15)
    length.adopt(acceptance, 0.1)
    for confidence in (0.0, 0.5, 1.0):
        assert length.accepts(confidence) == pytest.approx(acceptance, abs=0.4)
    for _ in range(2000):
        length.learn(acceptance, acceptance == 1.0)
    assert length.accepts(acceptance) == pytest.approx(acceptance, abs=0.05)


@pytest.mark.parametrize(("rows", "steps"), [(1, 2), (8, 1)])
def test_a_call_begins_with_as_many_tries_as_tell_something(rows, steps):
    _, _, length = simulate(0.05, 0.9, lambda count: 0.9 + 0.02 * count, 1.0, steps=200)
    length.begin()
    tried = 0
    while length.wants(0, 1.0, 15):
        tried += 1
        for _ in range(rows):
            length.learn(0.5, False)
    assert tried == steps
