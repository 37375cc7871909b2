"""Times drafts by less of an LM head: python -m bench.speculation_head [--json OUT].

A Llama-3.2-1B-shaped model with random weights drafts with its head as it is, with the first
quarter of the vocabulary, with an int8 copy, and with both. Drafts are accepted by the same coin in
all, so that what differs is the time: CPU time on one thread, which neighbours cannot inflate.
Variants take turns in one process.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import adaptive
from adaptive.layers import hf_steps
from bench.llama import build
from bench.record import Recorder
from bench.speculation import SHAPE_EXIT, calls, coin
from bench.timing import interleave, speedup

Policy = adaptive.SelfSpeculative


def heads(vocab: int) -> dict[str, dict[str, Any]]:
    """Fields of the policy for each form of the head."""
    return {
        "whole": {},
        "quarter": {"draft_vocabulary": vocab // 4},
        "int8": {"draft_head": "int8"},
        "int8 quarter": {"draft_vocabulary": vocab // 4, "draft_head": "int8"},
    }


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """One row for each number of drafts."""
    model = build("llama-3.2-1b", torch.bfloat16)
    ids = torch.arange(3, 35)[None]
    forms = heads(model.config.vocab_size)
    for draft in options.drafts:
        policies: dict[str, Policy | None] = {"exact": None}
        for name, fields in forms.items():
            policies[name] = Policy(exit_layer=SHAPE_EXIT, draft=draft, **fields)
        runs, logs = calls(model, ids, options.tokens, policies)

        def tossing(run: Any) -> Any:
            def call() -> Any:
                with coin(options.accepted):  # the same tosses for every variant
                    return run()

            return call

        tossed = {name: tossing(run) for name, run in runs.items()}
        for run in tossed.values():  # copies are made, the rest is warm
            run()
        timings = interleave(
            tossed,
            threads=options.threads,
            repetitions=options.repetitions,
            at_least=options.repetitions,
            budget_s=options.budget_s,
        )
        rows: dict[str, Any] = {}
        for name in forms:
            timing, log = timings[name], logs[name]
            drafted = log.drafted + log.dropped
            rows[name] = {
                "ms": round(timing.median_us / 1e3, 1),
                "clean": timing.clean,
                "speedup": round(speedup(timings["exact"], timing), 3),
                "against_whole": round(speedup(timings["whole"], timing), 3),
                "tokens_per_s": round(options.tokens / (timing.median_us / 1e6), 2),
                "draft_ms": round(1e3 * log.draft_seconds / max(drafted, 1), 2),
                "verify_ms": round(1e3 * log.verify_seconds / max(log.steps, 1), 2),
                "steps": log.steps,
                "acceptance": log.acceptance and round(log.acceptance, 3),
                "head_bytes": log.draft_head_bytes,
            }
            print(f"{draft} drafts, {name}: {rows[name]}", flush=True)
        recorder.add(
            {"what": "head", "text": f"{options.accepted}", "batch": 1, "draft": draft}
            | {"exit_layer": SHAPE_EXIT, "variants": rows}
            | {"exact_ms": round(timings["exact"].median_us / 1e3, 1)}
        )


def main() -> int:
    """Measure, print, write; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.speculation_head", description=__doc__)
    add = parser.add_argument
    add("--drafts", nargs="+", type=int, default=[4, 2])
    add("--accepted", type=float, default=0.8, help="share of drafts that the coin accepts")
    add("--tokens", type=int, default=16, help="tokens to generate")
    add("--repetitions", type=int, default=2)
    add("--threads", type=int, default=1)
    add("--budget-s", type=float, default=60.0, help="wall time for each number of drafts")
    add("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.threads == 1:
        setattr(hf_steps, "perf_counter", time.thread_time)  # noqa: B010
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("speculation_head", options.json, settings)
    try:
        measure(options, recorder)
    except (RuntimeError, ValueError, MemoryError) as error:
        recorder.fail("head", error)
        print(error, file=sys.stderr)
    recorder.save()
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
