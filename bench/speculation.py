"""Times self-speculation against the exact path: python -m bench.speculation [--json OUT].

``--part lab``: the lab model on three kinds of text, exit layer by draft length, adaptive lengths
and token trees, every variant's tokens proved equal first. ``--part shape``: a Llama-3.2-1B-shaped
model with random weights whose drafts are accepted by a coin, beside what the bytes of weights that
each pass reads would give. ``--part batch``: eight rows, where speculation must know when to stop.
Variants take turns in one process.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptive
from adaptive.layers import hf_rows
from adaptive.layers.token_tree import Successors
from bench.lab.data import heldout_texts, long_document
from bench.llama import build
from bench.record import Recorder
from bench.timing import interleave, speedup

LAB = Path(__file__).parent / "lab" / "model"
EXITS, DRAFTS = (3, 4, 5, 6), (1, 2, 4, 6, 8)
ACCEPTANCES, SHAPE_EXIT, SHAPE_DRAFTS = (0.5, 0.7, 0.8, 0.9), 4, (2, 4, 6)
PAD = 2
Policy = adaptive.SelfSpeculative


def texts(tokenizer: Any, tokens: int, skip: int = 0) -> dict[str, Tensor]:
    """Prompts of held-out text, ``[1, tokens]`` each, from its token ``skip`` on.

    The language reference, source code, and source code that begins to repeat itself.
    """

    def of(text: str) -> Tensor:
        ids: Tensor = tokenizer(text[:50_000], return_tensors="pt").input_ids
        return ids[:, skip : skip + tokens]

    source = of(max(heldout_texts(), key=len))
    twice = source[:, : 2 * tokens // 3]
    copied = torch.cat([twice, twice[:, : tokens - twice.shape[1]]], 1)
    return {"prose": of(long_document()), "source": source, "copy": copied}


def variant_policies() -> dict[str, Policy | None]:
    """Every variant by name."""
    found: dict[str, Policy | None] = {"exact": None, "tree": Policy(tree=True)}
    for layer in EXITS:
        found[f"exit {layer}, adaptive"] = Policy(exit_layer=layer)
        for draft in DRAFTS:
            found[f"exit {layer}, {draft}"] = Policy(exit_layer=layer, draft=draft)
    return found


def calls(
    model: Any, ids: Tensor, tokens: int, policies: dict[str, Policy | None]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]:
    """A function per variant that generates, and the log of each one's last call."""
    logs: dict[str, Any] = {}

    def make(name: str, policy: Policy | None) -> Callable[[], Tensor]:
        own = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the same weights
        own.generation_config.eos_token_id = None  # all variants make as many tokens
        patched = adaptive.patch(own, *([policy] if policy else []))
        record = patched._record

        def run() -> Tensor:
            patched.reset_stats()
            if policy is not None and policy.recycles:
                record.successors = Successors()  # or it would know the text from the last turn
            made: Tensor = own.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=PAD,
            )
            logs[name] = patched.report().speculation
            return made

        return run

    return {name: make(name, policy) for name, policy in policies.items()}, logs


def measure(
    model: Any, ids: Tensor, options: argparse.Namespace, policies: dict[str, Policy | None]
) -> dict[str, dict[str, Any]]:
    """Prove that every variant makes the same tokens, then time all in turn.

    Raises:
        RuntimeError: One makes other tokens.
    """
    runs, logs = calls(model, ids, options.tokens, policies)
    want = runs["exact"]()
    for name, run in runs.items():
        if not torch.equal(run(), want):
            raise RuntimeError(f"bench: {name!r} must make the tokens of the exact path")
    timings = interleave(
        runs, threads=options.threads, repetitions=options.repetitions, budget_s=options.budget_s
    )
    return {name: _row(timings, name, logs[name]) for name in runs}


def _row(timings: Any, name: str, log: Any, same: bool = True) -> dict[str, Any]:
    timing = timings[name]
    row = {
        "ms": round(timing.median_us / 1e3, 2),
        "clean": timing.clean,
        "speedup": round(speedup(timings["exact"], timing), 3),
        "same_tokens": same,
    }
    if log is not None:
        row |= {
            "acceptance": None if log.acceptance is None else round(log.acceptance, 3),
            "steps": log.steps,
            "plain_steps": log.plain_steps,
            "drafted": log.drafted,
            "turned_off": log.turned_off,
        }
    return row


