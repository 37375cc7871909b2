"""Times every op against its stock PyTorch forms: python -m bench.ops [--device cuda] [--json OUT].

Each form first proves itself against float64; then all forms take turns in this process with
cold caches. Prints microseconds, GB/s, share of the read bandwidth measured in the same run, the
relative error, and the ratio to the fastest stock form. About six minutes on two slow cores.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from adaptive import _native
from adaptive.cpu_level import LEVELS
from adaptive.ops import OPS, Op
from bench.machine import last_level_cache_bytes, read_bandwidth
from bench.overhead import call_overhead
from bench.record import Recorder
from bench.stock import Sizes, Suite, first, suite_for
from bench.timing import TOLERANCE, WrongResultError, cache_flusher, interleave, prove, speedup

OWN_LEVELS = {
    "avx512_bf16": (
        *("skinny_linear", "exit_confidence", "prefix_row_ffn"),
        *("decode_attention", "gather_attention", "tree_attention"),
        *("score_tokens", "scored_attention"),
    )
}
"""Levels at which only some ops have kernels of their own."""


@dataclass(frozen=True)
class Cell:
    """One op at one size and dtype; measured at each number of threads."""

    op: Op[..., Any]
    suite: Suite
    sizes: Sizes
    dtype: str

    @property
    def weight(self) -> float:
        """Share of the time that it gets: a larger cell needs more, but not in proportion."""
        return math.sqrt(math.prod(n for n in self.sizes.values() if isinstance(n, int)))

    @property
    def label(self) -> str:
        """Short name for people."""
        return f"{self.op.name} {self.dtype} " + " ".join(f"{k}={v}" for k, v in self.sizes.items())


@dataclass
class Bench:
    """What the cells of one CPU run share."""

    recorder: Recorder
    threads: Sequence[int]
    ends: float
    bandwidth: dict[int, float] = field(default_factory=dict)
    flush: Callable[[], object] = field(
        default_factory=lambda: cache_flusher(2 * last_level_cache_bytes())
    )

    def measure(self, cell: Cell, budget_s: float) -> Iterator[dict[str, Any]]:
        """Prove and time one cell, one row per number of threads."""
        arguments = cell.op.make_inputs(
            **cell.sizes, dtype=getattr(torch, cell.dtype), device="cpu"
        )
        if cell.suite.place is not None:
            arguments = cell.suite.place(*arguments)
        truth = cell.suite.truth(*arguments)
        moved_bytes = cell.suite.moved(arguments, truth)
        for threads in self.threads:
            torch.set_num_threads(threads)
            variants = self._variants(cell, arguments, threads)
            began = time.monotonic()
            errors = prove(variants, truth, TOLERANCE[cell.dtype])
            for name, form in cell.suite.beside.items():
                variants[name] = _at_level(form, arguments, _native.best_cpu_level())
            left = max(0.0, budget_s / len(self.threads) - (time.monotonic() - began))
            timings = interleave(
                variants, threads=threads, budget_s=left, at_least=3, before=self.flush
            )
            row: dict[str, Any] = {
                "op": cell.op.name,
                "sizes": cell.sizes,
                "dtype": cell.dtype,
                "threads": threads,
                "moved_bytes": moved_bytes,
                "variants": {},
            }
            for name, timing in timings.items():
                speed = moved_bytes / (timing.median_us * 1e3)
                row["variants"][name] = {
                    "kind": _kind(cell.suite, name),
                    **timing.to_dict(),
                    "gb_s": round(speed, 3),
                    "share": round(speed / self.bandwidth[threads], 3),
                    "error": errors.get(name),
                }
            stock = [name for name in timings if name in cell.suite.forms]
            best = min(stock, key=lambda name: timings[name].median_us)
            row["best_stock"] = best
            row["ratio_to_best_stock"] = {
                name: round(speedup(timings[best], timings[name]), 3) for name in timings
            }
            yield row

    def _variants(
        self, cell: Cell, arguments: tuple[Any, ...], threads: int
    ) -> dict[str, Callable[[], Tensor]]:
        best = LEVELS.index(_native.best_cpu_level())
        name = cell.op.name
        own = [n for n in LEVELS[: best + 1] if name in OWN_LEVELS.get(n, (name,))]
        levels = own[::-1] if threads == 1 else own[-1:]
        pick = cell.suite.pick
        variants = {
            f"adaptive {level}": _at_level(cell.op, arguments, level, pick) for level in levels
        }
        for name, form in cell.suite.forms.items():
            if threads == 1 or name not in cell.suite.single_thread_only:
                variants[name] = lambda form=form: form(*arguments)
        return variants


def _at_level(
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    level: str,
    pick: Callable[[Any], Tensor] = first,
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        _native.set_cpu_level(level)
        return pick(op(*arguments))

    return run


def _kind(suite: Suite, name: str) -> str:
    if name in suite.beside:
        return "beside"
    return "stock" if name in suite.forms else "native"


def cells(options: argparse.Namespace) -> list[Cell]:
    """Everything to measure, the most wanted first: sizes by sweep, then dtypes."""
    found = []
    for name, op in sorted(OPS.items()):
        whole = suite_for(op)
        for suite in (whole, *whole.others):
            sweep = suite.cuda_sweep if options.device == "cuda" else suite.sweep
            for sizes, dtype in product(sweep or op.models, options.dtype):
                wanted = (
                    options.tokens is None
                    or sizes.get("capacity", sizes.get("tokens")) in options.tokens
                ) and (options.group is None or sizes.get("group", 0) in options.group)
                if (options.op is None or name in options.op) and wanted:
                    found.append(Cell(op, suite, sizes, dtype))
    return found


def print_row(console: Console, row: dict[str, Any]) -> None:
    """One line per variant, the error beside the speed."""
    sizes = " ".join(f"{k}={v}" for k, v in row["sizes"].items())
    console.print(
        f"\n{row['op']} {row['dtype']} {sizes} threads={row['threads']}",
        style="bold",
        soft_wrap=True,
    )
    for name, v in row["variants"].items():
        share = f"{v['share']:6.0%}" if "share" in v else " " * 6
        error = "another result" if v["error"] is None else f"error {v['error']:.1e}"
        console.print(
            f"  {name:22} {v['us']:11.1f} us  {v['gb_s']:7.2f} GB/s {share}  {error}"
            f"  {row['ratio_to_best_stock'][name]:6.2f}x best stock"
            f"  ({v['clean']} clean, {v['dropped']} dropped)",
            highlight=False,
            soft_wrap=True,
        )


def run_cpu(options: argparse.Namespace, recorder: Recorder, console: Console) -> None:
    """Measure all cells; one that fails is noted and does not stop the others."""
    todo = cells(options)
    bench = Bench(recorder, options.threads, time.monotonic() + options.budget_s)
    level_before = _native.cpu_level()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # a refreshing thread would preempt what is being timed
    ) as progress:
        task = progress.add_task("bandwidth, call overhead", total=len(todo))
        progress.refresh()
        bench.bandwidth = {n: read_bandwidth(n) for n in options.threads}
        recorder.document["bandwidth_gb_s"] = {str(n): b for n, b in bench.bandwidth.items()}
        recorder.document["overhead"] = overhead = call_overhead()
        for name, costs in overhead.items():
            for inputs, ways in costs.items():
                text = ", ".join(f"{way} {ns:.0f}" for way, ns in ways.items())
                console.print(f"{name} on {inputs} inputs, ns per call: {text}", soft_wrap=True)
        for number, cell in enumerate(todo):
            progress.update(task, description=cell.label)
            progress.refresh()
            left = sum(other.weight for other in todo[number:])
            budget_s = max(0.0, bench.ends - time.monotonic()) * cell.weight / left
            try:
                for row in bench.measure(cell, budget_s):
                    recorder.add(row)
                    print_row(console, row)
            except (WrongResultError, RuntimeError, ValueError, TypeError, MemoryError) as error:
                recorder.fail(cell.label, error)
                console.print(f"[red]{cell.label}: {error}")
            progress.advance(task)
        progress.update(task, description="done")
    _native.set_cpu_level(level_before)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--op", nargs="+", choices=sorted(OPS), help="these ops (default: all)")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], choices=sorted(TOLERANCE)
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="only these cache capacities")
    parser.add_argument("--group", nargs="+", type=int, help="only int8 weights in these groups")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()})
    )
    parser.add_argument("--budget-s", type=float, default=310.0, help="wall time to aim at")
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    return parser


def main() -> int:
    """Measure, print, write; 1 if something could not be measured."""
    options = arguments().parse_args()
    console = Console()
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("ops", options.json, settings)
    with torch.inference_mode():
        if options.device == "cuda":
            from bench.cuda import run_cuda

            run_cuda(cells(options), recorder, console)
        else:
            run_cpu(options, recorder, console)
    recorder.save()
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
