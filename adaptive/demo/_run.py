"""Runs the demonstration: correctness first, then times in turns, then memory."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import adaptive
from adaptive.cli._console import Steps, UsageError, quiet, steps
from adaptive.demo import _memory
from adaptive.demo._generate import Answer, answer, exact_logits
from adaptive.demo._result import Point, Result, Variant

SWEEP = (512, 1024, 2048, 4096)
"""Context lengths of the chart, besides the document's own."""
SWEEP_TOKENS = 24
MEMORY_TOKENS = 16
LEAST_NEW_TOKENS = 2
KEY_DIGITS = 5
SHORTEST = 200
"""Tokens that the needle and the question need, with some text around them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chose; see ``python -m adaptive demo --help``."""

    model: Path | None = None
    tokens: int | None = None
    new_tokens: int = 64
    depth: float = 0.35
    seed: int = 0
    rounds: int = 3
    dtype: str = "float32"
    threads: int | None = None
    out: Path = Path("demo")


def run(options: Options, console: Console) -> Result:
    """Run the whole demonstration, with progress on ``console``.

    Raises:
        UsageError: A package, the model or the document's source is missing, or does not fit.
    """
    transformers = _transformers()
    root = _checkout()
    folder = options.model or root / "bench" / "lab" / "model"
    if options.new_tokens < LEAST_NEW_TOKENS:
        raise UsageError(
            f"--new-tokens must be at least {LEAST_NEW_TOKENS}, got {options.new_tokens}: the "
            "first token is the prefill's"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no model; give a folder with --model DIR")
    if options.threads:
        torch.set_num_threads(options.threads)
    tasks = import_module("bench.lab.tasks")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    tokens = _document_length(config, options)
    _make_writable(options.out)
    sweep = _sweep(tokens)
    memory = 2 * int(_memory.available())
    with steps(console, total=3 + 2 * (options.rounds + len(sweep)) + memory) as progress:
        progress.next("loading the model twice")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        stock, fast, gold = (_load(folder, dtype) for dtype in (options.dtype,) * 2 + ("float64",))
        prompt, key = tasks.passkey_document(tokenizer, tokens, options.depth, options.seed)
        patched = adaptive.patch(fast)
        models = {"stock": stock, "patched": fast}
        rounds = _rounds(models, prompt, options, progress)
        first = rounds[0]
        progress.next("float64 pass: the truth both are measured against")
        truth = {"stock": exact_logits(gold, prompt, first["stock"].tokens)}
        same = first["stock"].tokens == first["patched"].tokens
        truth["patched"] = (
            truth["stock"] if same else exact_logits(gold, prompt, first["patched"].tokens)
        )
        del gold
        points = [_point(models, tasks, tokenizer, length, progress) for length in sweep]
        report = patched.report()
        peaks = _peaks(folder, prompt, options, progress)
    variants = {
        name: _variant([r[name] for r in rounds], truth[name], tokenizer, key, peaks.get(name))
        for name in models
    }
    points.append(Point(tokens, variants["stock"].token_ms, variants["patched"].token_ms))
    return Result(
        model=str(folder),
        parameters=sum(p.numel() for p in stock.parameters()),
        dtype=options.dtype,
        threads=torch.get_num_threads(),
        prompt_tokens=tokens,
        new_tokens=options.new_tokens,
        key=key,
        excerpt=_excerpt(tokenizer, prompt, key),
        variants=variants,
        token_agreement=_agreement(first),
        max_logit_difference=_difference(first),
        points=points,
        report=report,
        out=options.out,
    )


def _transformers() -> Any:
    """Import transformers, quietly, or say how to get it."""
    quiet()
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise UsageError("the demo needs transformers: pip install 'adaptive[demo]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _checkout() -> Path:
    """Return the folder of the checkout, which carries the lab model and its tasks."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "bench" / "lab" / "tasks.py").is_file():
            if str(root) not in sys.path:
                sys.path.append(str(root))
            return root
    raise UsageError(
        "the demo reads the lab model and its document from a checkout of adaptive: "
        "clone the project, change into its folder, and run `make demo`"
    )


def _make_writable(folder: Path) -> None:
    """Make the folder of the chart, before minutes of measuring for it."""
    reason = "not writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        raise UsageError(f"--out must be a folder to write the chart to, got {folder}: {reason}")


def _load(folder: Path, dtype: str) -> Any:
    """Load the model from ``folder``; nothing is downloaded."""
    auto = import_module("transformers").AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).eval()


def _document_length(config: Any, options: Options) -> int:
    """Return the prompt's length: what the user asked for, or 8000, within the model's reach."""
    positions = int(config.max_position_embeddings)
    reach = positions - options.new_tokens
    if reach < SHORTEST:
        raise UsageError(
            f"--new-tokens must be at most {positions - SHORTEST} (the model's {positions} "
            f"positions less a document of {SHORTEST} tokens), got {options.new_tokens}"
        )
    tokens = options.tokens or min(8000, reach)
    if not SHORTEST <= tokens <= reach:
        raise UsageError(
            f"--tokens must be from {SHORTEST} to {reach} (the model's {positions} "
            f"positions less {options.new_tokens} new tokens), got {tokens}"
        )
    return tokens


def _sweep(tokens: int) -> list[int]:
    """Return the shorter context lengths of the chart, for a document of ``tokens`` tokens."""
    return [length for length in SWEEP if length + SWEEP_TOKENS <= tokens]


def _rounds(
    models: dict[str, Any], prompt: list[int], options: Options, progress: Steps
) -> list[dict[str, Answer]]:
    """Let every model answer in turns, the order reversed from round to round."""
    rounds = []
    for number in range(options.rounds):
        order = list(models) if number % 2 == 0 else list(reversed(models))
        answers = {}
        for name in order:
            text = f"{name} reads {len(prompt)} tokens, round {number + 1} of {options.rounds}"
            progress.next(text)
            answers[name] = answer(models[name], prompt, options.new_tokens)
        rounds.append(answers)
    return rounds


def _point(
    models: dict[str, Any], tasks: Any, tokenizer: Any, length: int, progress: Steps
) -> Point:
    """Time a token of both models after a document of ``length`` tokens."""
    prompt, _ = tasks.passkey_document(tokenizer, length, 0.5, 0)
    token_ms = []
    for name, model in models.items():
        progress.next(f"{name} at {length} tokens")
        token_ms.append(answer(model, prompt, SWEEP_TOKENS).token_s * 1e3)
    return Point(length, *token_ms)


def _peaks(folder: Path, prompt: list[int], options: Options, progress: Steps) -> dict[str, int]:
    """Measure the peak memory of decoding of both variants, where the system can tell it."""
    if not _memory.available():
        return {}
    peaks = {}
    for name in ("stock", "patched"):
        progress.next(f"peak memory of {name}, in a process of its own")
        peaks[name] = _memory.measure(
            folder, options.dtype, torch.get_num_threads(), prompt, MEMORY_TOKENS, name != "stock"
        )
    return peaks


def _variant(
    answers: list[Answer], truth: torch.Tensor, tokenizer: Any, key: str, peak: int | None
) -> Variant:
    """Condense the rounds of one variant: medians of times, the rest from the first round."""
    first = answers[0]
    prefill = sorted(a.prefill_s for a in answers)
    steps_s = sorted(s for a in answers for s in a.step_s)
    said = tokenizer.decode(first.tokens[: 4 * KEY_DIGITS])
    return Variant(
        prefill_s=prefill[len(prefill) // 2],
        token_ms=steps_s[len(steps_s) // 2] * 1e3,
        kv_bytes_per_token=first.kv_used_bytes / first.kv_tokens,
        kv_held_bytes=first.kv_held_bytes,
        peak_bytes=peak,
        max_error=float((first.logits.double() - truth).abs().max()),
        said=said,
        needle_found=said.strip().startswith(key),
    )


def _agreement(first: dict[str, Answer]) -> float:
    """Return the share of generated tokens that are equal."""
    pairs = list(zip(first["stock"].tokens, first["patched"].tokens, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def _difference(first: dict[str, Answer]) -> float:
    """Return the largest difference of the logits up to the first unequal token, inclusive."""
    a, b = first["stock"], first["patched"]
    equal = [x == y for x, y in zip(a.tokens, b.tokens, strict=True)]
    last = equal.index(False) if False in equal else len(equal) - 1
    return float((a.logits[: last + 1] - b.logits[: last + 1]).abs().max())


def _excerpt(tokenizer: Any, prompt: list[int], key: str) -> str:
    """Return the text around the needle."""
    text = tokenizer.decode(prompt)
    where = text.index(key)
    return str(text[max(0, where - 220) : where + 120])
