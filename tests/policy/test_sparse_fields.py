"""The numbers of the sparse policies: what is refused, by name, and the round trip of the rest."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import adaptive
from adaptive.policy import Policy, Quest, RazorAttention, StreamingLLM, TidalDecode

COUNTS = st.integers(0, 10**6)
SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)
LAYERS = st.lists(st.integers(0, 90), unique=True, min_size=1).map(lambda x: tuple(sorted(x)))
EVERY = st.none() | st.integers(1, 99)

TIDAL = st.fixed_dictionaries(
    {
        "budget": st.integers(200, 10**6) | SHARES,
        "mass": st.none() | SHARES,
        "select_layers": st.none() | LAYERS,
        "dense_layers": st.just(()),
        "sinks": st.integers(0, 99),
        "recent": st.integers(1, 99),
        "group": st.sampled_from(["sum", "max"]),
        "shared": st.booleans(),
        "min_context": st.integers(1, 10**6),
        "compensate": st.booleans(),
        "correct_every": EVERY,
        "audit_every": EVERY,
        "min_mass": st.none() | SHARES,
    }
).map(lambda values: TidalDecode(**values))
PAGED = st.builds(
    Quest,
    budget=st.integers(200, 10**6),
    page_size=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    dense_layers=LAYERS,
    sinks=st.integers(0, 99),
    recent=st.integers(1, 99),
    min_context=st.integers(1, 10**6),
    audit_every=EVERY,
)
STREAMING = st.builds(
    StreamingLLM, sinks=COUNTS, window=st.integers(1, 10**6), layers=st.none() | LAYERS
)
HEADS = st.sets(st.tuples(st.integers(0, 40), st.integers(0, 16)))
RAZOR = st.builds(
    RazorAttention,
    heads=st.none() | HEADS,
    induction=SHARES,
    echo=SHARES,
    sinks=COUNTS,
    window=st.integers(1, 10**6) | st.tuples(st.just("max"), st.integers(1, 10**6), SHARES),
    compensation=st.booleans(),
    dense_layers=LAYERS,
    of_layers=EVERY,
    of_heads=EVERY,
)


@given(TIDAL | PAGED | STREAMING | RAZOR)
def test_round_trips(policy):
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert hash(policy) == hash(copy.deepcopy(policy))
    names = ("TidalDecode", "Quest", "StreamingLLM", "RazorAttention")
    assert eval(str(policy), {name: getattr(adaptive, name) for name in names}) == policy
    assert policy.exact is False


NOT_COUNTS = [-1, True, 1.0, "4", math.nan, None]
NOT_SHARES = [0, 1, 0.0, 1.0, -0.1, 1.1, math.nan, math.inf, True, "0.5"]
NOT_LAYERS = [(-1,), (1, 0), (1, 1), (True,), (1.0,), "01", 3]
BAD = {
    TidalDecode: {
        "budget": [0, -1, 68, 0.0, 1.5, -0.5, math.nan, True, "1024", None],
        "mass": NOT_SHARES,
        "select_layers": [*NOT_LAYERS, ()],
        "dense_layers": [*NOT_LAYERS, None],
        "sinks": NOT_COUNTS,
        "recent": [*NOT_COUNTS, 0],
        "group": ["mean", None, True],
        "shared": [1, None, "yes"],
        "min_context": [*NOT_COUNTS, 0],
        "compensate": [0, None],
        "correct_every": [0, -3, True, 2.0],
        "audit_every": [0, -3, True, 2.0],
        "min_mass": NOT_SHARES,
    },
    Quest: {
        "budget": [0, -1, 68, 0.5, math.nan, True, None],
        "page_size": [*NOT_COUNTS, 0, 3, 12, 128],
        "dense_layers": [*NOT_LAYERS, None],
        "sinks": NOT_COUNTS,
        "recent": [*NOT_COUNTS, 0],
        "min_context": [0],
        "audit_every": [0],
    },
    StreamingLLM: {
        "sinks": NOT_COUNTS,
        "window": [*NOT_COUNTS, 0],
        "layers": [*NOT_LAYERS, ()],
    },
    RazorAttention: {
        "heads": ["all", 3, [(1,)], [(1, 2, 3)], [(-1, 0)], [(0, True)], [(0, 1), (0, 1)], [4]],
        "induction": [-0.1, 1.1, math.nan, True, None, "x"],
        "echo": [-0.1, 1.1, math.nan, True, None],
        "sinks": NOT_COUNTS,
        "window": [*NOT_COUNTS, 0, ("min", 4, 0.2), ("max", 0, 0.2), ("max", 4, 0), ("max", 4)],
        "compensation": [0, None],
        "dense_layers": [*NOT_LAYERS, None],
        "of_layers": [0, True],
        "of_heads": [0, True],
    },
}
CASES = [
    pytest.param(kind, name, value, id=f"{kind.__name__}.{name}={value!r}")
    for kind, bad in BAD.items()
    for name, values in bad.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_every_field_refuses_what_it_cannot_be(kind, name, value):
    with pytest.raises(ValueError, match=rf"adaptive: {kind.__name__}\.{name} must .*, got "):
        kind(**{name: value})


def test_every_field_has_its_refusals():
    for kind, bad in BAD.items():
        assert set(bad) == {field.name for field in dataclasses.fields(kind)}, kind


def test_fields_are_checked_together():
    with pytest.raises(ValueError, match=r"budget must .* above sinks \+ recent = 12, or .*got 12"):
        TidalDecode(budget=12, sinks=2, recent=10)
    assert TidalDecode(budget=13, sinks=2, recent=10).tokens(5) == 13
    with pytest.raises(
        ValueError, match=r"select_layers must have no layer of dense_layers, got 1"
    ):
        TidalDecode(select_layers=(1, 4))
    with pytest.raises(ValueError, match="induction must be above 0 where echo is 0, got 0"):
        RazorAttention(induction=0, echo=0)


def test_a_mapping_of_heads_and_lists_are_taken():
    mapped = RazorAttention(heads={3: [1, 0], 1: [], 2: 5})
    assert mapped == RazorAttention(heads=[(2, 5), [3, 0], (3, 1)])
    assert mapped.heads == ((2, 5), (3, 0), (3, 1))
    assert TidalDecode(select_layers=[2, 5]) == TidalDecode(select_layers=(2, 5))


@given(TIDAL | PAGED, st.integers(0, 10**6))
def test_a_budget_holds_sinks_and_recent_tokens(policy, length):
    tokens = policy.tokens(length)
    assert tokens > policy.sinks + policy.recent
    if isinstance(policy.budget, int):
        assert tokens == policy.budget
    else:
        assert tokens >= policy.budget * length - 1


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_share_grows_with_the_context(length, more):
    whole = TidalDecode(budget=1.0)
    assume(length > whole.sinks + whole.recent)
    assert whole.tokens(length) == length
    tenth = TidalDecode(budget=0.1)
    assert tenth.tokens(length) <= tenth.tokens(length + more)


def test_windows_are_those_of_the_paper():
    assert RazorAttention().window_tokens(10_000) == 4000
    assert RazorAttention().window_tokens(100_000) == 20_000
    assert RazorAttention(window=7).window_tokens(100_000) == 7
    assert StreamingLLM(window=9).window_tokens(100_000) == 9
