"""Laws of gather_attention: chosen keys and no others, the same bits by every way to name them."""

import math
from dataclasses import replace

import pytest
import torch
from choices import as_mask, chosen_keys, everything, gathered, lists
from decode_cases import BF16, EDGES, F16, MASKS, Case
from hypothesis import given
from hypothesis import strategies as st
from levels import EVERY, set_for_a_test

from adaptive.ops import decode_attention, gather_attention

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
page_sizes = st.sampled_from([1, 2, 8, 16, 64])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def extra_tokens(case, count, seed):
    rng = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.kv_heads, count, case.head_dim)
    pair = [torch.randn(shape, generator=rng).to(case.dtype) for _ in range(2)]
    bias = torch.randn(shape[:3], generator=rng)
    return dict(zip(("extra_key", "extra_value", "extra_bias"), (*pair, bias), strict=True))


def pages(case, page_size):
    return -(-case.capacity // page_size)


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_choosing_everything_is_decode_attention_bit_for_bit(case, page_size, level):
    arguments = case.arguments()
    chosen = everything(case.batch, case.kv_heads, pages(case, page_size))
    made = gathered(arguments, *chosen, page_size=page_size)
    assert_same(made, decode_attention(**arguments))


@given(cases, page_sizes)
def test_choosing_everything_is_decode_attention_for_any_case(case, page_size):
    arguments = case.arguments()
    chosen = everything(case.batch, case.kv_heads, pages(case, page_size))
    made = gathered(arguments, *chosen, page_size=page_size)
    assert_same(made, decode_attention(**arguments))


@given(cases, page_sizes)
def test_it_equals_a_mask_of_what_is_chosen(case, page_size):
    arguments = case.arguments()
    chosen = lists(case.batch, case.kv_heads, pages(case, page_size), case.seed)
    taken = chosen_keys(*chosen, case.capacity, page_size)
    made = gathered(arguments, *chosen, page_size=page_size)
    masked = {**arguments, "mask": as_mask(arguments, taken)}
    right = decode_attention(**masked)
    torch.testing.assert_close(made, right, rtol=2e-5, atol=2e-5)


@given(cases, page_sizes)
def test_keys_that_are_not_chosen_are_not_read(case, page_size):
    arguments = case.arguments()
    chosen = lists(case.batch, case.kv_heads, pages(case, page_size), case.seed)
    left_out = ~chosen_keys(*chosen, case.capacity, page_size)[..., None]
    poisoned = {n: arguments[n].masked_fill(left_out, NAN) for n in ("key", "value")}
    made = gathered({**arguments, **poisoned}, *chosen, page_size=page_size)
    assert_same(made, gathered(arguments, *chosen, page_size=page_size))
    assert not any(t.isnan().any() for t in made)


@given(cases, st.sampled_from([2, 4, 32, 64]))
def test_a_page_is_its_tokens(case, page_size):
    arguments = case.arguments()
    indices, counts = lists(case.batch, case.kv_heads, case.capacity // page_size, case.seed)
    tokens = (indices[..., None] * page_size + torch.arange(page_size)).flatten(2)
    tokens = tokens.to(torch.int32)
    made = gathered(arguments, indices, counts, page_size=page_size)
    assert_same(made, gathered(arguments, tokens, counts * page_size))


@given(cases)
def test_a_row_does_not_depend_on_its_neighbours(case):
    arguments = case.arguments()
    indices, counts = lists(case.batch, case.kv_heads, case.capacity, case.seed)
    extra = extra_tokens(case, 2, case.seed)
    whole = gathered(arguments, indices, counts, **extra)
    batched = {n for n, v in arguments.items() if torch.is_tensor(v) and n != "mask"}
    alone = {n: v[1:] if n in batched else v for n, v in arguments.items()}
    if (mask := alone["mask"]) is not None:
        full = (case.batch, case.kv_heads * case.group, case.query_tokens, case.capacity)
        alone["mask"] = mask.expand(full)[1:]
    part = gathered(alone, indices[1:], counts[1:], **{n: v[1:] for n, v in extra.items()})
    assert_same([t[1:] for t in whole], part)


@given(cases)
def test_grouped_heads_equal_repeated_heads(case):
    arguments = case.arguments()
    indices, counts = lists(case.batch, case.kv_heads, case.capacity, case.seed)
    repeated = {n: arguments[n].repeat_interleave(case.group, 1) for n in ("key", "value")}
    lists_too = (t.repeat_interleave(case.group, 1) for t in (indices, counts))
    made = gathered({**arguments, **repeated}, *lists_too)
    right = gathered(arguments, indices, counts)
    torch.testing.assert_close(made, right, rtol=2e-5, atol=2e-5)


@given(cases, st.integers(1, 64))
def test_extra_tokens_are_keys_that_every_query_sees(case, count):
    arguments = replace(case, causal=False).arguments()
    chosen = lists(case.batch, case.kv_heads, case.capacity, case.seed)
    extra = extra_tokens(case, count, case.seed)
    taken = as_mask(arguments, chosen_keys(*chosen, case.capacity))
    full = (case.batch, case.kv_heads * case.group, case.query_tokens, case.capacity)
    seen = taken.expand(full)
    if arguments["lengths"] is not None:
        within = torch.arange(case.capacity) < arguments["lengths"][:, None, None, None]
        seen = seen & within if seen.dtype == torch.bool else seen.masked_fill(~within, -math.inf)
    seen = torch.zeros(full).masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else seen
    bias = extra["extra_bias"].repeat_interleave(case.group, 1)[:, :, None]
    bias = torch.cat([seen, bias.expand(*full[:3], count)], 3)
    cache = {n: torch.cat([arguments[n], extra[f"extra_{n}"]], 2) for n in ("key", "value")}
    right = decode_attention(**{**arguments, **cache, "lengths": None, "mask": bias})
    made = gathered(arguments, *chosen, **extra)
    torch.testing.assert_close(made, right, rtol=2e-5, atol=2e-5)


@given(cases, st.integers(2, 30))
def test_a_bias_of_log_n_counts_a_token_n_times(case, times):
    arguments = case.arguments()
    chosen = lists(case.batch, case.kv_heads, case.capacity, case.seed)
    extra = extra_tokens(case, 1, case.seed)
    once = {**extra, "extra_bias": torch.full_like(extra["extra_bias"], math.log(times))}
    often = {n: extra[n].expand(-1, -1, times, -1) for n in ("extra_key", "extra_value")}
    often["extra_bias"] = torch.zeros(case.batch, case.kv_heads, times)
    made = gathered(arguments, *chosen, **once)
    torch.testing.assert_close(made, gathered(arguments, *chosen, **often), rtol=2e-5, atol=2e-5)


@given(cases)
def test_an_extra_token_with_a_bias_of_minus_infinity_is_left_out(case):
    arguments = case.arguments()
    chosen = lists(case.batch, case.kv_heads, case.capacity, case.seed)
    extra = extra_tokens(case, 3, case.seed)
    extra["extra_bias"][:] = -math.inf
    extra["extra_key"][:] = NAN
    assert_same(gathered(arguments, *chosen, **extra), gathered(arguments, *chosen))


@given(cases)
def test_two_halves_merge_to_the_whole(case):
    arguments = case.arguments()
    indices, counts = lists(case.batch, case.kv_heads, case.capacity, case.seed)
    cut = indices.shape[2] // 2
    first = gathered(arguments, indices[..., :cut], counts.clamp(max=cut))
    second = gathered(arguments, indices[..., cut:], (counts - cut).clamp(min=0))
    lse = torch.logaddexp(first[1], second[1])
    shift = lse.masked_fill(lse == -math.inf, 0)
    out = sum(torch.exp(part[1] - shift)[..., None] * part[0] for part in (first, second))
    whole = gathered(arguments, indices, counts)
    torch.testing.assert_close((out, lse), whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chosen", [100, 3000])
def test_the_number_of_threads_changes_no_bit(chosen):
    arguments = Case(capacity=4000, kv_heads=3, batch=2, head_dim=128, dtype=BF16).arguments()
    choice = lists(2, 3, 4000, 0, most=chosen)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(gathered(arguments, *choice))
    torch.set_num_threads(before)
    assert_same(made[0], made[1])
    assert_same(made[0], made[2])


def test_a_list_of_many_items_ends_with_the_extra_tokens(level):
    case = Case(batch=1, capacity=2500, head_dim=128, dtype=BF16)
    arguments = case.arguments()
    extra = extra_tokens(case, 5, 0)
    for count in (0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2500):
        choice = everything(1, case.kv_heads, count)
        made = gathered(arguments, *choice, **extra)
        right = gather_attention.reference(
            **arguments, indices=choice[0], counts=choice[1], **extra
        )
        torch.testing.assert_close(made, right, rtol=2e-5, atol=2e-5)
