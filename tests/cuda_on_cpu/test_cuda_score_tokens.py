"""The CUDA kernels of score_tokens and scored_attention, run on the CPU, against float64."""

import pytest
import torch
from simulated import plain
from simulated_sparse import REDUCTIONS

from adaptive.ops import score_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ("query", "key", "lengths", "mask", "scale", "softcap", "causal", "reduce")


def inputs(dtype, **sizes):
    """Named arguments of these sizes, as the op's own make_inputs draws them."""
    full = {"batch": 2, "heads": 6, "kv_heads": 2, "capacity": 150, "head_dim": 64}
    drawn = score_tokens.make_inputs(**{**full, **sizes}, dtype=dtype, device="cpu")
    return dict(zip(NAMES, drawn, strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def exact(query, key, lengths, mask, scale, softcap, causal, reduce):
    """The definition in float64: `plain` gives lse, and with unit vectors as values the weights.

    Returns (scores, lse); -inf where no row of a KV head sees a key.
    """
    batch, heads, tokens, _ = query.shape
    kv_heads, capacity = key.shape[1:3]
    units = torch.eye(capacity, dtype=torch.float64).expand(batch, kv_heads, -1, -1)
    options = {"lengths": lengths, "causal": causal, "scale": scale, "softcap": softcap}
    weights, lse = plain(query.double(), key.double(), units, mask=mask, **options)
    # Which keys are seen does not show in the weights where they underflow.
    blind = None if mask is None else mask if mask.dtype == torch.bool else mask > -torch.inf
    seen = plain(query.double() * 0, key.double() * 0, units, mask=blind, **options)[0] > 0
    if reduce == "logit":
        weights = weights.log() + lse[..., None]
    shape = (batch, kv_heads, heads // kv_heads * tokens, capacity)
    weights, seen = weights.reshape(shape), seen.reshape(shape)
    if reduce == "sum":
        made = weights.where(seen, 0.0).sum(2)
    else:
        made = weights.where(seen, -torch.inf).amax(2)
    return made.where(seen.any(2), -torch.inf), lse


def check(scores, lse, named):
    expected, expected_lse = exact(**named)
    assert torch.equal(scores.isneginf(), expected.isneginf())
    tolerance = 3e-5 if named["reduce"] == "logit" else 2e-5
    torch.testing.assert_close(scores.double(), expected, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)


def score(sparse, named):
    made = sparse.score(**named)
    check(*made, named)
    return made


@every_dtype
@pytest.mark.parametrize("number", range(1, len(score_tokens.edges)))
def test_edges(sparse, dtype, number):
    sizes = score_tokens.edges[number]
    named = inputs(dtype, **sizes)
    if sizes.get("query_tokens") == 0:
        scores, _ = sparse.score(**named)
        assert scores.isneginf().all()
    else:
        score(sparse, named)


def test_an_empty_batch(sparse):
    scores, lse = sparse.score(**inputs(torch.bfloat16, batch=0))
    assert scores.numel() == lse.numel() == 0


@every_dtype
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("mask", [None, "bool", "add"])
def test_reductions(sparse, dtype, reduce, mask):
    """With causality, masks and lengths that leave some keys to nobody."""
    named = inputs(dtype, query_tokens=3, mask=mask, reduce=reduce)
    named |= {"lengths": int32(150, 2), "softcap": 3.0}
    score(sparse, named)
    score(sparse, {**named, "causal": False, "softcap": 0.0, "scale": 0.3})


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_splits(sparse, dtype, multiprocessors, reduce):
    sparse.set_device(multiprocessors)
    named = inputs(dtype, kv_heads=1, heads=2, capacity=700, reduce=reduce)
    score(sparse, {**named, "lengths": int32(700, 65)})


@every_dtype
@pytest.mark.parametrize("head_dim", [40, 128, 256])
@pytest.mark.parametrize(("block_kib", "kib"), [(99, 100), (163, 164)], ids=["sm_89", "sm_80"])
def test_shared_memory_of_real_devices(sparse, dtype, head_dim, block_kib, kib):
    sparse.set_device(4, block_kib, kib)
    score(sparse, inputs(dtype, batch=1, kv_heads=1, head_dim=head_dim, query_tokens=16))


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 24])
@pytest.mark.parametrize("mask", [None, "bool", "add"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_scored_attention_is_both_ops(sparse, decode, dtype, multiprocessors, mask, reduce):
    """Bit for bit the out and lse of decode_attention, and the scores of score_tokens."""
    sparse.set_device(multiprocessors)
    decode.set_device(multiprocessors)
    named = inputs(dtype, query_tokens=3, mask=mask, reduce=reduce, capacity=300)
    named["lengths"] = int32(300, 71)
    value = torch.randn(named["key"].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out, lse, scores = sparse.score(value=value, **named)
    options = {name: named[name] for name in ("lengths", "mask")}
    expected = decode(named["query"], named["key"], value, **options)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    check(scores, lse, named)


@every_dtype
@pytest.mark.parametrize("with_value", [False, True])
@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["one split", "many splits"])
def test_a_length_out_of_range_makes_its_row_nan(sparse, dtype, multiprocessors, with_value):
    sparse.set_device(multiprocessors)
    named = inputs(dtype, batch=4, kv_heads=1, heads=2, capacity=300)
    named["lengths"] = int32(-1, 300, 301, 0)
    value = named["key"] if with_value else None
    *_, first, second = sparse.score(value=value, **named)
    for made in (first, second):
        assert made[[0, 2]].isnan().all()
        assert not made[[1, 3]].isnan().any()


@every_dtype
def test_poison_outside_the_keys_has_no_effect(sparse, dtype):
    """NaN beyond the length, and in keys that the mask hides from every query."""
    for kind in ("bool", "add"):
        named = inputs(dtype, query_tokens=2, mask=kind, reduce="max")
        named["lengths"] = int32(71, 150)
        named["mask"][1, ..., 3:20] = False if kind == "bool" else -torch.inf
        expected = score(sparse, named)
        named["key"][0, :, 71:] = torch.nan
        named["key"][1, :, 3:20] = torch.nan
        actual = sparse.score(**named)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_dtype
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nan_in_a_key_shows(sparse, dtype, reduce):
    """The softmax of its row and head is NaN; as a plain score it stays alone."""
    named = inputs(dtype, reduce=reduce, query_tokens=2)
    named["key"][1, 0, 40] = torch.nan
    scores, lse = sparse.score(**named)
    assert lse[1, :3].isnan().all()
    assert scores[1, 0, 40].isnan()
    assert scores[1, 0].isnan().all() == (reduce != "logit")
    assert not scores[0].isnan().any()
    assert not scores[1, 1].isnan().any()


@every_dtype
def test_odd_pitches(sparse, dtype):
    named = inputs(dtype, query_tokens=2, head_dim=40)
    expected = sparse.score(**named)
    odd = torch.full((*named["key"].shape[:3], 43), torch.nan, dtype=dtype)
    actual = sparse.score(**{**named, "key": odd[..., :40].copy_(named["key"])})
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_dtype
@pytest.mark.parametrize("seed", [1, 2])
def test_results_do_not_depend_on_the_order_of_threads(sparse, dtype, seed):
    named = inputs(dtype, query_tokens=5, capacity=300, mask="bool")
    expected = sparse.score(**named)
    sparse.set_seed(seed)
    actual = sparse.score(**named)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_refusals_name_the_argument(sparse):
    named = inputs(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"adaptive::score_tokens: workspace must hold \d+"):
        sparse.score(**named, short_workspace=4)
    with pytest.raises(RuntimeError, match=r"adaptive::scored_attention: workspace must hold"):
        sparse.score(**named, value=named["key"], short_workspace=4)