def lab(options: argparse.Namespace, recorder: Recorder) -> None:
    """The lab model, text by text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB)
    model = AutoModelForCausalLM.from_pretrained(LAB).eval()
    for text, ids in texts(tokenizer, 384).items():
        variants = measure(model, ids, options, variant_policies())
        recorder.add({"what": "lab", "text": text, "batch": 1, "variants": variants})
        best = max((v["speedup"], n) for n, v in variants.items() if n != "exact")
        print(
            f"lab, {text}: best {best[1]} {best[0]:.2f}x, tree {variants['tree']['speedup']:.2f}x"
        )
        for name, row in variants.items():
            print(f"  {name:20s} {row}")


def batch(options: argparse.Namespace, recorder: Recorder) -> None:
    """Eight rows of the lab model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB)
    model = AutoModelForCausalLM.from_pretrained(LAB).eval()
    chosen = {"exact": None, "exit 4, adaptive": Policy(exit_layer=4), "tree": Policy(tree=True)}
    for text in ("prose", "copy"):
        ids = torch.cat([texts(tokenizer, 256, 300 * row)[text] for row in range(8)])
        variants = measure(model, ids, options, chosen)
        recorder.add({"what": "batch", "text": text, "batch": 8, "variants": variants})
        print(f"batch 8, {text}: " + ", ".join(f"{n} {v['speedup']}x" for n, v in variants.items()))


@contextmanager
def coin(share: float) -> Iterator[None]:
    """Accept drafts by a coin inside the block: those of random weights are never right."""
    rng = torch.Generator().manual_seed(5)
    before = hf_rows.accept_greedy

    def toss(drafted: Tensor, choices: Tensor) -> tuple[Tensor, list[list[int]]]:
        heads = torch.rand(drafted.shape, generator=rng) < share
        right = heads.long().cumprod(1).sum(1)
        pairs = zip(drafted.tolist(), choices.tolist(), right.tolist(), strict=True)
        return right, [[*drafts[:n], own[n]] for drafts, own, n in pairs]

    hf_rows.accept_greedy = toss  # type: ignore[assignment]
    try:
        yield
    finally:
        hf_rows.accept_greedy = before  # type: ignore[assignment]


def shape(options: argparse.Namespace, recorder: Recorder) -> None:
    """The cost of drafts and checks at the size of a real model."""
    model = build("llama-3.2-1b", torch.bfloat16)
    config = model.config
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    full = config.num_hidden_layers * layer + head
    ids = torch.arange(3, 35)[None]
    exact, _ = calls(model, ids, options.tokens, {"exact": None})
    exact["exact"]()
    for share in ACCEPTANCES:
        policies: dict[str, Policy | None] = {
            f"{draft}": Policy(exit_layer=SHAPE_EXIT, draft=draft) for draft in SHAPE_DRAFTS
        }
        runs, logs = calls(model, ids, options.tokens, policies)
        with coin(share):
            timings = interleave(
                {**exact, **runs},
                threads=options.threads,
                repetitions=options.repetitions,
                at_least=options.repetitions,
                budget_s=options.budget_s,
            )
        rows = {}
        for draft in SHAPE_DRAFTS:
            log = logs[f"{draft}"]
            expected = sum(share**i for i in range(draft + 1))
            read = draft * (SHAPE_EXIT * layer + head) + full
            row = _row(timings, f"{draft}", log, same=False)
            made = log.tokens / max(log.steps + log.plain_steps + 1, 1)
            row |= {
                "by_bytes": round(expected * full / read, 3),
                "tokens_per_check": round(made, 2),
            }
            rows[f"{draft}"] = row
            print(f"1B shape, {share:.0%} by a coin, {draft} drafts: {row}")
        recorder.add(
            {"what": "shape", "text": f"{share}", "batch": 1, "exit_layer": SHAPE_EXIT}
            | {"exact_ms": round(timings["exact"].median_us / 1e3, 1), "variants": rows}
        )


PARTS = {"lab": lab, "batch": batch, "shape": shape}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__)
    add = parser.add_argument
    add("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    add("--tokens", type=int, default=64, help="tokens to generate")
    add("--repetitions", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--budget-s", type=float, default=120.0, help="wall time for each set of variants")
    add("--json", type=Path, help="result file, written after every row")
    add("--chart", type=Path, help="PNG of the lab model's heat maps to draw")
    return parser


def main() -> int:
    """Measure, print, write; 1 if something could not be measured."""
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "chart")}
    kind = "speculation_shape" if options.part == ["shape"] else "speculation"
    recorder = Recorder(kind, options.json, settings)
    for part in options.part:
        try:
            PARTS[part](options, recorder)
        except (RuntimeError, ValueError, MemoryError) as error:
            recorder.fail(part, error)
            print(f"{part}: {error}", file=sys.stderr)
    recorder.save()
    if options.chart:
        from bench.speculation_chart import draw

        draw(recorder.document, options.chart)
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
