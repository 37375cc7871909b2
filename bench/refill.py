"""Batches whose finished rows make place, against batches that stay together: bench.refill.

Prompts with widely different numbers of new tokens, each known beforehand to none but the variant
that says so. Tokens per second of all prompts together, reading them included, in rounds of all
variants in turn. One thread is timed by the CPU time of the process, since transformers' continuous
batching runs in a thread of its own. Every variant must make the same tokens, but for early exits,
whose share of equal tokens is noted. Each variant with a policy begins with nothing learned.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import StoppingCriteria

import adaptive
from bench.early_exit_rows import LAB_EXITS, shape
from bench.lab import data, tasks
from bench.lab.evaluate import HERE, load
from bench.record import Recorder
from bench.timing import WrongResultError

MODELS = ("lab", "shape")
Made = list[list[int]]
FIXED = {
    "stock": "batches as the prompts come",
    "stock_by_prompt": "batches of prompts of like length",
    "stock_by_output": "batches of like numbers of new tokens, which nobody knows beforehand",
}
POLICIES: dict[str, tuple[adaptive.Policy, ...]] = {
    "generate_many": (),
    "exit 3": (adaptive.SelfSpeculative(exit_layer=3),),
    "exit 3, 4 drafts": (adaptive.SelfSpeculative(exit_layer=3, draft=4),),
    "tree": (adaptive.SelfSpeculative(tree=True),),
    "early exit": (
        adaptive.EarlyExit(layers=LAB_EXITS, threshold=0.9, kv="copy", rows="alone", audit=None),
    ),
}
"""Variants whose rows make place; all but the first are for models that were trained for exits."""


class Limits(StoppingCriteria):
    """Ends each row after its own number of new tokens."""

    def __init__(self, prompt: int, new: list[int]) -> None:
        """Know how long the prompts are with their padding, and the numbers."""
        self.ends = torch.tensor(new) + prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows have ended."""
        return self.ends <= input_ids.shape[1]


