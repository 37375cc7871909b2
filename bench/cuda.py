"""The GPU side of bench.ops: every op against its stock forms, and FlashInfer where installed."""

import importlib.util
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from bench.record import Recorder
from bench.timing import TOLERANCE, Timing, WrongResultError, prove, speedup

if TYPE_CHECKING:
    from bench.ops import Cell

GIB = 1 << 30
REPETITIONS = 31
PAGE = 64
FLASHINFER = "FlashInfer"


def time_cuda(variants: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
    """Time ``variants`` in turn with events, the L2 cache flushed before each repetition.

    The flush writes a gibibyte, which takes the GPU longer than the host needs to enqueue the
    events and the variant, so that no launch latency is timed.
    """
    flush = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    rounds: dict[str, dict[int, float]] = {name: {} for name in variants}
    for turn in range(REPETITIONS):
        for name, run in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            rounds[name][turn] = start.elapsed_time(end) * 1e3
    return {name: Timing(times, len(times), 0) for name, times in rounds.items()}


def copy_bandwidth() -> tuple[float, str]:
    """GB/s, read plus written, of a large device copy, and the library that made it."""
    if importlib.util.find_spec("cupy"):
        import cupy

        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        source, target = (cupy.arange(GIB // 4, dtype=cupy.int32) for _ in range(2))

        def copy() -> None:
            with stream:
                cupy.copyto(target, source)

        maker = "cupy"
    else:
        words: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        source, target = (torch.arange(GIB // 4, **words) for _ in range(2))

        def copy() -> None:
            target.copy_(source)

        maker = "torch"
    copy()
    torch.cuda.synchronize()
    times = time_cuda({"copy": copy})["copy"].rounds.values()
    return 2 * GIB / (median(times) * 1e3), maker


def flashinfer_decode(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """FlashInfer's paged batch decode on a paged copy of the same cache, planned beforehand."""
    import flashinfer

    batch, kv_heads, capacity, head_dim = key.shape
    pages = capacity // PAGE

    def paged(cache: Tensor) -> Tensor:
        split = cache.view(batch, kv_heads, pages, PAGE, head_dim).transpose(1, 2)
        return split.reshape(batch * pages, kv_heads, PAGE, head_dim)

    cache = (paged(key), paged(value))
    index: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(0, batch * pages + 1, pages, **index),
        torch.arange(batch * pages, **index),
        torch.full((batch,), PAGE, **index),
        query.shape[1],
        kv_heads,
        head_dim,
        PAGE,
        q_data_type=query.dtype,
        kv_data_type=key.dtype,
    )
    rows = query[:, :, 0].contiguous()
    return lambda: wrapper.run(rows, cache).unsqueeze(2)


def run_cuda(cells: Sequence["Cell"], recorder: Recorder, console: Console) -> None:
    """Measure every cell on the current GPU; one that fails does not stop the others."""
    ceiling, maker = copy_bandwidth()
    recorder.document["copy_bandwidth_gb_s"] = {"value": round(ceiling, 1), "measured_with": maker}
    console.print(f"copy bandwidth ({maker}): {ceiling:.0f} GB/s")
    for cell in cells:
        try:
            row = measure(cell, ceiling)
        except (WrongResultError, RuntimeError, ValueError, TypeError) as error:
            recorder.fail(cell.label, error)
            console.print(f"[red]{cell.label}: {error}")
            continue
        recorder.add(row)
        console.print(row, soft_wrap=True)


def _kind(cell: "Cell", name: str) -> str:
    if name in cell.suite.beside:
        return "beside"
    if name in cell.suite.forms:
        return "stock"
    return "peer" if name == FLASHINFER else "native"


def measure(cell: "Cell", ceiling: float) -> dict[str, Any]:
    """Prove and time one cell."""
    arguments = cell.op.make_inputs(**cell.sizes, dtype=getattr(torch, cell.dtype), device="cuda")
    variants: dict[str, Callable[[], Tensor]] = {
        "adaptive": lambda: cell.suite.pick(cell.op(*arguments))
    }
    for name, form in cell.suite.forms.items():
        variants[name] = lambda form=form: form(*arguments)
    stock = set(cell.suite.forms)
    if cell.op.name == "decode_attention" and importlib.util.find_spec("flashinfer"):
        variants[FLASHINFER] = flashinfer_decode(*arguments[:3])
    truth = cell.suite.truth(*arguments)
    errors = prove(variants, truth, TOLERANCE[cell.dtype])
    for name, form in cell.suite.beside.items():
        variants[name] = lambda form=form: form(*arguments)
    timings = time_cuda(variants)
    best = min(stock, key=lambda name: timings[name].median_us)
    moved_bytes = cell.suite.moved(arguments, truth)
    found = {}
    for name, timing in timings.items():
        speed = moved_bytes / (timing.median_us * 1e3)
        found[name] = {
            "kind": _kind(cell, name),
            **timing.to_dict(),
            "gb_s": round(speed, 1),
            "share": round(speed / ceiling, 3),
            "error": errors.get(name),
        }
    return {
        "op": cell.op.name,
        "sizes": cell.sizes,
        "dtype": cell.dtype,
        "threads": 0,
        "moved_bytes": moved_bytes,
        "variants": found,
        "best_stock": best,
        "ratio_to_best_stock": {
            name: round(speedup(timings[best], timing), 3) for name, timing in timings.items()
        },
    }
