"""Draws the demonstration: time per token over context length, and bars beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from adaptive.demo._result import Result

STOCK, PATCHED, INK, FAINT = "#8c8c8c", "#0b6e4f", "#222222", "#e4e4e4"


def write(result: Result, path: Path) -> Path:
    """Draw ``result`` as a PNG at ``path``."""
    settings: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    stock, patched = result.variants["stock"], result.variants["patched"]
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(12, 5))
        grid = figure.add_gridspec(
            1, 3, width_ratios=(3, 1, 1), left=0.05, right=0.985, bottom=0.12, top=0.74, wspace=0.3
        )
        lines, rates, memory = (figure.add_subplot(grid[0, i]) for i in range(3))
        equal = round(result.token_agreement * result.new_tokens)
        figure.text(
            0.014, 0.93,
            f"{equal} of {result.new_tokens} tokens equal to stock, largest logit difference "
            f"{result.max_logit_difference:.0e}",
            fontsize=14, fontweight="bold", color=INK,
        )  # fmt: skip
        figure.text(0.014, 0.875, _about(result), color="#555555")
        _lines(lines, result)
        where = f"after {result.prompt_tokens:,} tokens"
        _bars(rates, f"tokens per second\n{where}", 1e3 / stock.token_ms, 1e3 / patched.token_ms)
        if stock.peak_bytes and patched.peak_bytes:
            peaks = (stock.peak_bytes / 2**20, patched.peak_bytes / 2**20)
            _bars(memory, "peak MiB of decoding,\nabove the model", *peaks)
        else:
            memory.set_visible(False)
        figure.savefig(path, dpi=150)
    return path


def _about(result: Result) -> str:
    """Say what was run, in one line."""
    threads = f"{result.threads} CPU thread{'s' if result.threads != 1 else ''}"
    return (
        f"a trained Llama of {result.parameters / 1e6:.1f} million parameters reads "
        f"{result.prompt_tokens:,} tokens and generates; {result.dtype}, {threads}, medians"
    )


def _lines(axes: Any, result: Result) -> None:
    """Draw milliseconds per token against context length, each line named at its end."""
    tokens = [p.tokens for p in result.points]
    for name, color, values in (
        ("stock", STOCK, [p.stock_ms for p in result.points]),
        ("patched", PATCHED, [p.patched_ms for p in result.points]),
    ):
        axes.plot(tokens, values, marker="o", color=color, linewidth=2.5)
        axes.annotate(
            f"{name}\n{values[-1]:.1f} ms", (tokens[-1], values[-1]), xytext=(10, 0),
            textcoords="offset points", va="center", color=color, fontweight="bold",
        )  # fmt: skip
    axes.set_xlim(0, tokens[-1] * 1.17)
    axes.set_ylim(bottom=0)
    apart = [t for t in tokens if t > tokens[-1] / 10]  # labels of the others would overlap
    axes.set_xticks(apart, [f"{t:,}" for t in apart])
    axes.set_xlabel("tokens of context")
    axes.set_title("milliseconds per token\n", loc="left")
    axes.grid(axis="y", color=FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _bars(axes: Any, title: str, stock: float, patched: float) -> None:
    """Draw two bars, each with its number."""
    bars = axes.bar(["stock", "patched"], [stock, patched], color=[STOCK, PATCHED], width=0.62)
    axes.bar_label(bars, fmt="{:.1f}", padding=3, fontweight="bold")
    axes.set_title(title, loc="left")
    axes.margins(y=0.12)
    axes.tick_params(length=0, labelleft=False)
    axes.spines["left"].set_visible(False)
