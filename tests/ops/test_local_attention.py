"""Laws of local_attention: what is near, or a sink of the same sequence, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES
from window_cases import attend, blank_unseen, close, qkv

from adaptive.ops import local_attention


def oracle(batch, query_tokens, tokens, windows, sinks, cuts, causal):
    """Which keys each query sees, ``[batch, heads, query_tokens, tokens]``, row by row."""
    seen = torch.zeros(batch, len(windows), query_tokens, tokens, dtype=torch.bool)
    key = torch.arange(tokens)
    place = torch.arange(tokens - query_tokens, tokens)[:, None]
    for row in range(batch):
        for begin, end in zip(cuts[row], cuts[row][1:], strict=False):
            mine = (place >= begin) & (place < end) & (key >= begin) & (key < end)
            for head, window in enumerate(windows):
                near = ((place - key).abs() < window) | (key < begin + sinks)
                seen[row, head] |= mine & near & ((key <= place) | (not causal))
    return seen


@st.composite
def calls(draw):
    tokens = draw(st.integers(1, 150))
    query_tokens = draw(st.integers(1, tokens))
    cuts = draw(st.lists(st.lists(st.integers(0, tokens), min_size=2, max_size=5), min_size=2))
    cuts = [sorted(c) for c in cuts[:2]]
    longest = max(map(len, cuts))
    cuts = [c + [c[-1]] * (longest - len(c)) for c in cuts]  # sequences without a token
    return {
        "tokens": tokens,
        "query_tokens": query_tokens,
        "windows": draw(st.lists(st.integers(1, tokens + 3), min_size=4, max_size=4)),
        "sinks": draw(st.integers(0, tokens + 2)),
        "cuts": cuts,
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 2.5])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(calls())
def test_only_what_is_seen_counts(call):
    """Whatever windows, sinks, cuts and causality; what no query sees is NaN."""
    tokens, count, dtype = call["tokens"], call["query_tokens"], call["dtype"]
    query, key, value = qkv(tokens, count, dtype=dtype, seed=call["seed"])
    windows, cuts = call["windows"], call["cuts"]
    seen = oracle(2, count, tokens, windows, call["sinks"], cuts, call["causal"])
    key, value = blank_unseen(key, value, seen)
    made = local_attention(
        query,
        key,
        value,
        windows=torch.tensor(windows, dtype=torch.int32),
        sinks=call["sinks"],
        offsets=torch.tensor(cuts, dtype=torch.int32),
        softcap=call["softcap"],
        causal=call["causal"],
    )
    close(made, attend(query, key, value, seen, softcap=call["softcap"]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_every_head_size(head_dim, dtype, level):
    query, key, value = qkv(150, heads=3, kv_heads=1, head_dim=head_dim, dtype=dtype)
    seen = oracle(2, 150, 150, [40] * 3, 3, [[0, 150]] * 2, True)
    made = local_attention(query, key, value, 40, sinks=3)
    close(made, attend(query, key, value, seen), dtype)


@pytest.mark.parametrize("window", [200, 10**9, None])
def test_a_window_over_everything_is_causal_attention(window):
    query, key, value = qkv(200)
    right = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
    )
    made, _ = local_attention(query, key, value, window)
    torch.testing.assert_close(made.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_of_one_is_the_value(dtype, level):
    query, key, value = qkv(100, dtype=dtype)
    out, lse = local_attention(query, key, value, 1)
    assert torch.equal(out, value.repeat_interleave(2, 1))
    own = (query.double() * key.double().repeat_interleave(2, 1)).sum(3) * 32**-0.5
    torch.testing.assert_close(lse.double(), own, rtol=1e-5, atol=1e-5)


def test_permuted_heads_permute_the_result():
    query, key, value = qkv(130, heads=4, kv_heads=4)
    order = torch.tensor([2, 0, 3, 1])
    windows = torch.tensor([5, 64, 130, 1], dtype=torch.int32)
    made = local_attention(query, key, value, windows=windows)
    moved = local_attention(query[:, order], key[:, order], value[:, order], windows=windows[order])
    for left, right in zip(made, moved, strict=True):
        assert torch.equal(left[:, order], right)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(1, 200))
def test_chunks_after_a_cache_are_one_pass_bit_for_bit(chunks, window):
    tokens = sum(chunks)
    query, key, value = qkv(tokens, dtype=torch.bfloat16)
    whole = local_attention(query, key, value, window, sinks=2)
    end = 0
    for chunk in chunks:
        begin, end = end, end + chunk
        part = query[:, :, begin:end], key[:, :, :end], value[:, :, :end]
        made = local_attention(*part, window, sinks=2)
        assert torch.equal(made[0], whole[0][:, :, begin:end])
        assert torch.equal(made[1], whole[1][:, :, begin:end])


@given(st.lists(st.integers(0, 90), min_size=1, max_size=6), st.integers(1, 100), st.booleans())
def test_packed_sequences_are_separate_ones(lengths, window, causal):
    tokens = sum(lengths)
    if tokens == 0:
        return
    query, key, value = qkv(tokens, batch=1)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    packed = local_attention(
        query, key, value, window, sinks=1, offsets=cuts[None].int(), causal=causal
    )
    for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        part = (t[:, :, begin:end] for t in (query, key, value))
        alone = local_attention(*part, window, sinks=1, causal=causal)
        for left, right in zip(packed, alone, strict=True):
            torch.testing.assert_close(left[:, :, begin:end], right, rtol=1e-5, atol=1e-5)


def test_a_padded_batch_is_its_rows():
    """Left and right padding, which may hold NaN, and the padding's own queries give zeros."""
    query, key, value = qkv(100, batch=3, dtype=torch.bfloat16)
    cuts = [(0, 100), (64, 100), (0, 70)]
    made = local_attention(query, key, value, 30, offsets=torch.tensor(cuts, dtype=torch.int32))
    for row, (begin, end) in enumerate(cuts):
        part = (t[row : row + 1, :, begin:end] for t in (query, key, value))
        out, lse = local_attention(*part, 30)
        assert torch.equal(made[0][row : row + 1, :, begin:end], out)
        assert torch.equal(made[1][row : row + 1, :, begin:end], lse)
        padding = torch.ones(100, dtype=torch.bool)
        padding[begin:end] = False
        assert (made[0][row][:, padding] == 0).all()
        assert (made[1][row][:, padding] == -torch.inf).all()


