"""Times the search for skip sets against the exact path: python -m bench.skip_search [--json OUT].

The lab model on three kinds of text. "search": a search that starts from nothing with each call,
its time included, with another seed each time; "draws alone": the same without the Gaussian
process; "found sets": what a search over several calls found, given as ready sets; "every second
layer": SWIFT's first candidate, not searched at all. Where no number of drafts is named it follows
what pays. Every call's tokens are proved equal to those of the exact path.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import adaptive
from adaptive.layers.skip_search import SkipSearch
from bench.record import Recorder
from bench.speculation import LAB, PAD, texts
from bench.timing import interleave, speedup

SEARCH = adaptive.SelfSpeculative(skip="search")
EVERY_SECOND = adaptive.SelfSpeculative(skip=((1, 3, 5), (1, 3, 5)), draft=6)
CALLS = 4
"""Calls of `generate` in which the ready sets are found."""


def calls(
    model: Any, ids: Tensor, tokens: int, policies: dict[str, adaptive.SelfSpeculative | None]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, list[Any]]]:
    """A function per variant that generates, and the logs of all its calls."""
    logs: dict[str, list[Any]] = {name: [] for name in policies}

    def make(name: str, policy: adaptive.SelfSpeculative | None) -> Callable[[], Tensor]:
        own = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the same weights
        own.generation_config.eos_token_id = None
        patched = adaptive.patch(own, *([policy] if policy else []))
        record, seeds = patched._record, itertools.count()

        def run() -> Tensor:
            patched.reset_stats()
            if policy is not None and policy.searches:
                sets = policy.candidates(record.plan)
                options = {"bayes_every": None} if name == "draws alone" else {}
                record.skip_search = SkipSearch(*sets, seed=next(seeds), **options)
            made = generate(own, ids, tokens)
            logs[name].append(patched.report().speculation)
            return made

        return run

    return {name: make(name, policy) for name, policy in policies.items()}, logs


def generate(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """Greedy tokens after a prompt."""
    made: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=PAD,
    )
    return made


def find(model: Any, ids: Tensor, tokens: int) -> tuple[Any, list[Any]]:
    """The sets that a search over several calls finds, and the log of each call."""
    own = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    own.generation_config.eos_token_id = None
    logs: list[Any] = []
    with adaptive.patch(own, SEARCH) as patched:
        for _ in range(CALLS):
            patched.reset_stats()
            generate(own, ids, tokens)
            logs.append(patched.report().speculation)
    return logs[-1].search, logs


def measure(model: Any, ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Prove the tokens equal, then time all variants in turn.

    Raises:
        RuntimeError: A variant makes other tokens.
    """
    found, searched = find(model, ids, options.tokens)
    policies: dict[str, adaptive.SelfSpeculative | None] = {
        "exact": None,
        "search": SEARCH,
        "draws alone": SEARCH,
        "found sets": adaptive.SelfSpeculative(skip=found.skip),
        "found sets, 6 drafts": adaptive.SelfSpeculative(skip=found.skip, draft=6),
        "every second layer, 6 drafts": EVERY_SECOND,
    }
    runs, logs = calls(model, ids, options.tokens, policies)
    want = runs["exact"]()

    def checked(name: str) -> None:
        if not torch.equal(runs[name](), want):
            raise RuntimeError(f"bench: {name!r} must make the tokens of the exact path")

    proved: dict[str, Callable[[], object]] = {
        name: lambda name=name: checked(name)  # type: ignore[misc]
        for name in runs
    }
    for run in proved.values():
        run()
    timings = interleave(
        proved, threads=options.threads, repetitions=options.repetitions, budget_s=options.budget_s
    )
    variants = {name: _row(timings, name, logs[name][1:]) for name in runs}
    return {
        "found": {"skip": found.skip, "matchness": found.matchness, "finished": found.finished},
        "candidates_by_call": [log.candidates for log in searched],
        "variants": variants,
    }


def _row(timings: Any, name: str, logs: list[Any]) -> dict[str, Any]:
    timing = timings[name]
    row: dict[str, Any] = {
        "ms": round(timing.median_us / 1e3, 2),
        "clean": timing.clean,
        "speedup": round(speedup(timings["exact"], timing), 3),
        "same_tokens": True,
    }
    if name == "exact":
        return row
    drafted = sum(log.drafted for log in logs)
    row |= {
        "acceptance": round(sum(log.accepted for log in logs) / drafted, 3) if drafted else None,
        "drafted": drafted,
        "steps": median(log.steps for log in logs),
        "plain_steps": median(log.plain_steps for log in logs),
    }
    if logs[0].search is not None:
        row |= {
            "candidates": median(log.candidates for log in logs),
            "search_share": round(median(log.search_share for log in logs), 4),
            "matchness": [log.search.matchness for log in logs],
            "expected_speedup": [log.search.speedup for log in logs],
            "finished": [log.search.finished for log in logs],
        }
    return row


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.skip_search", description=__doc__)
    add = parser.add_argument
    add("--text", nargs="+", default=["prose", "source", "copy"])
    add("--prompt", type=int, default=384, help="tokens of the prompt")
    add("--tokens", type=int, default=256, help="tokens to generate")
    add("--repetitions", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--budget-s", type=float, default=150.0, help="wall time for each text")
    add("--json", type=Path, help="result file, written after every text")
    return parser


def main() -> int:
    """Measure, print, write; 1 if something could not be measured."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    recorder = Recorder(
        "skip_search", options.json, {k: v for k, v in vars(options).items() if k != "json"}
    )
    tokenizer = AutoTokenizer.from_pretrained(LAB)
    model = AutoModelForCausalLM.from_pretrained(LAB).eval()
    prompts = texts(tokenizer, options.prompt)
    for text in options.text:
        try:
            row = measure(model, prompts[text], options)
        except (RuntimeError, ValueError, MemoryError) as error:
            recorder.fail(text, error)
            print(f"{text}: {error}", file=sys.stderr)
            continue
        recorder.add({"what": "lab", "text": text, "batch": 1, **row})
        print(f"{text}: found {row['found']}, candidates {row['candidates_by_call']}")
        for name, variant in row["variants"].items():
            print(f"  {name:20s} {variant}", flush=True)
    recorder.save()
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