class Work:
    """The prompts of one model.

    Attributes:
        prompts: Token ids.
        new: New tokens of each.
        batch: Rows at a time.
    """

    def __init__(self, model: Any, prompts: list[Tensor], new: list[int], batch: int) -> None:
        """Hold it."""
        self.model = model
        self.prompts = prompts
        self.new = new
        self.batch = batch

    @property
    def tokens(self) -> int:
        """New tokens of all."""
        return sum(self.new)

    def batches(self, variant: str) -> list[list[int]]:
        """Numbers of the prompts of each batch that stays together."""
        order = list(range(len(self.prompts)))
        if variant.endswith("by_prompt"):
            order.sort(key=lambda i: len(self.prompts[i]))
        if variant.endswith("by_output"):
            order.sort(key=lambda i: self.new[i])
        return [order[i : i + self.batch] for i in range(0, len(order), self.batch)]

    def together(self, variant: str) -> Made:
        """Generate in batches that stay together."""
        made: Made = [[] for _ in self.prompts]
        for rows in self.batches(variant):
            longest = max(len(self.prompts[i]) for i in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(rows):
                start = longest - len(self.prompts[i])
                ids[row, start:], mask[row, start:] = self.prompts[i], 1
            new = [self.new[i] for i in rows]
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(new),
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=[Limits(longest, new)],
            )
            for row, i in enumerate(rows):
                made[i] = out[row, longest : longest + self.new[i]].tolist()
        return made

    def continuous(self) -> Made:
        """Generate by transformers' own continuous batching, one request per prompt."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        blocks = -(-max(map(self.length, range(len(self.new)))) // 32) * self.batch
        settings = ContinuousBatchingConfig(
            page_size=32,
            num_blocks=blocks,
            max_batch_tokens=256,
            max_requests_per_batch=self.batch,
            auto_switch_to_flash=False,
        )
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        made: Made = [[] for _ in self.prompts]
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=settings, block=True
        ) as manager:
            names = {
                manager.add_request(prompt.tolist(), max_new_tokens=new): i
                for i, (prompt, new) in enumerate(zip(self.prompts, self.new, strict=True))
            }
            left = len(names)
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("its thread ended")
                if result is not None and result.is_finished():
                    made[names[result.request_id]] = list(result.generated_tokens)
                    left -= 1
        return made

    def refilled(self, patched: adaptive.Patched) -> Made:
        """Generate with rows that make place."""
        found = patched.generate_many(
            self.prompts,
            batch_size=self.batch,
            max_new_tokens=self.new,
            do_sample=False,
            eos_token_id=None,
        )
        return [ids[len(p) :].tolist() for ids, p in zip(found, self.prompts, strict=True)]

    def length(self, i: int) -> int:
        """Tokens of a prompt and its new ones that a cache holds at the end."""
        return len(self.prompts[i]) + self.new[i] - 1

    def kv_bytes(self, variant: str) -> int:
        """Most bytes of keys and values that a batch which stays together comes to."""
        config = self.model.config
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        token *= self.model.dtype.itemsize
        return max(
            len(rows)
            * (max(len(self.prompts[i]) for i in rows) + max(self.new[i] for i in rows) - 1)
            * token
            for rows in self.batches(variant)
        )

    def busy_share(self, variant: str) -> float:
        """Share of the rows of all decoding passes that were unfinished."""
        rows = sum(
            len(rows) * (max(self.new[i] for i in rows) - 1) for rows in self.batches(variant)
        )
        return sum(new - 1 for new in self.new) / rows


def compare(work: Work, options: argparse.Namespace, recorder: Recorder, name: str) -> None:
    """Time all variants in turn, and add a row."""
    policies = list(POLICIES) if options.policies and name == "lab" else ["generate_many"]
    now = time.process_time if options.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {}
    made: dict[str, Made] = {}
    reports: dict[str, Any] = {}
    variants: dict[str, Callable[[], Made]] = {
        variant: (lambda variant=variant: work.together(variant))  # type: ignore[misc]
        for variant in FIXED
    }
    if options.continuous:
        variants["generate_batch"] = work.continuous
    for turn in range(options.rounds):
        for variant, run in variants.items():
            start = now()
            made[variant] = run()
            seconds.setdefault(variant, []).append(now() - start)
        with adaptive.patch(work.model):
            start = now()
            made["exact"] = work.together("exact")
            seconds.setdefault("exact", []).append(now() - start)
        for variant in policies:
            with adaptive.patch(work.model, *POLICIES[variant]) as patched:
                start = now()
                made[variant] = work.refilled(patched)
                seconds.setdefault(variant, []).append(now() - start)
                reports[variant] = patched.report()
        for variant, tokens in made.items():
            if tokens != made["stock"] and (variant not in reports or reports[variant].exact):
                raise WrongResultError(f"bench: {variant} must make stock's tokens, round {turn}")
    rows = {}
    for variant, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds["stock"], taken, strict=True)]
        rows[variant] = {
            "tokens_per_s": work.tokens / median(taken),
            "speedup": median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
        }
        if variant in (*FIXED, "exact"):
            share, held = work.busy_share(variant), work.kv_bytes(variant)
            rows[variant] |= {"busy_share": share, "kv_bytes": held}
    for variant, report in reports.items():
        pairs = zip(made[variant], made["stock"], strict=True)
        same = sum(a == b for one, two in pairs for a, b in zip(one, two, strict=True))
        rows[variant] |= {**told(report), "agreement": same / work.tokens}
    lengths = {"prompts": len(work.prompts), "batch": work.batch, "new_tokens": work.tokens}
    recorder.add({"model": name, "threads": options.threads, **lengths, "variants": rows})


def told(report: Any) -> dict[str, Any]:
    """What a report says of rows that make place, their drafts and exits."""
    log, drafts, exits = report.refill, report.speculation, report.exits
    found = {
        "busy_share": log.busy_share,
        "kv_bytes": log.held_bytes,
        "refills": log.refills,
        "steps": log.steps,
    }
    if drafts is not None:
        for name in ("acceptance", "drafted", "plain_steps", "turned_off"):
            found[name] = getattr(drafts, name)
    return found if exits is None else {**found, "mean_depth": exits.mean_depth}


def counts(options: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and how many new ones: most few, some many."""
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(8, 48, (options.prompts,), generator=rng).tolist()
    tail = -torch.rand(options.prompts, generator=rng).clamp(min=1e-3).log() * options.mean
    new = (tail.round().long() + 2).clamp(max=options.most).tolist()
    return prompts, new


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.refill", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="*", choices=MODELS, default=MODELS)
    add("--prompts", type=int, default=32)
    add("--batch", type=int, default=8)
    add("--mean", type=float, default=24.0, help="new tokens, on average")
    add("--most", type=int, default=96, help="new tokens of a prompt")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--layers", type=int, default=2, help="of the Llama 1B shape")
    add("--vocabulary", type=int, default=16384, help="of the Llama 1B shape")
    add("--continuous", action="store_true", help="transformers' generate_batch, too")
    add("--policies", action="store_true", help="of the lab model: drafts and exits, too")
    add("--json", type=Path, help="result file")
    options = parser.parse_args()
    recorder = Recorder(
        "refill", options.json, {k: v for k, v in vars(options).items() if k != "json"}
    )
    torch.set_num_threads(options.threads)
    lengths, new = counts(options)
    if "lab" in options.models:
        model, tokenizer = load(HERE / "model")
        corpus = torch.tensor(tasks.encoder(tokenizer)(data.long_document()))
        places = range(0, 64 * len(lengths), 64)
        prompts = [corpus[at : at + n] for at, n in zip(places, lengths, strict=True)]
        compare(Work(model, prompts, new, options.batch), options, recorder, "lab")
    if "shape" in options.models:
        model = shape(options.layers, options.vocabulary, torch.float32)
        rng = torch.Generator().manual_seed(1)
        prompts = [torch.randint(1, options.vocabulary, (n,), generator=rng) for n in lengths]
        name = f"llama-3.2-1b shape, {options.layers} layers, float32"
        compare(Work(model, prompts, new, options.batch), options, recorder, name)
    for row in recorder.document["rows"]:
        Console().print(row, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
