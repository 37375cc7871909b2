"""Laws of decode_attention on the CPU: which inputs have to give the same result, bit for bit."""

import math

import pytest
import torch
from decode_cases import BF16, F16, Case
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import decode_attention

cases = st.builds(
    Case,
    batch=st.just(2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    query_tokens=st.integers(1, 16),
    capacity=st.one_of(st.integers(16, 140), st.integers(1010, 1100)),
    head_dim=st.sampled_from([32, 40, 64, 96, 128, 136]),
    lengths=st.sampled_from([None, "ragged"]),
    layout=st.sampled_from(["plain", "bshd"]),
    dtype=st.sampled_from([torch.float32, BF16, F16]),
    seed=st.integers(0, 2**16),
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def merged(left, right):
    """Attention to the union of two disjoint sets of keys, from the results of each."""
    lse = torch.logaddexp(left[1], right[1])
    shift = lse.masked_fill(lse == -math.inf, 0)
    weights = [torch.exp(part[1] - shift)[..., None] for part in (left, right)]
    return weights[0] * left[0] + weights[1] * right[0], lse


@given(cases, st.lists(st.integers(0, 4), min_size=2, max_size=2))
def test_rows_of_a_larger_cache_are_read_in_place(case, rows):
    """The bits of a call on copies of them; what other rows hold has no effect."""
    arguments, rows = case.arguments(), torch.tensor(rows)
    large = Case(**{**vars(case), "batch": 5, "lengths": None, "causal": False}).arguments()
    held = {name: large[name] for name in ("key", "value")}
    want = decode_attention(**{**arguments, **{n: t[rows] for n, t in held.items()}})
    unread = torch.tensor([row for row in range(5) if row not in rows], dtype=torch.long)
    for tensor in held.values():
        tensor[unread] = math.nan
    assert_same(decode_attention(**{**arguments, **held}, cache_rows=rows), want)


@given(cases)
def test_a_row_does_not_depend_on_its_neighbours(case):
    arguments = case.arguments()
    alone = {k: v[1:] if torch.is_tensor(v) else v for k, v in arguments.items()}
    together = decode_attention(**arguments)
    assert_same([t[1:] for t in together], decode_attention(**alone))


@given(cases)
def test_permuting_heads_permutes_results(case):
    arguments = case.arguments()
    order = torch.randperm(case.kv_heads, generator=torch.Generator().manual_seed(case.seed))
    heads = (order[:, None] * case.group + torch.arange(case.group)).flatten()
    moved = {name: arguments[name][:, order] for name in ("key", "value")}
    permuted = decode_attention(**{**arguments, **moved, "query": arguments["query"][:, heads]})
    assert_same(permuted, [t[:, heads] for t in decode_attention(**arguments)])


@given(cases)
def test_grouped_heads_equal_repeated_heads(case):
    arguments = case.arguments()
    repeated = {n: arguments[n].repeat_interleave(case.group, 1) for n in ("key", "value")}
    assert_same(decode_attention(**{**arguments, **repeated}), decode_attention(**arguments))


@given(cases)
def test_causal_queries_equal_single_steps(case):
    """What makes checking a draft of tokens at once the same as decoding them one by one."""
    arguments = case.arguments()
    out, lse = decode_attention(**arguments)
    lengths = arguments["lengths"]
    if lengths is None:
        lengths = torch.full((case.batch,), case.capacity, dtype=torch.int32)
    for token in range(case.query_tokens):
        step = {
            **arguments,
            "query": arguments["query"][:, :, token : token + 1],
            "lengths": (lengths - case.query_tokens + token + 1).clamp(min=0),
        }
        single = decode_attention(**step)
        assert_same(single, (out[:, :, token : token + 1], lse[:, :, token : token + 1]))


@given(cases, st.integers(1, 3))
def test_a_bool_mask_equals_a_bias_of_minus_infinity(case, axes):
    arguments = case.arguments()
    shape = (case.batch, 1, case.query_tokens, case.capacity)[-axes:]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(case.seed)) < 0.5
    bias = torch.zeros(shape).masked_fill(~mask, -math.inf)
    by_mask = decode_attention(**{**arguments, "mask": mask})
    assert_same(by_mask, decode_attention(**{**arguments, "mask": bias}))


@given(cases)
def test_a_length_equals_a_mask_of_the_first_keys(case):
    arguments = Case(**{**case.__dict__, "lengths": "ragged"}).arguments()
    position = torch.arange(case.capacity)
    mask = (position < arguments["lengths"][:, None])[:, None, None]
    uncausal = {**arguments, "causal": False}
    masked = {**uncausal, "lengths": None, "mask": mask}
    assert_same(decode_attention(**masked), decode_attention(**uncausal))


@given(cases)
def test_disjoint_sets_of_keys_merge_to_their_union(case):
    arguments = case.arguments()
    rng = torch.Generator().manual_seed(case.seed)
    mask = torch.rand(case.batch, 1, case.query_tokens, case.capacity, generator=rng) < 0.5
    parts = [decode_attention(**{**arguments, "mask": m}) for m in (mask, ~mask)]
    union = decode_attention(**arguments)
    for left, right in zip(merged(*parts), union, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@given(cases)
def test_order_of_keys_does_not_matter(case):
    arguments = {**case.arguments(), "lengths": None, "causal": False}
    arguments |= {name: arguments[name].nan_to_num() for name in ("key", "value")}
    order = torch.randperm(case.capacity, generator=torch.Generator().manual_seed(case.seed))
    shuffled = {name: arguments[name][:, :, order] for name in ("key", "value")}
    for left, right in zip(
        decode_attention(**{**arguments, **shuffled}), decode_attention(**arguments), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@given(cases)
def test_factors_of_two_move_freely(case):
    """Between query and scale; and out of the values, which results are linear in."""
    arguments = case.arguments()
    scale = case.head_dim**-0.5
    plain = decode_attention(**{**arguments, "scale": scale})
    double = {"query": arguments["query"] * 2, "scale": scale / 2}
    assert_same(decode_attention(**{**arguments, **double}), plain)
    out, lse = decode_attention(**{**arguments, "value": arguments["value"] * 2, "scale": scale})
    assert_same((out, lse), (2 * plain[0], plain[1]))


@given(cases)
def test_a_constant_bias_moves_the_log_sum_only(case):
    arguments = case.arguments()
    out, lse = decode_attention(**arguments)
    biased, biased_lse = decode_attention(**{**arguments, "mask": torch.full((1, 1, 1, 1), 2.5)})
    torch.testing.assert_close(biased, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(biased_lse, lse + 2.5, rtol=1e-5, atol=1e-5)


@given(cases)
def test_equal_scores_give_the_mean(case):
    arguments = case.arguments()
    out, lse = decode_attention(**{**arguments, "query": torch.zeros_like(arguments["query"])})
    last = (arguments["value"].isnan()).logical_not()[..., 0].sum(-1)  # the last query sees all
    mean = arguments["value"].float().nan_to_num().sum(2) / last.clamp(min=1)[..., None]
    expected = mean.repeat_interleave(case.group, 1)
    torch.testing.assert_close(out[:, :, -1], expected, rtol=1e-5, atol=1e-5)
    count = last.float().repeat_interleave(case.group, 1)
    torch.testing.assert_close(lse[:, :, -1], count.log(), rtol=1e-6, atol=1e-6)


@given(cases)
def test_a_softcap_bounds_scores_and_a_large_one_does_nothing(case):
    arguments = Case(**{**case.__dict__, "magnitude": 20.0}).arguments()
    _, lse = decode_attention(**{**arguments, "softcap": 2.0})
    assert (lse <= 2 + math.log(case.capacity) + 1e-5).all()
    plain = decode_attention(**arguments)
    for left, right in zip(decode_attention(**{**arguments, "softcap": 1e7}), plain, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
