"""Wrong arguments of decode_attention: the error names the argument and its value."""

import math

import numpy as np
import pytest
import torch

from adaptive.ops import decode_attention


def arguments(**changes):
    rng = torch.Generator().manual_seed(0)
    good = {
        "query": torch.randn(2, 4, 3, 64, generator=rng),
        "key": torch.randn(2, 2, 10, 64, generator=rng),
        "value": torch.randn(2, 2, 10, 64, generator=rng),
    }
    return {**good, **{k: v(good) if callable(v) else v for k, v in changes.items()}}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "query is None": ({"query": None}, TypeError, "first argument must be a tensor, got None"),
    "query of rank 3": (
        {"query": lambda g: g["query"][0]},
        ValueError,
        r"query must have 4 dim.*\[4, 3, 64\]",
    ),
    "key of rank 3": (
        {"key": lambda g: g["key"][0]},
        ValueError,
        r"key must have 4 dimensions.*\[2, 10, 64\]",
    ),
    "17 query tokens": (
        {"query": torch.randn(2, 4, 17, 64)},
        ValueError,
        r"at most 16 query.*\[2, 4, 17, 64\]",
    ),
    "head_dim 24": (
        {k: (lambda g, k=k: g[k][..., :24]) for k in ("query", "key", "value")},
        ValueError,
        r"head_dim of 32\.\.256 that is a multiple of 8.*24\]",
    ),
    "head_dim 44": (
        {k: (lambda g, k=k: g[k][..., :44]) for k in ("query", "key", "value")},
        ValueError,
        r"head_dim of 32\.\.256 that is a multiple of 8.*44\]",
    ),
    "heads no multiple": (
        {"query": torch.randn(2, 5, 1, 64)},
        ValueError,
        "multiple of key's 2 heads, got 5",
    ),
    "no key heads": (
        {k: (lambda g, k=k: g[k][:, :0]) for k in ("key", "value")},
        ValueError,
        "multiple of key's 0 heads, got 4",
    ),
    "batch differs": (
        {"key": lambda g: g["key"][:1]},
        ValueError,
        r"key must have size 2 in dimension 0",
    ),
    "head_dim differs": (
        {"key": lambda g: g["key"][..., :32]},
        ValueError,
        r"key must have size 64 in dimension 3",
    ),
    "value shorter": (
        {"value": lambda g: g["value"][:, :, :9]},
        ValueError,
        r"value must have size 10",
    ),
    "key float64": (
        {"key": lambda g: g["key"].double()},
        TypeError,
        "key must be float32, got torch.float64",
    ),
    "query int": (
        {"query": lambda g: g["query"].int()},
        TypeError,
        "query must be float32 or float16 or",
    ),
    "value float16": ({"value": lambda g: g["value"].half()}, TypeError, "value must be float32"),
    "float8": (
        {"query": lambda g: g["query"].to(torch.float8_e4m3fn)},
        TypeError,
        "query must be float32",
    ),
    "key transposed": (
        {"key": lambda g: g["key"].repeat(1, 1, 1, 2)[..., ::2]},
        ValueError,
        "key must be contiguous in its last dimension, got stride 2",
    ),
    "key meta": ({"key": lambda g: g["key"].to("meta")}, (TypeError, ValueError), "key must"),
    "key sparse": (
        {"key": lambda g: g["key"].to_sparse()},
        TypeError,
        "key must be a strided torch.Tensor",
    ),
    "key is a list": ({"key": [1.0]}, TypeError, "key must be a strided .*got list"),
    "key is numpy": (
        {"key": np.zeros((2, 2, 10, 64), np.float32)},
        TypeError,
        "key must be .*got ndarray",
    ),
    "cache_rows int32": (
        {"cache_rows": int32(0, 1)},
        TypeError,
        "cache_rows must be int64, got torch.int32",
    ),
    "cache_rows of three rows": (
        {"cache_rows": torch.tensor([0, 1, 0])},
        ValueError,
        "cache_rows must have size 2 in dimension 0",
    ),
    "cache_rows of rank 2": (
        {"cache_rows": torch.tensor([[0, 1]])},
        ValueError,
        "cache_rows must have 1 dimensions",
    ),
    "strided cache_rows": (
        {"cache_rows": torch.tensor([0, 5, 1, 5])[::2]},
        ValueError,
        "cache_rows must be contiguous",
    ),
    "a cache row too many": (
        {"cache_rows": torch.tensor([1, 2])},
        IndexError,
        r"cache_rows\[1\] must be in 0\.\.1, got 2",
    ),
    "a negative cache row": (
        {"cache_rows": torch.tensor([-1, 0])},
        IndexError,
        r"cache_rows\[0\] must be in 0\.\.1, got -1",
    ),
    "a larger cache without cache_rows": (
        {k: torch.randn(3, 2, 10, 64) for k in ("key", "value")},
        ValueError,
        "key must have size 2 in dimension 0",
    ),
    "lengths int64": (
        {"lengths": torch.tensor([1, 2])},
        TypeError,
        "lengths must be int32, got torch.int64",
    ),
    "lengths of one row": (
        {"lengths": int32(1)},
        ValueError,
        "lengths must have size 2 in dimension 0",
    ),
    "lengths of rank 2": (
        {"lengths": int32(1, 2)[None]},
        ValueError,
        "lengths must have 1 dimensions",
    ),
    "length beyond capacity": (
        {"lengths": int32(1, 11)},
        IndexError,
        r"lengths\[1\] must be in 0\.\.10, got 11",
    ),
    "negative length": (
        {"lengths": int32(-1, 3)},
        IndexError,
        r"lengths\[0\] must be in 0\.\.10, got -1",
    ),
    "mask of another length": (
        {"mask": torch.ones(9, dtype=torch.bool)},
        ValueError,
        r"mask must broadcast to \[2, 4, 3, 10\], got shape \[9\]",
    ),
    "mask of rank 5": (
        {"mask": torch.ones(1, 1, 1, 1, 10, dtype=torch.bool)},
        ValueError,
        "mask must broadcast",
    ),
    "mask of bfloat16": (
        {"mask": torch.zeros(10, dtype=torch.bfloat16)},
        TypeError,
        "mask must be bool or float32",
    ),
    "scale is NaN": ({"scale": math.nan}, ValueError, "scale must be finite in float32, got nan"),
    "scale beyond float32": ({"scale": 1e300}, ValueError, r"scale must be finite .*got 1e\+300"),
    "scale beyond float64": ({"scale": 10**400}, ValueError, "scale must be finite .*got int"),
    "scale is text": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "scale is complex": ({"scale": 1j}, TypeError, "scale must be a number, got complex"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap must be 0 .*got -1"),
    "softcap infinite": ({"softcap": math.inf}, ValueError, "softcap must be finite .*got inf"),
    "softcap that float32 rounds to off": (
        {"softcap": 1e-60},
        ValueError,
        r"softcap must be 0 \(off\) or positive in float32, got 1e-60",
    ),
    "softcap is None": ({"softcap": None}, TypeError, "softcap must be a number, got NoneType"),
    "causal is None": ({"causal": None}, TypeError, "causal must be True or False, got NoneType"),
    "causal is text": ({"causal": "no"}, TypeError, "causal must be True or False, got str"),
    "unknown argument": (
        {"casual": True},
        TypeError,
        "adaptive::decode_attention: arguments must be query, .*unexpected.* 'casual'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_is_refused_by_name(name):
    changes, error, message = BAD[name]
    with torch.no_grad(), pytest.raises(error, match=message):
        decode_attention(**arguments(**changes))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_arguments_of_no_op_are_named(kind, grad):
    query, key, value = arguments().values()
    if kind is np.ndarray:
        query, key, value = query.numpy(), key.numpy(), value.numpy()
    start = "adaptive::decode_attention: arguments must be query, .*"
    with torch.set_grad_enabled(grad):
        with pytest.raises(TypeError, match=start + "unexpected .*'casual'"):
            decode_attention(query, key, value, casual=True)
        with pytest.raises(TypeError, match=start + "missing .*'value'"):
            decode_attention(query, key)
        with pytest.raises(TypeError, match=start + "too many"):
            decode_attention(query, key, value, None, None, None, 0.0, True, None, value)
    outputs = decode_attention.outputs(*arguments().values())
    with pytest.raises(TypeError, match=start + "unexpected .*'casual'"):
        decode_attention.into(*outputs, **arguments(), casual=True)


@pytest.mark.parametrize(
    "number", [2, np.float32(2), torch.tensor(2.0)], ids=lambda n: str(type(n))
)
def test_every_kind_of_number_is_one(number):
    with torch.no_grad():
        out, _ = decode_attention(**arguments(), scale=number, softcap=number, causal=np.False_)
        expected, _ = decode_attention(**arguments(), scale=2.0, softcap=2.0, causal=False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "shape",
    [
        ((0, 4, 1, 64), (0, 2, 10, 64)),
        ((2, 4, 0, 64), (2, 2, 10, 64)),
        ((2, 0, 1, 64), (2, 0, 10, 64)),
    ],
    ids=["no row", "no query token", "no head"],
)
def test_nothing_to_do_gives_the_empty_result(shape):
    query, cache = (torch.randn(*sizes) for sizes in shape)
    out, lse = decode_attention(query, cache, cache)
    assert out.shape == query.shape
    assert lse.shape == query.shape[:3]


def test_empty_cache_and_empty_rows_give_zeros_and_minus_infinity():
    good = arguments()
    out, lse = decode_attention(good["query"], good["key"][:, :, :0], good["value"][:, :, :0])
    assert torch.equal(out, torch.zeros_like(good["query"]))
    assert (lse == -math.inf).all()
    out, lse = decode_attention(**good, lengths=int32(0, 10), causal=False)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -math.inf).all()
    assert lse[1].isfinite().all()


def test_a_refused_call_writes_nothing():
    good = arguments()
    outputs = decode_attention.outputs(**good)
    for tensor in outputs:
        tensor.fill_(7.0)
    with pytest.raises(IndexError):
        decode_attention.into(*outputs, **good, lengths=int32(3, 99))
    assert all((tensor == 7).all() for tensor in outputs)
