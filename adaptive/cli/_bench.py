"""``bench``: a minute of measurement that works from any installation, correctness first."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adaptive
from adaptive.cli._console import Steps, quiet, steps
from adaptive.demo._generate import answer
from adaptive.ops import decode_attention

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Attention of an 8-billion-parameter Llama."""
KV_TOKENS = (1024, 4096, 16384)
CONTEXTS = (256, 1024, 4096)
NEW_TOKENS = 24
SECONDS = 1.0
"""Time spent on each KV length, shared by the variants, but at least ``REPEATS`` calls each."""
REPEATS = 5
SMALL_LLAMA = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class OpTiming:
    """One KV length: microseconds (medians) and the largest errors against float64."""

    kv_tokens: int
    native_us: float
    best_stock_us: float
    best_stock: str
    gqa_stock_us: float
    native_gbytes_per_s: float
    native_error: float
    stock_error: float


@dataclass(frozen=True)
class ModelTiming:
    """One context length: milliseconds per token (medians) and the share of equal tokens."""

    context_tokens: int
    stock_ms: float
    patched_ms: float
    token_agreement: float


@dataclass(frozen=True)
class Timings:
    """What ``bench`` measured, and on what."""

    machine: dict[str, Any]
    ops: list[OpTiming]
    models: list[ModelTiming]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def show(self, console: Console) -> None:
        """Print the tables."""
        about = self.machine
        console.print(
            f"{about['cpu']}, {about['threads']} threads, kernels: {about['cpu_level']}, "
            f"torch {about['torch']}, {about['dtype']}",
            highlight=False,
        )
        table = Table(title=f"decode_attention, one query token, {HEADS}/{KV_HEADS} heads of "
                      f"{HEAD_DIM}", title_justify="left")  # fmt: skip
        for name in ("KV tokens", "native us", "GB/s", "best stock us", "gain", "sdpa gqa us",
                     "error", "stock error"):  # fmt: skip
            table.add_column(name, justify="right")
        for t in self.ops:
            table.add_row(
                f"{t.kv_tokens:,}", f"{t.native_us:.0f}", f"{t.native_gbytes_per_s:.1f}",
                f"{t.best_stock_us:.0f} ({t.best_stock})", f"{t.best_stock_us / t.native_us:.2f}x",
                f"{t.gqa_stock_us:.0f}", f"{t.native_error:.1e}", f"{t.stock_error:.1e}",
            )  # fmt: skip
        console.print(table)
        if not self.models:
            console.print("model rows need transformers: pip install 'adaptive[hf]'", markup=False)
            return
        table = Table(title="generate, small random Llama, ms per token", title_justify="left")
        for name in ("context", "stock", "patched", "gain", "tokens equal"):
            table.add_column(name, justify="right")
        for m in self.models:
            table.add_row(
                f"{m.context_tokens:,}", f"{m.stock_ms:.2f}", f"{m.patched_ms:.2f}",
                f"{m.stock_ms / m.patched_ms:.2f}x", f"{m.token_agreement:.0%}",
            )  # fmt: skip
        console.print(table)


def run(dtype: str, threads: int | None, console: Console) -> Timings:
    """Measure the op and a small model, with progress on ``console``."""
    if threads:
        torch.set_num_threads(threads)
    machine = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_level": adaptive.cpu_level(),
        "torch": torch.__version__,
        "adaptive": adaptive.__version__,
        "dtype": dtype,
    }
    with steps(console, total=len(KV_TOKENS) + 2 * len(CONTEXTS)) as progress:
        ops = []
        for kv_tokens in KV_TOKENS:
            progress.next(f"decode_attention at {kv_tokens} KV tokens")
            ops.append(_time_op(kv_tokens, getattr(torch, dtype)))
        return Timings(machine, ops, _time_models(getattr(torch, dtype), progress))


def _time_op(kv_tokens: int, dtype: torch.dtype) -> OpTiming:
    """Compare with float64, then time the native op and the stock forms in turns."""
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, 1, HEAD_DIM, generator=rng).to(dtype)
    key, value = (
        torch.randn(1, KV_HEADS, kv_tokens, HEAD_DIM, generator=rng).to(dtype) for _ in range(2)
    )
    truth = _folded_matmul(query.double(), key.double(), value.double())
    forms: dict[str, Callable[[], Tensor]] = {
        "native": lambda: decode_attention(query, key, value)[0],
        "matmul": lambda: _folded_matmul(query, key, value),
        "sdpa": lambda: _folded_sdpa(query, key, value),
        "gqa": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
    }
    errors = {name: float((form().double() - truth).abs().max()) for name, form in forms.items()}
    best_error = min(errors["matmul"], errors["sdpa"])
    if not errors["native"] <= 2 * best_error + 1e-6:
        raise RuntimeError(f"the native kernel is off by {errors['native']}, stock {best_error}")
    times = _in_turns(forms)
    best = min(("matmul", "sdpa"), key=times.__getitem__)
    return OpTiming(
        kv_tokens=kv_tokens,
        native_us=times["native"],
        best_stock_us=times[best],
        best_stock=best,
        gqa_stock_us=times["gqa"],
        native_gbytes_per_s=(key.nbytes + value.nbytes) / times["native"] / 1e3,
        native_error=errors["native"],
        stock_error=best_error,
    )


def _in_turns(forms: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return the median microseconds of each form, called in turns for ``SECONDS``."""
    samples: dict[str, list[float]] = {name: [] for name in forms}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(samples["native"]) < REPEATS:
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            samples[name].append((time.perf_counter() - start) * 1e6)
    return {name: median(values) for name, values in samples.items()}


def _folded(query: Tensor) -> Tensor:
    """View ``[1, heads, 1, dim]`` as ``[1, kv_heads, group, dim]``: one read of K per group."""
    return query.view(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)


def _folded_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.matmul(_folded(query), key.transpose(-1, -2)).mul(HEAD_DIM**-0.5)
    return torch.matmul(scores.softmax(-1), value).view(query.shape)


def _folded_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(_folded(query), key, value).view(query.shape)


def _time_models(dtype: torch.dtype, progress: Steps) -> list[ModelTiming]:
    """Time ``generate`` of a small random Llama, stock and patched; empty without transformers."""
    quiet()
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        return []
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL_LLAMA)
    stock = transformers.LlamaForCausalLM(config).to(dtype).eval()
    fast = copy.deepcopy(stock)
    adaptive.patch(fast)
    timings = []
    for context in CONTEXTS:
        prompt = torch.randint(3, SMALL_LLAMA["vocab_size"], (context,)).tolist()
        answers = []
        for name, model in (("stock", stock), ("patched", fast)):
            progress.next(f"{name} model at {context} tokens")
            answers.append(answer(model, prompt, NEW_TOKENS))
        a, b = answers
        equal = sum(x == y for x, y in zip(a.tokens, b.tokens, strict=True)) / NEW_TOKENS
        timings.append(ModelTiming(context, a.token_s * 1e3, b.token_s * 1e3, equal))
    return timings


def _cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
