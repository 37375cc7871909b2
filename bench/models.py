"""Times decoding of a whole model, stock against patched: python -m bench.models [--json OUT].

A Llama-3.2-1B-shaped model with random weights and synthetic KV caches, decoding from each context
length: the cache that ``generate`` makes by default, StaticCache, and the patched model, in turn in
one process and with the same weights. Logits are compared before anything is timed, among each
other and, for a 16-bit model, with the same model in float32. Peak memory is measured in a
process of its own for each variant. About nine minutes on two slow cores.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import adaptive
from adaptive import _native
from bench.llama import (
    SHAPES,
    adopted_cache,
    build,
    dynamic_cache,
    fill,
    kv_bytes,
    static_cache,
    step,
    twin,
)
from bench.machine import read_bandwidth
from bench.memory import measure_memory
from bench.model_rows import POLICIES, agreement, print_row, token_at
from bench.record import Recorder
from bench.timing import WrongResultError, interleave, relative_error, speedup

MAKE_CACHE: dict[str, Callable[..., Any]] = {
    "stock default": dynamic_cache,
    "stock StaticCache": static_cache,
    "patched": adopted_cache,
    "TidalDecode": adopted_cache,
    "Quest": adopted_cache,
    "StreamingLLM": adopted_cache,
}
"""The variants, and how each gets its cache."""

DEFAULT_VARIANTS = ("stock default", "stock StaticCache", "patched")

BASELINE = "stock default"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 2e-2}
"""Largest error of the logits, relative to the largest logit, at which a variant is timed."""

MAX_STEPS = 24
"""Timed steps of a variant at one context, at most: the room that StaticCache is given."""

CONTEXTS = (16384, 32768, 256, 4096, 1024)


@dataclass
class Bench:
    """One model under all its variants."""

    shape: str
    dtype: torch.dtype
    threads: int
    models: dict[str, Any]
    truth: dict[int, Tensor]
    patches: dict[str, Any]
    batch: int = 1

    @property
    def config(self) -> Any:
        """The shape, as transformers describes it."""
        return next(iter(self.models.values())).config

    def measure(self, context: int, budget_s: float) -> dict[str, Any]:
        """Compare, then time, all variants at one context length."""
        began = time.monotonic()
        caches = {
            name: MAKE_CACHE[name](model, context + MAX_STEPS + 8)
            for name, model in self.models.items()
        }
        fill(caches, self.config, context, self.dtype, self.batch)
        logits: dict[str, list[Tensor]] = {name: [] for name in self.models}

        def decode(name: str) -> Callable[[], None]:
            def run() -> None:
                number = len(logits[name])
                token = token_at(number, self.config.vocab_size)
                logits[name].append(
                    step(self.models[name], caches[name], token, context + number, self.batch)
                )

            return run

        steps = {name: decode(name) for name in self.models}
        native_calls = {}
        for name, run in steps.items():
            before = sum(_native.calls().values())
            run()
            native_calls[name] = sum(_native.calls().values()) - before
        for name in self.patches:
            if native_calls[name] == 0:
                raise RuntimeError(f"bench: {name!r} must run the native kernels, got 0 calls")
        truth = self.truth.get(context, next(iter(logits.values()))[0])
        errors = {name: relative_error(seen[0], truth) for name, seen in logits.items()}
        tolerance = TOLERANCE[str(self.dtype).removeprefix("torch.")]
        for name, error in errors.items():
            if error > tolerance and name not in POLICIES:
                raise WrongResultError(
                    f"bench: the logits' relative error of {name!r} must be at most {tolerance}, "
                    f"got {error:.3g}"
                )
        for patched in self.patches.values():
            patched.reset_stats()
        left = max(0.0, budget_s - (time.monotonic() - began))
        timings = interleave(
            steps,
            threads=self.threads,
            repetitions=MAX_STEPS,
            at_most=MAX_STEPS,
            budget_s=left,
        )
        return {
            "model": self.shape,
            "context": context,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "batch": self.batch,
            "kv_bytes": self.batch * kv_bytes(self.config, context, self.dtype),
            "error_against": "float32" if context in self.truth else next(iter(self.models)),
            "variants": {
                name: {
                    "ms": round(timing.median_us / 1e3, 3),
                    "ms_min": round(timing.minimum_us / 1e3, 3),
                    "tokens_per_s": round(self.batch * 1e6 / timing.median_us, 3),
                    "clean": timing.clean,
                    "dropped": timing.dropped,
                    "error": errors[name],
                    "native_calls_per_step": native_calls[name],
                    **agreement(logits[name], next(iter(logits.values()))),
                    **self.split(name),
                }
                for name, timing in timings.items()
            },
            "speedup_over": {
                stock: round(speedup(timings[stock], timings["patched"]), 3)
                for stock in timings
                if stock not in self.patches and "patched" in timings
            },
            "policy_speedup": {
                name: {
                    other: round(speedup(timings[other], timings[name]), 3)
                    for other in timings
                    if other not in POLICIES
                }
                for name in timings
                if name in POLICIES
            },
        }

    def split(self, name: str) -> dict[str, float]:
        """Mean milliseconds of a step in attention, of a patched model."""
        if name not in self.patches:
            return {}
        report = self.patches[name].report()
        seconds = sum(layer.seconds for layer in report.layers)
        return {"attention_ms": round(1e3 * seconds / max(1, report.forward_calls), 3)}


def float32_logits(shape: str, contexts: Sequence[int]) -> dict[int, Tensor]:
    """Logits of the first step in float32, the truth that 16-bit variants are compared with."""
    model = build(shape, torch.float32)
    found = {}
    for context in contexts:
        cache = static_cache(model, context + 8)
        fill({"": cache}, model.config, context, torch.float32)
        found[context] = step(model, cache, token_at(0, model.config.vocab_size), context)
    return found


def run(options: argparse.Namespace, recorder: Recorder, console: Console) -> None:
    """Measure memory first, then every context; one that fails does not stop the others."""
    ends = time.monotonic() + options.budget_s
    dtype = getattr(torch, options.dtype)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # a refreshing thread would preempt what is being timed
    ) as progress:
        variants = options.variants
        total = len(variants) * bool(options.memory_context) + 1 + len(options.contexts)
        task = progress.add_task("", total=total)

        def show(what: str) -> None:
            progress.update(task, description=what)
            progress.refresh()

        show("read bandwidth")
        torch.set_num_threads(options.threads)
        recorder.document["bandwidth_gb_s"] = {
            str(n): read_bandwidth(n) for n in sorted({1, options.threads})
        }
        for name in variants if options.memory_context else ():
            show(f"peak memory: {name}")
            try:
                found = measure_memory(
                    name, options.shape, options.dtype, options.memory_context, options.threads
                )
                recorder.add(found, "memory")
                console.print(
                    f"{name}: decoding at {options.memory_context} tokens peaks at "
                    f"{found['peak_over_kv']:.2f} x the KV bytes above the weights"
                )
            except (RuntimeError, ValueError) as error:
                recorder.fail(f"memory {name}", error)
                console.print(f"[red]memory {name}: {error}")
            progress.advance(task)

        show("float32 truth")
        truth: dict[int, Tensor] = {}
        if options.truth and dtype != torch.float32:
            truth = float32_logits(options.shape, options.contexts)
            gc.collect()
        show("model")
        first = build(options.shape, dtype)
        models = {name: first if name == BASELINE else twin(first) for name in variants}
        ours = [name for name in models if MAKE_CACHE[name] is adopted_cache]
        patches = {n: adaptive.patch(models[n], *POLICIES.get(n, ())) for n in ours}
        bench = Bench(options.shape, dtype, options.threads, models, truth, patches, options.batch)
        progress.advance(task)
        for number, context in enumerate(options.contexts):
            show(f"decoding at {context} tokens")
            weights = [math.sqrt(other) for other in options.contexts[number:]]
            budget_s = max(0.0, ends - time.monotonic()) * weights[0] / sum(weights)
            try:
                row = bench.measure(context, budget_s)
                recorder.add(row)
                print_row(console, row)
            except (WrongResultError, RuntimeError, ValueError, TypeError, MemoryError) as error:
                recorder.fail(f"context {context}", error)
                console.print(f"[red]context {context}: {error}")
            gc.collect()
            progress.advance(task)
        show("done")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(DEFAULT_VARIANTS),
        choices=list(MAKE_CACHE),
        help="default: %(default)s",
    )
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget-s", type=float, default=480.0, help="wall time to aim at")
    parser.add_argument(
        "--memory-context", type=int, default=32768, help="tokens of the memory runs; 0: none"
    )
    parser.add_argument(
        "--no-truth",
        dest="truth",
        action="store_false",
        help="compare with the stock default instead of a float32 model (saves 5 GB)",
    )
    parser.add_argument("--json", type=Path, help="result file, written after every context")
    return parser


def main() -> int:
    """Measure, print, write; 1 if something could not be measured."""
    options = arguments().parse_args()
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("models", options.json, settings)
    with torch.inference_mode():
        run(options, recorder, Console())
    recorder.save()
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