def test_strides_are_followed():
    query, key, value = (
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(99, head_dim=64)
    )
    wide = torch.full((2, 2, 99, 70), torch.nan)
    wide[..., 3:67] = key
    made = local_attention(query, wide[..., 3:67], value, 17)
    right = local_attention(*(t.contiguous() for t in (query, key, value)), 17)
    assert torch.equal(made[0], right[0])
    assert made[0].stride() == (99 * 4 * 64, 64, 4 * 64, 1)


def test_neither_threads_nor_batch_change_a_bit(level):
    query, key, value = qkv(700, batch=3, head_dim=64, dtype=torch.float16)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(local_attention(query, key, value, 90, sinks=4)[0])
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    alone = local_attention(query[1:2], key[1:2], value[1:2], 90, sinks=4)[0]
    assert torch.equal(made[0][1:2], alone)


def test_large_scores_do_not_overflow(level):
    query, key, value = qkv(120)
    made = local_attention(query * 300, key * 300, value, 50)
    assert made[0].isfinite().all()
    seen = oracle(2, 120, 120, [50] * 4, 0, [[0, 120]] * 2, True)
    right = attend(query * 300, key * 300, value, seen)
    torch.testing.assert_close(made[1].double(), right[1], rtol=1e-5, atol=1e-3)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "window 0": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    "window negative": ({"window": -5}, ValueError, "window must be at least 1, got -5"),
    "window a float": ({"window": 2.5}, TypeError, "window must be a whole number, got float"),
    "window a bool": ({"window": True}, TypeError, "window must be a whole number, got bool"),
    "window and windows": (
        {"window": 3, "windows": int32(1, 2, 3, 4)},
        ValueError,
        "window must be None beside windows, got 3",
    ),
    "a window per head of 0": (
        {"windows": int32(1, 0, 3, 4)},
        IndexError,
        r"windows\[1\] must be at least 1, got 0",
    ),
    "too few windows": ({"windows": int32(1, 2)}, ValueError, r"windows must have size 4 .*\[2\]"),
    "windows int64": ({"windows": torch.ones(4).long()}, TypeError, "windows must be int32"),
    "sinks negative": ({"sinks": -1}, ValueError, "sinks must be at least 0, got -1"),
    "offsets of one row": (
        {"offsets": int32(0, 9)[None]},
        ValueError,
        r"offsets must have size 2 in dimension 0, got shape \[1, 2\]",
    ),
    "one offset": (
        {"offsets": int32(0, 0)[:, None]},
        ValueError,
        "offsets must have at least 2 entries per row",
    ),
    "offsets descend": (
        {"offsets": torch.stack([int32(0, 9, 9), int32(0, 5, 4)])},
        IndexError,
        r"offsets\[1, 2\] must be in 5\.\.9.*, got 4",
    ),
    "offsets beyond": (
        {"offsets": torch.stack([int32(0, 10), int32(0, 5)])},
        IndexError,
        r"offsets\[0, 1\] must be in 0\.\.9.*, got 10",
    ),
    "more queries than tokens": (
        {"query": torch.randn(2, 4, 10, 32)},
        ValueError,
        "query must have at most key's 9 tokens",
    ),
    "head_dim 24": (
        {"query": torch.randn(2, 4, 9, 24)},
        ValueError,
        r"head_dim of 32\.\.256",
    ),
    "other heads": (
        {"query": torch.randn(2, 5, 9, 32)},
        ValueError,
        "query must have a multiple of key's 2 heads, got 5",
    ),
    "other dtype": ({"key": torch.randn(2, 2, 9, 32).half()}, TypeError, "key must be float32"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap must be 0"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale must be finite"),
    "causal None": ({"causal": None}, TypeError, "causal must be True or False"),
    "query is None": ({"query": None}, TypeError, "must be a tensor, got None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, message = BAD[name]
    query, key, value = qkv(9)
    with torch.no_grad(), pytest.raises(error, match=message):
        local_attention(**{"query": query, "key": key, "value": value, **changes})


def test_no_tensor_of_tokens_by_tokens_exists():
    """8k tokens of one head: such a tensor would take 64 MiB as bool."""
    query, key, value = qkv(8192, batch=1, heads=1, kv_heads=1)
    peak = torch.zeros(1)
    with torch.profiler.profile(profile_memory=True) as profile:
        local_attention(query, key, value, 64)
    peak = max(event.cpu_memory_usage for event in profile.key_averages())
    assert peak < 4 * 2**20
