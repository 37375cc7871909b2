"""Which siblings of drafts are checked: those that pay for their row, as ranks were right."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers.draft_length import DraftLength
from adaptive.layers.sibling_length import PROBE_EVERY, WIDTH, SiblingLength

MOST = 15
CHANCES = st.lists(
    st.lists(st.floats(0.01, 0.99), min_size=2, max_size=2), min_size=1, max_size=MOST
)


def measured(row_s, branch_s=0.0, **fields):
    """One that knows what passes cost."""
    length = SiblingLength(**{"fixed": None, "most": MOST, **fields})
    length.draft.add(0.1)
    length.plain.add(1.0)
    for rows in (2, 16, 4, 12):
        length.verify.add(rows, 0.9 + row_s * rows)
        if branch_s:
            length.branches.add(rows, branch_s)
    length.choose([[0.5]])  # the first has no siblings
    return length


@given(CHANCES, st.sampled_from([0.0, 0.001, 0.02, 0.5]), st.sampled_from([1, 2]))
def test_there_are_never_more_nodes_than_a_check_takes(accepts, row_s, together):
    length = measured(row_s, together=together)
    length.wants(0, 1.0, MOST)
    closes, siblings = length.choose(accepts)
    assert len(accepts) - (not closes) + len(siblings) <= MOST
    assert siblings == sorted(set(siblings))
    assert all(0 <= s.depth < len(accepts) and 1 <= s.rank < WIDTH for s in siblings)


def test_rows_that_cost_nothing_are_all_used_and_dear_ones_not():
    assert len(measured(0.0).choose([[0.5]] * 4)[1]) == MOST - 4
    assert measured(5.0).choose([[0.5]] * 4)[1] == []


def test_siblings_stand_where_drafts_are_unsure():
    _, siblings = measured(0.05).choose([[0.99], [0.3], [0.9]])
    assert siblings
    assert {sibling.depth for sibling in siblings} == {1}


def test_ranks_that_were_right_come_first():
    length = measured(0.01)
    for _ in range(400):
        length.learn_rank(5)
    _, siblings = length.choose([[0.5]] * 10)
    assert {sibling.rank for sibling in siblings} == {5}
    for _ in range(2000):
        length.learn_rank(None)
    assert length.choose([[0.5]] * 10)[1] == []


def test_siblings_that_bring_less_than_was_expected_become_fewer():
    """Chances that confidences give are estimates: here they promise twice what comes."""
    length = measured(0.02)
    before = len(length.choose([[0.5]] * 4)[1])
    for _ in range(100):
        length.choose([[0.5]] * 4)
        length.learn_siblings(0.1)
    assert 0 < len(length.choose([[0.5]] * 4)[1]) < before
    ahead = measured(0.02, together=2)  # rows wait for each other, so that little can be said
    ahead.choose([[0.5, 0.5]])
    ahead.learn_siblings(0.0)
    assert ahead.found == ahead.expected


def test_the_pass_for_siblings_must_pay():
    """The last draft and its siblings share a pass; if that costs more than they bring, neither."""
    assert measured(0.01, branch_s=0.1).choose([[0.9], [0.5]])[0]
    assert measured(0.01, branch_s=3.0).choose([[0.9], [0.5]]) == (False, [])
    assert measured(0.01, branch_s=3.0).choose([[0.5]])[0]  # there is nothing else to check
    assert measured(0.01, branch_s=3.0, fixed=2).choose([[0.9], [0.5]])[0]  # it was asked for


def test_now_and_then_a_check_has_no_siblings():
    length = measured(0.0)
    found = [bool(length.choose([[0.5]] * 3)[1]) for _ in range(2 * PROBE_EVERY)]
    assert found.count(False) == 2


def simulate(length, share, ranks, steps=400, row_s=0.01):
    """Run a controller on drafts right by chance and wrong ones with the token of some rank."""
    rng, tokens, seconds = random.Random(1), 0, 0.0
    for _ in range(steps):
        if not length.wants(0, 1.0, MOST):
            length.plain.add(1.0)
            tokens, seconds = tokens + 1, seconds + 1.0
            continue
        made, reach = 0, 1.0
        while made == 0 or length.wants(made, reach, MOST):
            made += 1
            length.draft.add(0.3)
            reach *= length.accepts(share)
        seconds += 0.3 * made
        right = 0
        while right < made and rng.random() < share:
            right += 1
        siblings, found = [], 0
        if isinstance(length, SiblingLength):
            _, siblings = length.choose([[length.accepts(share)]] * made)
        for depth in range(min(right + 1, made)):
            length.learn(share, depth < right)
        tokens += right + 1
        if right < made:
            rank = rng.choices([*range(1, len(ranks) + 1), None], [*ranks, 1 - sum(ranks)])[0]
            found = (right, rank) in siblings
            tokens += found
            if isinstance(length, SiblingLength):
                length.learn_rank(rank)
        if siblings:
            length.learn_siblings(found)
        spent = 0.8 + row_s * (1 + made + len(siblings))
        length.verify.add(1 + made + len(siblings), spent)
        seconds += spent
    return tokens / seconds


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_siblings_gain_where_the_second_is_often_right(share):
    chain = simulate(DraftLength(fixed=None, most=MOST), share, (0.5, 0.2))
    assert simulate(SiblingLength(fixed=None, most=MOST), share, (0.5, 0.2)) > 1.05 * chain


def test_siblings_that_are_never_right_are_given_up():
    chain = simulate(DraftLength(fixed=None, most=MOST), 0.7, (), row_s=0.05)
    tree = SiblingLength(fixed=None, most=MOST)
    assert simulate(tree, 0.7, (), row_s=0.05) > 0.95 * chain
    assert tree.choose([[0.7]] * 3)[1] == []


def test_all_is_given_up_where_nothing_pays():
    length = SiblingLength(fixed=None, most=MOST)
    assert simulate(length, 0.05, (0.05,), row_s=0.2) > 0.9
    assert length.turned_off > 0
