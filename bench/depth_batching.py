"""Tokens per second of continuous depth-wise batching beside batches that go token by token.

The same recursive model with random weights decodes the same prompts in three ways: ``depth``, rows
at different recursions in one pass; ``token``, all rows finish a token before the next begins, with
finished rows refilled as well; ``static``, batches as they come, which wait for their longest row.
The router's weights are scaled so that depths spread. Every way first has to give the same tokens.
Ways take turns, round by round; ratios are medians over the rounds. One thread: CPU time.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from adaptive.zoo import RecursiveTransformer, RecursiveTransformerConfig, generate_many
from bench.record import Recorder
from bench.timing import WrongResultError

SHAPES: dict[str, dict[str, int]] = {
    "512": {"vocab_size": 1024, "width": 512, "heads": 8, "block_layers": 4, "recursions": 3},
    "256": {"vocab_size": 1024, "width": 256, "heads": 4, "block_layers": 4, "recursions": 3},
    "tiny": {"vocab_size": 64, "width": 64, "heads": 2, "block_layers": 1, "recursions": 3},
}
SPREAD = 50.0
"""Factor of the router's weights."""
PROMPT_TOKENS, NEW_TOKENS = (4, 12), (8, 25)
"""Ranges, drawn evenly for each prompt."""
Way = Callable[[], list[Tensor]]


def build(shape: str, router: str) -> RecursiveTransformer:
    """A model with random weights."""
    torch.manual_seed(0)
    model = RecursiveTransformer(RecursiveTransformerConfig(**SHAPES[shape], router=router)).eval()
    assert model.router is not None
    with torch.no_grad():
        model.router.weight.mul_(SPREAD)
    return model


def ways(model: RecursiveTransformer, count: int, batch: int) -> dict[str, Way]:
    """The three ways to continue the same prompts."""
    rng = torch.Generator().manual_seed(1)
    limits = torch.randint(*NEW_TOKENS, (count,), generator=rng).tolist()
    lengths = torch.randint(*PROMPT_TOKENS, (count,), generator=rng).tolist()
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=rng) for n in lengths]

    def static() -> list[Tensor]:
        made: list[Tensor] = []
        for at in range(0, count, batch):
            most = max(limits[at : at + batch])
            made += model.generate(prompts[at : at + batch], most)
        return [row[:limit] for row, limit in zip(made, limits, strict=True)]

    def many(schedule: str) -> Way:
        return lambda: generate_many(model, prompts, limits, batch_size=batch, schedule=schedule)

    return {"depth": many("depth"), "token": many("token"), "static": static}


def measure(shape: str, router: str, batch: int, count: int, rounds: int) -> dict[str, Any]:
    """One row of the result."""
    model = build(shape, router)
    found: dict[str, dict[str, Any]] = {}
    expected: list[Tensor] | None = None
    contenders = ways(model, count, batch)
    for name, way in contenders.items():
        made = way()
        expected = expected or made
        if not all(torch.equal(a, b) for a, b in zip(made, expected, strict=True)):
            raise WrongResultError(f"bench: {name!r} must give the tokens of 'depth'")
        report = model.report()
        found[name] = {"same_tokens": True, "rounds_s": []}
        if name != "static":
            found[name] |= {"passes": report.passes, "occupancy": round(report.occupancy, 3)}
            depths = report.depths
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(rounds):
        for name, way in contenders.items():
            began = clock()
            way()
            found[name]["rounds_s"].append(round(clock() - began, 4))
    assert expected is not None
    tokens = sum(len(row) for row in expected)
    for variant in found.values():
        variant["tokens_per_s"] = round(tokens / median(variant["rounds_s"]), 2)
    ours = found["depth"]["rounds_s"]
    speedup = {
        name: round(median(b / a for a, b in zip(ours, found[name]["rounds_s"], strict=True)), 3)
        for name in ("token", "static")
    }
    return {
        "model": shape,
        "router": router,
        "batch": batch,
        "prompts": count,
        "new_tokens": tokens,
        "depths": list(depths),
        "threads": torch.get_num_threads(),
        "variants": found,
        "speedup": speedup,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.depth_batching", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["512"], choices=sorted(SHAPES))
    add("--routers", nargs="+", default=["expert", "token"], choices=("expert", "token"))
    add("--batches", nargs="+", type=int, default=[4, 8])
    add("--prompts", type=int, default=16)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    recorder = Recorder("depth_batching", options.json, settings)
    for shape in options.shapes:
        for router in options.routers:
            for batch in options.batches:
                label = f"{shape}, {router}, batch {batch}"
                try:
                    row = measure(shape, router, batch, options.prompts, options.rounds)
                    recorder.add(row)
                    rates = {name: v["tokens_per_s"] for name, v in row["variants"].items()}
                    print(label, rates, row["speedup"], flush=True)
                except (WrongResultError, RuntimeError, MemoryError) as error:
                    recorder.fail(label, error)
                    print(label, error, flush=True)
    recorder.save()
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
