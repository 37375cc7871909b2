"""Small bugs planted in the CUDA kernels of local attention: these checks must notice each."""

import pytest
import torch
from local_cases import check, inputs, poison
from simulated import ROOT, planted
from simulated_local import LOCAL_SOURCES, Local

SIGHT, KERNEL = "cuda/local_attention.cuh", "cuda/local_attention_kernel.cuh"
PRODUCTS, HOST = "cuda/local_attention_products.cuh", "cuda/local_attention.cu"

MUTANTS = {
    "window one too short": (SIGHT, "p - window + 1)", "p - window + 2)"),
    "one sink too many": (SIGHT, "first + a.sinks, until", "first + a.sinks + 1, until"),
    "sinks beyond causality": (
        SIGHT, "min(first + a.sinks, until)", "min(first + a.sinks, int64_t{last})"),
    "sinks of a new sequence not reached": (
        SIGHT, "far ? sight.end : max(sight.end, sight.sink_end)", "sight.end"),
    "causal bound one too high": (SIGHT, "a.causal ? p + 1 : last", "a.causal ? p + 2 : last"),
    "first token of a sequence in the one before": (SIGHT, "position + 1);", "position);"),
    "window across the start of a sequence": (
        SIGHT, "max(int64_t{first}, p -", "max(int64_t{0}, p -"),
    "padding sees the last sequence": (
        SIGHT, "if (number == 0 || number == a.cuts) return {};", "if (number == 0) return {};"),
    "keys between the sinks and the window loaded": (
        SIGHT, "return (key >= near_begin && key < near_end) ||",
        "return (key >= far_begin && key < near_end) ||"),
    "a step covered whose last key is not": (SIGHT, "step <= all_end - kStep", "step < all_end"),
    "the last step of the reach skipped": (
        SIGHT, "kStep && step < near_end) ||", "kStep && step < near_end - 1) ||"),
    "the first listed block skipped": (
        SIGHT, "near_ = place(reach.near_begin", "near_ = 1 + place(reach.near_begin"),
    "heads with lists of their own folded": (HOST, "(!a.counts || a.lists == a.kv_heads)", "true"),
    "queries of two lists in one block": (
        HOST, "min(tiles, a.block_size / kStep)", "max(tiles, a.block_size / kStep)"),
    "repeated blocks taken": (SIGHT, "block <= (i == 0", "block < (i == 0"),
    "blocks behind the tokens taken": (SIGHT, "block >= blocks;", "block > blocks;"),
    "descending offsets taken": (SIGHT, "cuts[i] < (i == 0 ? 0 : cuts[i - 1])", "cuts[i] < 0"),
    "softcap without its factor": (KERNEL, "p.cap * tanhf(", "p.args.softcap * tanhf("),
    "weights rounded to bfloat16": (PRODUCTS, "low, value[2 * i], value[2 * i + 1]", "low, 0u, 0u"),
    "rows behind the last written": (KERNEL, "if (row >= tile.existing) break;", ""),
    "no barrier before the reach is read": (
        KERNEL, "__syncthreads();\n  plan_steps(", "plan_steps("),
    "no barrier between the tiles": (
        KERNEL, "cp_async_wait<0>();\n    __syncthreads();", "cp_async_wait<0>();"),
    "results read before they are here": (KERNEL, "  __syncwarp();\n  T* out", "  T* out"),
}  # fmt: skip


def cases(dtype):
    """Few small calls that between them touch every mutant."""
    sizes = {"dtype": dtype, "tokens": 200, "query_tokens": 87, "heads": 6, "batch": 1}
    made = [
        inputs(**sizes, window=40, sinks=20, sequences=3),
        inputs(**sizes, window=70, sinks=5),
        inputs(**sizes, window=9, sinks=40, sequences=3, causal=False),
        inputs(**sizes, windows=True, softcap=3.0),
        inputs(**sizes, block_size=16, chosen=9),
        inputs(**sizes, block_size=32, chosen=5, per_head=True, sequences=3),
    ]
    for named in made:
        if named["offsets"] is not None:  # queries in two sequences, then padding
            named["offsets"][:] = torch.tensor([7, 40, 130, 190])
    return made


def broken(dtype):
    """Calls whose head (1, 0) depends on bad data, and what else does."""
    for name, place, value in (
        ("offsets", (1, 0), 80), ("offsets", (1, 2), 151), ("indices", (1, 0, 0, 3), 4),
        ("indices", (1, 0, 0, 4), 10), ("counts", (1, 0, 0), 6), ("windows", 0, 0),
    ):  # fmt: skip
        lists = {"block_size": 16, "chosen": 5} if name in ("indices", "counts") else {}
        windows = name == "windows"
        named = inputs(dtype, tokens=150, query_tokens=16, sequences=2, windows=windows, **lists)
        named["offsets"][:] = torch.tensor([0, 70, 150])
        if lists:
            named["indices"][:] = torch.tensor([0, 2, 4, 5, 9])
            named["counts"][:] = 5
        named[name][place] = value
        rows, heads = slice(0 if windows else 1, 2), 1 if windows else 2 if lists else 4
        yield named, (rows, slice(heads))


def caught(local, dtype):
    """Whether any check fails: a simulator report, a wrong number, or bits that depend on order."""
    try:
        for named in cases(dtype):
            poison(named)
            results = []
            for seed, multiprocessors in ((0, 1), (1, 1), (1, 100)):
                local.set_seed(seed)
                local.set_device(multiprocessors)
                around = torch.full((1, 6, 100, 64), 7.0, dtype=dtype)
                out = around[:, :, :87]
                results.append(check(lambda out=out, **n: local(**n, out=out), named))
                assert (around[:, :, 87:] == 7).all()
            assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
        for named, bad in broken(dtype):
            out, lse = local(**named)
            expected = torch.zeros_like(lse)
            expected[bad] = torch.nan
            assert torch.equal(lse.isnan(), expected.isnan())
            assert torch.equal(out.isnan().all(-1), expected.isnan())
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_real_kernels_pass(local, dtype):
    assert not caught(local, dtype)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, local_objects, tmp_path, name):
    file, old, new = MUTANTS[name]
    source = file if file == HOST else "cuda/local_attention_mma.cu"
    pairs = zip(LOCAL_SOURCES, local_objects, strict=True)
    kept = [made for path, made in pairs if path != ROOT / "csrc" / source]
    mutant = planted(tmp_path / "csrc", source, file, old, new)
    # One element type, which compiles faster.
    mutant.write_text(mutant.read_text().replace("simt::float16, D>", "simt::bfloat16, D>"))
    local = Local(builder.library(*builder.objects(mutant), *kept))
    assert caught(local, torch.bfloat16)
