"""Small bugs planted in the CUDA kernels: the checks of this folder must notice each of them."""

import pytest
import torch
from simulated import ROOT, SOURCES, Simulated, assert_close, planted

MMA, FMA = "cuda/decode_attention_mma.cuh", "cuda/decode_attention_fma.cuh"
SHARED, RING, MERGE = "cuda/decode_attention.cuh", "cuda/key_ring.cuh", "cuda/plan.cu"

MUTANTS = {
    "no barrier after the wait for a stage": (
        MMA, "wait(plan);\n    __syncthreads();", "wait(plan);"),
    "no barrier after the query": (
        MMA, "share, staged);\n  __syncthreads();", "share, staged);"),
    "no barrier before the ring is reused": (
        MMA, "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();"),
    "no barrier before the warps are merged": (
        MMA, "tile * kTileRows);\n  __syncthreads();", "tile * kTileRows);"),
    "too few stages waited for": (
        RING, "default: return simt::cp_async_wait<2>", "default: return simt::cp_async_wait<3>"),
    "causal bound one too low": (SHARED, "row.token + 1 -", "row.token -"),
    "causal bound one too high": (SHARED, "row.token + 1 -", "row.token + 2 -"),
    "causality ignored inside a tile": (RING, "(p.args.causal ?", "(false ?"),
    "last key skipped": (SHARED, "if (key >= limit)", "if (key >= limit - 1)"),
    "rows past the length loaded": (
        RING, "first + r < share.end ?", "first + r <= share.end ?"),
    "wrong group": (SHARED, "kv_head * group + index", "kv_head + group - group + index"),
    "output not rescaled": (MMA, "rows.out[c][i] *= scale[i / 2]", "rows.out[c][i] *= 1.0f"),
    "sum not rescaled": (MMA, "rows.sum[i] *= scale[i];", ""),
    "weights rounded to bfloat16": (
        MMA, "simt::mma_m16n8k16<T>(rows.out[2 * c + i], low, first, second);", ""),
    "hidden values multiplied": (
        MMA, "if (keys.may_hide(p, share, first)) weighted_keys(p_tile, keep);", ""),
    "length not checked": (SHARED, "valid = length >= 0 && length <= a.capacity;", "valid = true;"),
    "empty splits merged": (MERGE, "if (sums[s] == 0.0f) continue;", ""),
    "splits merged without their maxima": (
        MERGE, "const float factor = weight(maxima[s], top);", "const float factor = 1.0f;"),
    "scores read before they are written": (
        FMA, "(P::kValues) {\n      __syncthreads();", "(P::kValues) {"),
    "weights overwritten while in use": (
        FMA, "wait(plan);\n    __syncthreads();", "wait(plan);"),
}  # fmt: skip


def cases(dtype):
    """Few small calls that between them touch every mutant."""
    generator = torch.Generator().manual_seed(1)

    def tensors(group, query_tokens, capacity):
        sizes = ((2, 2 * group, query_tokens, 64), (2, 2, capacity, 64), (2, 2, capacity, 64))
        return [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    hidden = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    hidden[:, ..., 90:100] = False
    poisoned = tensors(2, 1, 200)
    for tensor in poisoned[1:]:
        tensor[0, :, 77:] = torch.nan
        tensor[1, :, 90:100] = torch.nan
    lengths = torch.tensor([77, 200], dtype=torch.int32)
    return [
        (tensors(3, 5, 144), {}),
        (poisoned, {"lengths": lengths, "mask": hidden}),
        ([t[:1] for t in poisoned], {"lengths": lengths[:1]}),
        (tensors(1, 1, 320), {"lengths": torch.tensor([320, 60], dtype=torch.int32)}),
    ]


def caught(decode, dtype):
    """Whether any check fails: a simulator report, a wrong number, or bits that depend on order."""
    try:
        for multiprocessors in (1, 24):
            decode.set_device(multiprocessors)
            for tensors, options in cases(dtype):
                results = []
                for seed in (0, 1):
                    decode.set_seed(seed)
                    results.append(decode(*tensors, **options))
                clean = [t.nan_to_num(0.0) for t in tensors]  # the formula multiplies hidden values
                assert_close(*results[0], *clean, **options)
                assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        tensors, _ = cases(dtype)[0]
        out, _ = decode(*tensors, lengths=torch.tensor([-1, 145], dtype=torch.int32))
        assert out.isnan().all()
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.fixture
def plant(builder, objects, tmp_path):
    """Compiles decode_attention with one text replaced by another."""

    def plant(file, old, new):
        source = {MERGE: MERGE, FMA: "cuda/decode_attention.cu"}.get(
            file, "cuda/decode_attention_mma.cu"
        )
        kept = [o for s, o in zip(SOURCES, objects, strict=True) if s != ROOT / "csrc" / source]
        mutant = planted(tmp_path / "csrc", source, file, old, new)
        return Simulated(builder.library(*builder.objects(mutant), *kept))

    return plant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_real_kernels_pass(decode, dtype):
    assert not caught(decode, dtype)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(plant, name):
    file = MUTANTS[name][0]
    decode = plant(*MUTANTS[name])
    assert caught(decode, torch.float32 if file in (MERGE, FMA) else torch.bfloat16)
