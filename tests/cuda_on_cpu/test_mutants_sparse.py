"""Small bugs planted in the CUDA ops of sparse selection: these checks must notice each of them."""

import pytest
import torch
from simulated import ROOT, planted
from simulated_sparse import SPARSE_SOURCES, Sparse

from adaptive.ops import gather_attention, score_tokens, sum_tokens

LIST, LIST_SOURCE = "cuda/gather_attention.cuh", "cuda/gather_attention_mma.cu"
SCORE, SUM = "cuda/score_tokens.cu", "cuda/sum_tokens.cu"
LOGITS, LOGITS_SOURCE = "cuda/score_tokens.cuh", "cuda/score_tokens_mma.cu"
SOURCE = {LIST: LIST_SOURCE, LOGITS: LOGITS_SOURCE}

MUTANTS = {
    "no barrier after the first tiles": (
        LIST, "tile_keys);\n    }\n    __syncthreads();", "tile_keys);\n    }"),
    "no barrier before a failure": (LIST, "    __syncthreads();  // none", "    // none"),
    "negative entries followed": (LIST, "page_ < 0 ||", ""),
    "entries behind the cache followed": (LIST, "page_ >= p.pages ||", ""),
    "duplicates taken": (LIST, "page_ <= list(", "page_ < list("),
    "the first entry of a split not compared": (
        LIST, "(entry > 0 &&", "(slot > share.begin &&"),
    "keys beyond the length taken": (LIST, "if (position >= share.length)", "if (false)"),
    "count not checked": (LIST, "count >= 0 && count <= p.chosen", "true"),
    "entries of the tile before": (LIST, "page_ = look(p, share, first);", ""),
    "too few slots published": (LIST, "kSlots = 512;", "kSlots = 128;"),
    "pages not added up": (LIST, "(slot & ((1 << p.page_bits) - 1))", "0"),
    "extra tokens under the mask": (
        LIST, "return add_bias(score, biases()", "return sight(p.args, score, 0) + (biases()"),
    "extra tokens without bias": (
        LIST, "i < p.extra ? from[i * p.extra_bias_stride[2]]", "i < p.extra ? 0.0f * from[i]"),
    "hidden extra values multiplied": (
        LIST, "return p.args.mask || is_extra(p, share, first);", "return p.args.mask;"),
    "last extra token skipped": (LIST, "if (slot < share.end) position",
        "if (slot < share.end - 1) position"),
    "scores of the wrong row": (LOGITS, "to + 8 * j) = {scores[j][2 * i]",
        "to + 8 * j) = {scores[j][2 - 2 * i]"),
    "unseen keys weigh 0": (SCORE, "if (logit == -kInfinity) return made;", ""),
    "maximum instead of sum": (SCORE, "kReduce == Reduce::kSum) return", "false) return"),
    "NaN lost": (SCORE, "x > made || x != x ?", "x > made ?"),
    "scores of a row of bad length": (SCORE, "if (length < 0 ||", "if ("),
    "wrong batch": (SCORE, "r.lengths[head / r.kv_heads]", "r.lengths[0]"),
    "sums read before they are written": (
        SUM, "    __syncthreads();\n    for (int i", "    for (int i"),
    "failure cleared late": (SUM, "failed = 0;\n  __syncthreads();", "failed = 0;"),
    "last token skipped": (SUM, "if (entry >= end) continue;", "if (entry + 1 >= end) continue;"),
    "duplicates summed": (SUM, "token <= previous", "token < previous"),
}  # fmt: skip

GATHER = (
    "query", "key", "value", "indices", "counts", "lengths", "mask",
    "extra_key", "extra_value", "extra_bias", "scale", "softcap", "causal", "page_size",
)  # fmt: skip
SCORES = ("query", "key", "lengths", "mask", "scale", "softcap", "causal", "reduce")
SIZES = {"batch": 2, "heads": 6, "kv_heads": 2, "capacity": 300, "head_dim": 64}


def twice(sparse, call):
    """What `call` returns, after it gave the same bits under another order of threads."""
    results = []
    for seed in (0, 1):
        sparse.set_seed(seed)
        made = call()
        results.append(made if isinstance(made, tuple) else (made,))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return results[0]


