"""Wrong arguments of the ops that choose or score keys: the error names argument and value."""

import math

import pytest
import torch

from adaptive.ops import gather_attention, score_tokens, scored_attention, sum_tokens

I32 = torch.int32


def int32(*values):
    return torch.tensor(values, dtype=I32)


def arguments(**changes):
    rng = torch.Generator().manual_seed(0)
    good = {
        "query": torch.randn(1, 4, 1, 64, generator=rng),
        "key": torch.randn(1, 2, 10, 64, generator=rng),
        "value": torch.randn(1, 2, 10, 64, generator=rng),
        "indices": int32([[0, 3, 9], [1, 2, 5]]),
        "counts": int32([3, 2]),
    }
    return {**good, **changes}


def extra(**changes):
    good = {
        "extra_key": torch.zeros(1, 2, 1, 64),
        "extra_value": torch.zeros(1, 2, 1, 64),
        "extra_bias": torch.zeros(1, 2, 1),
    }
    return {**good, **changes}


LISTS = {
    "an index beyond the cache": (
        {"indices": int32([[0, 3, 10], [1, 2, 5]])},
        IndexError,
        r"indices\[0, 0, 2\] must be in 0\.\.9, got 10",
    ),
    "a negative index": (
        {"indices": int32([[-1, 3, 9], [1, 2, 5]])},
        IndexError,
        r"indices\[0, 0, 0\] must be in 0\.\.9, got -1",
    ),
    "unsorted": (
        {"indices": int32([[0, 3, 9], [2, 1, 5]])},
        IndexError,
        r"indices\[0, 1, 1\] must be more than the one before, 2, got 1",
    ),
    "twice the same": (
        {"indices": int32([[0, 3, 3], [1, 2, 5]])},
        IndexError,
        r"indices\[0, 0, 2\] must be more than the one before, 3, got 3",
    ),
    "a count beyond the list": (
        {"counts": int32([3, 4])},
        IndexError,
        r"counts\[0, 1\] must be in 0\.\.3, got 4",
    ),
    "a negative count": ({"counts": int32([-1, 2])}, IndexError, r"counts\[0, 0\].*got -1"),
    "indices of int64": (
        {"indices": torch.zeros(1, 2, 3, dtype=torch.int64)},
        TypeError,
        "indices must be int32, got torch.int64",
    ),
    "indices of other heads": (
        {"indices": torch.zeros(1, 4, 3, dtype=I32)},
        ValueError,
        "indices must have size 2 in dimension 1",
    ),
    "counts of rank 1": ({"counts": int32(3, 2)}, ValueError, "counts must have 2 dimensions"),
    "indices with gaps": (
        {"indices": torch.zeros(1, 2, 6, dtype=I32)[..., ::2]},
        ValueError,
        "indices must be contiguous in its last dimension, got stride 2",
    ),
}
GATHER = {
    "page_size 3": ({"page_size": 3}, ValueError, r"page_size must be a power of two.*got 3"),
    "page_size 0": ({"page_size": 0}, ValueError, r"page_size must be a power of two.*got 0"),
    "page_size 128": ({"page_size": 128}, ValueError, r"in 1\.\.64, got 128"),
    "a page beyond the cache": (
        {"page_size": 4},
        IndexError,
        r"indices\[0, 0, 1\] must be in 0\.\.2, got 3",
    ),
    "an extra key alone": (
        {"extra_key": torch.zeros(1, 2, 1, 64)},
        ValueError,
        "extra_key, extra_value and extra_bias must be given together",
    ),
    "65 extra tokens": (
        extra(
            extra_key=torch.zeros(1, 2, 65, 64),
            extra_value=torch.zeros(1, 2, 65, 64),
            extra_bias=torch.zeros(1, 2, 65),
        ),
        ValueError,
        "extra_key must have at most 64 tokens",
    ),
    "extra bias of bfloat16": (
        extra(extra_bias=torch.zeros(1, 2, 1, dtype=torch.bfloat16)),
        TypeError,
        "extra_bias must be float32",
    ),
    "extra value of another size": (
        extra(extra_value=torch.zeros(1, 2, 2, 64)),
        ValueError,
        "extra_value must have size 1 in dimension 2",
    ),
    "scale is NaN": ({"scale": math.nan}, ValueError, "scale must be finite"),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", [*LISTS, *GATHER])
def test_gather_attention_refuses_by_name(name):
    changes, error, message = {**LISTS, **GATHER}[name]
    with pytest.raises(error, match=f"adaptive::gather_attention: .*{message}"):
        gather_attention(**arguments(**changes))


@pytest.mark.parametrize("name", LISTS)
def test_sum_tokens_refuses_by_name(name):
    changes, error, message = LISTS[name]
    changed = arguments(**changes)
    with pytest.raises(error, match=f"adaptive::sum_tokens: .*{message}"):
        sum_tokens(changed["key"], changed["indices"], changed["counts"])


@pytest.mark.parametrize("reduce", ["mean", "", "SUM"])
def test_an_unknown_reduction_is_refused(reduce):
    good = arguments()
    with pytest.raises(ValueError, match=f"score_tokens: reduce must be sum, max .*got {reduce}"):
        score_tokens(good["query"], good["key"], reduce=reduce)
    with pytest.raises(ValueError, match="scored_attention: reduce must be sum, max or logit"):
        scored_attention(good["query"], good["key"], good["value"], reduce=reduce)


def test_what_a_list_holds_beyond_its_count_is_not_judged():
    wild = arguments(indices=int32([[0, 3, 99], [1, 2, -7]]), counts=int32([2, 2]))
    tame = arguments(indices=int32([[0, 3, 9], [1, 2, 5]]), counts=int32([2, 2]))
    for left, right in zip(gather_attention(**wild), gather_attention(**tame), strict=True):
        assert torch.equal(left, right)


def test_a_refused_call_writes_nothing():
    bad = arguments(counts=int32([3, 4]))
    outputs = gather_attention.outputs(**bad)
    for tensor in outputs:
        tensor.fill_(7.0)
    with pytest.raises(IndexError):
        gather_attention.into(*outputs, **bad)
    assert all((tensor == 7).all() for tensor in outputs)
