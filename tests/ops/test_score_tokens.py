"""Laws of score_tokens and scored_attention: the softmax's weights, and attention untouched."""

import math

import pytest
import torch
from decode_cases import BF16, EDGES, F16, MASKS, Case, seen_keys
from hypothesis import given
from hypothesis import strategies as st
from levels import EVERY, set_for_a_test

from adaptive.ops import decode_attention, score_tokens, scored_attention

level = set_for_a_test(EVERY)

NAN = math.nan

cases = st.builds(
    Case,
    batch=st.just(2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    query_tokens=st.integers(1, 5),
    capacity=st.one_of(st.integers(1, 140), st.integers(1010, 1200)),
    head_dim=st.sampled_from([32, 40, 64, 96, 128, 136]),
    lengths=st.sampled_from([None, "ragged"]),
    mask=st.sampled_from(MASKS),
    layout=st.sampled_from(["plain", "bshd"]),
    softcap=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from([torch.float32, BF16, F16]),
    seed=st.integers(0, 2**16),
)
reductions = st.sampled_from(["sum", "max", "logit"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def keys_only(arguments):
    return {name: value for name, value in arguments.items() if name != "value"}


def seen_by_any(case, arguments):
    shape = (case.batch, case.kv_heads, -1, case.capacity)
    return seen_keys(**arguments).view(shape).any(2)


def assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("reduce", ["sum", "max", "logit"])
def test_edges(case, reduce, level):
    arguments = case.arguments()
    out, lse, scores = scored_attention(**arguments, reduce=reduce)
    dense = decode_attention(**arguments)
    assert torch.equal(out, dense[0])
    assert torch.equal(lse, dense[1])
    clean = {**arguments, "key": arguments["key"].nan_to_num(0)}
    right = score_tokens.reference(**keys_only(clean), reduce=reduce)[0]
    seen = seen_by_any(case, arguments)
    assert torch.equal(scores == -math.inf, ~seen)
    if case.magnitude < 100:
        assert_close(scores[seen], right[seen])


@given(cases, reductions)
def test_scored_attention_is_decode_attention_and_score_tokens(case, reduce):
    arguments = case.arguments()
    out, lse, scores = scored_attention(**arguments, reduce=reduce)
    dense = decode_attention(**arguments)
    assert torch.equal(out, dense[0])
    assert torch.equal(lse, dense[1])
    alone = score_tokens(**keys_only(arguments), reduce=reduce)
    assert torch.equal(alone[0], scores)
    assert torch.equal(alone[1], lse)


@given(cases)
def test_the_weights_of_a_head_sum_to_its_queries(case):
    arguments = case.arguments()
    scores, lse = score_tokens(**keys_only(arguments))
    seen = seen_by_any(case, arguments)
    assert torch.equal(scores == -math.inf, ~seen)
    rows = (lse != -math.inf).view(case.batch, case.kv_heads, -1).sum(2).float()
    assert_close(scores.masked_fill(~seen, 0).sum(2), rows)


@given(cases)
def test_max_lies_between_the_mean_and_the_sum(case):
    arguments = keys_only(case.arguments())
    total, most = (score_tokens(**arguments, reduce=reduce)[0] for reduce in ("sum", "max"))
    seen = total != -math.inf
    rows = case.group * case.query_tokens
    assert (most[seen] <= total[seen] * (1 + 1e-5)).all()
    assert (most[seen] * rows * (1 + 1e-5) >= total[seen]).all()


@given(cases, reductions)
def test_a_row_does_not_depend_on_its_neighbours(case, reduce):
    arguments = keys_only(case.arguments())
    whole = score_tokens(**arguments, reduce=reduce)
    if (mask := arguments["mask"]) is not None:
        full = (case.batch, case.kv_heads * case.group, case.query_tokens, case.capacity)
        arguments["mask"] = mask.expand(full)
    alone = {n: v[1:] if torch.is_tensor(v) else v for n, v in arguments.items()}
    for left, right in zip(whole, score_tokens(**alone, reduce=reduce), strict=True):
        assert torch.equal(left[1:], right)


@given(cases)
def test_logit_is_what_the_softmax_takes(case):
    """With one query row the weights follow from it."""
    one = Case(**{**vars(case), "group": 1, "query_tokens": 1})
    arguments = keys_only(one.arguments())
    logits, lse = score_tokens(**arguments, reduce="logit")
    weights, _ = score_tokens(**arguments)
    shown = logits != -math.inf
    assert torch.equal(shown, weights != -math.inf)
    expected = torch.exp(logits - lse)
    assert_close(weights[shown], expected[shown])


@pytest.mark.parametrize("reduce", ["sum", "max", "logit"])
def test_nan_in_a_key_that_is_seen_shows_in_its_score(reduce):
    arguments = keys_only(Case(capacity=100, query_tokens=2).arguments())
    arguments["key"][0, 1, 40, 5] = NAN
    scores, _ = score_tokens(**arguments, reduce=reduce)
    assert scores[0, 1, 40].isnan()
    assert not scores[0, 0].isnan().any()
    assert not scores[1].isnan().any()


@pytest.mark.parametrize("reduce", ["sum", "max", "logit"])
def test_the_number_of_threads_changes_no_bit(reduce):
    arguments = Case(capacity=4000, kv_heads=3, head_dim=128, dtype=BF16).arguments()
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(scored_attention(**arguments, reduce=reduce))
    torch.set_num_threads(before)
    for other in made[1:]:
        for left, right in zip(made[0], other, strict=True):
            assert torch.equal(left, right)