def close(made, expected):
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def gather_checks(sparse, dtype):
    options = {"dtype": dtype, "device": "cpu"}
    for more in (
        {"chosen": 280, "extra": 5, "mask": "bool"},
        {"chosen": 30, "page_size": 8, "ragged": True, "query_tokens": 3, "extra": 2},
    ):
        given = dict(
            zip(GATHER, gather_attention.make_inputs(**SIZES, **more, **options), strict=True)
        )
        if "ragged" in more:
            given["lengths"] = torch.tensor([0, 77], dtype=torch.int32)
            for tensor in (given["key"], given["value"]):
                tensor[0] = tensor[1, :, 77:] = torch.nan
        close(
            twice(sparse, lambda given=given: sparse.gather(**given)),
            gather_attention.reference(**given),
        )
    drawn = gather_attention.make_inputs(**SIZES, chosen=280, extra=3, **options)
    given = dict(zip(GATHER, drawn, strict=True))
    given["extra_bias"][:, :, 1] = -torch.inf
    given["extra_value"][:, :, 1] = torch.nan
    assert not sparse.gather(**given)[0].isnan().any()
    given["counts"][:] = 280
    for at in (0, 64, 128, 200, 279):
        for entry in (-1, 300, 2**31 - 1, None):
            indices = given["indices"].clone()
            indices[1, 1, at] = indices[1, 1, max(at - 1, 0)] if entry is None else entry
            out, lse = twice(sparse, lambda i=indices: sparse.gather(**{**given, "indices": i}))
            bad = at > 0 or entry is not None
            assert lse[1, 3:].isnan().all() == bad
            assert out[1, 3:].isnan().all() == bad
            assert not lse[0].isnan().any()
    for count in (-1, 281):
        given["counts"][0, 0] = count
        assert sparse.gather(**given)[1][0, :3].isnan().all()


def score_checks(sparse, dtype):
    for reduce in ("sum", "max", "logit"):
        more = {"query_tokens": 2, "reduce": reduce, "mask": "bool", "ragged": True}
        given = score_tokens.make_inputs(**SIZES, **more, dtype=dtype, device="cpu")
        named = dict(zip(SCORES, given, strict=True))
        close(twice(sparse, lambda n=named: sparse.score(**n)), score_tokens.reference(*given))
        named["lengths"] = torch.tensor([300, -1], dtype=torch.int32)
        scores, _ = sparse.score(**named)
        assert scores[1].isnan().all()
        assert not scores[0].isnan().any()
        named |= {"lengths": None, "mask": None}
        named["query"][0, 1, 1] = torch.nan
        assert sparse.score(**named)[0][0, 0].isnan().all()


def sum_checks(sparse, dtype):
    sizes = {**SIZES, "chosen": 250}
    given = sum_tokens.make_inputs(**sizes, dtype=dtype, device="cpu")
    close(twice(sparse, lambda: sparse.sum(*given)), (sum_tokens.reference(*given),))
    source, indices, counts = given
    counts[:] = 250
    indices[1, 1, 9] = indices[1, 1, 8]
    (sums,) = twice(sparse, lambda: sparse.sum(source, indices, counts))
    assert sums.isnan().all(-1).tolist() == [[False, False], [False, True]]


CHECKS = {LIST: gather_checks, LOGITS: score_checks, SCORE: score_checks, SUM: sum_checks}


def caught(sparse, file):
    """Whether any check fails: a simulator report, a wrong number, or bits that depend on order."""
    dtype = torch.float32 if file in (SCORE, SUM) else torch.bfloat16
    try:
        for multiprocessors in (1, 24):
            sparse.set_device(multiprocessors)
            CHECKS[file](sparse, dtype)
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("file", CHECKS)
def test_the_real_kernels_pass(sparse, file):
    assert not caught(sparse, file)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, objects, sparse_objects, tmp_path, name):
    file, old, new = MUTANTS[name]
    source = SOURCE.get(file, file)
    pairs = zip(SPARSE_SOURCES, sparse_objects, strict=True)
    kept = [made for path, made in pairs if path != ROOT / "csrc" / source]
    mutant = planted(tmp_path / "csrc", source, file, old, new)
    sparse = Sparse(builder.library(*builder.objects(mutant), *kept, *objects))
    assert caught(sparse, file)
