"""Whether rows of a batch should leave together or alone: python -m bench.early_exit_rows.

Tokens per second of `generate` at batch 8 on the exact path and with early exits, in rounds of all
variants in turn, prompts left out. The lab model leaves by its own confidence. The Llama shape has
random weights, which are sure of nothing: each row leaves by a draw of a given chance, the same
draws for every variant. One thread is timed by its own CPU time.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM, StoppingCriteria

import adaptive
from adaptive.layers import hf_exit_steps
from adaptive.layers.exit_head import Outlook
from adaptive.policy import EarlyExit
from adaptive.policy.early_exit import ROWS
from bench import llama
from bench.lab import data, tasks
from bench.lab.evaluate import HERE, load
from bench.record import Recorder

LAB_EXITS = (4, 6)
LAB_THRESHOLDS = (0.2, 0.3, 0.5, 0.7)
CHANCES = (0.5, 0.7, 0.9)
FILLS = ("copy", "deferred")
Variant = tuple[str, str]
"""How later layers are filled, and how rows leave."""


class Clock(StoppingCriteria):
    """Stops nothing; notes when the first token was there and when the last one."""

    def __init__(self, now: Any) -> None:
        """Know what tells the time."""
        self.now = now
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Note the time."""
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    @property
    def seconds(self) -> float:
        """Between the first token and the last."""
        return self.times[-1] - self.times[0]


class Draws:
    """Stands in for the judge of exits: each row leaves by chance, each step has its own seed."""

    steps = 0
    chance = 0.0

    def __init__(self, _: EarlyExit) -> None:
        """Draw for a step."""
        rng = torch.Generator().manual_seed(Draws.steps)
        Draws.steps += 1
        self._rng = rng

    def keep(self, rows: Tensor) -> None:
        """Nothing is remembered of rows."""

    def leaves(self, said: Outlook, *_: Tensor) -> Tensor:
        """Which rows leave, ``[batch]``; the head is asked as by a criterion."""
        said.sure("confidence")
        return torch.rand(len(said), generator=self._rng) < Draws.chance


def shape(layers: int, vocabulary: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The 1B shape with fewer layers and tokens."""
    full = llama.SHAPES["llama-3.2-1b"]
    cut = {**full, "num_hidden_layers": layers, "vocab_size": vocabulary}
    with mock.patch.dict(llama.SHAPES, {"cut": cut}):
        return llama.build("cut", dtype)


def compare(
    model: Any, prompt: Tensor, policies: dict[Variant, EarlyExit], options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of the exact path and of each policy, and what the logs say."""
    now = time.thread_time if options.threads == 1 else time.perf_counter
    fields: dict[str, Any] = {"max_new_tokens": options.new, "do_sample": False}
    fields |= {"pad_token_id": 0, "eos_token_id": None}
    seconds: dict[Any, list[float]] = {each: [] for each in [None, *policies]}
    logs: dict[Any, Any] = {}
    for _ in range(options.rounds):
        for variant, taken in seconds.items():
            chosen = [] if variant is None else [policies[variant]]
            clock, Draws.steps = Clock(now), 0
            with adaptive.patch(model, *chosen) as patched:
                model.generate(prompt, stopping_criteria=[clock], **fields)
                logs[variant] = patched.report().exits
            taken.append(clock.seconds)
    tokens = len(prompt) * (options.new - 1)
    variants = {}
    for variant in policies:
        log, ratios = logs[variant], _ratios(seconds[None], seconds[variant])
        variants["/".join(variant)] = {
            "tokens_per_s": tokens / median(seconds[variant]),
            "speedup": median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
            "mean_depth": log.mean_depth,
            "layer_tokens_skipped": 1 - log.layer_tokens / (log.layers * tokens),
            "layer_calls_skipped": log.skipped,
        }
    for fill in FILLS:
        ratios = _ratios(seconds[fill, "together"], seconds[fill, "alone"])
        variants[f"{fill}/alone"]["over_together"] = median(ratios)
    return {"exact_tokens_per_s": tokens / median(seconds[None]), "variants": variants}


def _ratios(before: list[float], after: list[float]) -> list[float]:
    return [a / b for a, b in zip(before, after, strict=True)]


def lab(options: argparse.Namespace, recorder: Recorder) -> None:
    """The lab model on pieces of its held-out text."""
    model, tokenizer = load(HERE / "model")
    corpus = torch.tensor(tasks.encoder(tokenizer)(data.long_document()))
    pieces = corpus[: len(corpus) // options.batch * options.batch].view(options.batch, -1)
    prompt = pieces[:, : options.prompt].contiguous()
    for threshold in options.thresholds:
        policies = {
            (fill, rows): EarlyExit(
                layers=LAB_EXITS, threshold=threshold, kv=fill, rows=rows, audit=None
            )
            for fill in FILLS
            for rows in ROWS
        }
        found = compare(model, prompt, policies, options)
        row = {"model": "lab", "criterion": "confidence", "threshold": threshold}
        recorder.add({**row, "exits": list(LAB_EXITS), **found})


def drawn(options: argparse.Namespace, recorder: Recorder) -> None:
    """The Llama shape; rows leave after half of its layers, by chance."""
    model = shape(options.layers, options.vocabulary, torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    size = (options.batch, options.prompt)
    prompt = torch.randint(1, options.vocabulary, size, generator=rng)
    half = (options.layers // 2,)
    policies = {
        (fill, rows): EarlyExit(layers=half, threshold=0.0, kv=fill, rows=rows, audit=None)
        for fill in FILLS
        for rows in ROWS
    }
    for chance in options.chances:
        Draws.chance = chance
        with mock.patch.object(hf_exit_steps, "Judge", Draws):
            found = compare(model, prompt, policies, options)
        name = f"llama-3.2-1b shape, {options.layers} layers, bfloat16"
        recorder.add(
            {"model": name, "criterion": "draw", "threshold": chance, "exits": half} | found
        )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.early_exit_rows", description=__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=8)
    add("--prompt", type=int, default=32, help="tokens of a prompt")
    add("--new", type=int, default=32, help="tokens of a row")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--thresholds", type=float, nargs="*", default=LAB_THRESHOLDS, help="of the lab model")
    add("--chances", type=float, nargs="*", default=CHANCES, help="of the Llama shape")
    add("--layers", type=int, default=6, help="of the Llama shape")
    add("--vocabulary", type=int, default=16384, help="of the Llama shape")
    add("--json", type=Path, help="result file")
    return parser


def main() -> int:
    """Measure, print, write."""
    options = arguments().parse_args()
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("early_exit_rows", options.json, settings)
    torch.set_num_threads(options.threads)
    if options.thresholds:
        lab(options, recorder)
    if options.chances:
        drawn(options, recorder)
    for row in recorder.document["rows"]:
        Console().print(row, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
