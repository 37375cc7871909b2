"""Draws the demonstration: time per token over context length, and bars beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from adaptive.demo._result import Result

STOCK, PATCHED, INK = "#9a9a9a", "#0b6e4f", "#222222"


def write(result: Result, path: Path) -> Path:
    """Draw ``result`` as a PNG at ``path``."""
    settings: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
        _lines(left, result)
        stock, patched = result.variants["stock"], result.variants["patched"]
        _bars(middle, "tokens per second", 1e3 / stock.token_ms, 1e3 / patched.token_ms)
        if stock.peak_bytes and patched.peak_bytes:
            peaks = (stock.peak_bytes / 2**20, patched.peak_bytes / 2**20)
            _bars(right, "peak memory of decoding, MiB", *peaks)
        else:
            right.set_visible(False)
        equal = round(result.token_agreement * result.new_tokens)
        figure.suptitle(
            f"{equal} of {result.new_tokens} tokens equal, "
            f"largest logit difference {result.max_logit_difference:.0e}",
            x=0.01, ha="left", fontweight="bold", color=INK,
        )  # fmt: skip
        figure.savefig(path, dpi=150)
    return path


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
    axes.set_xlim(0, tokens[-1] * 1.16)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens")
    axes.set_title(
        f"decode, ms per token (median; {result.dtype}, {result.threads} threads)", loc="left"
    )
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)


def _bars(axes: Any, title: str, stock: float, patched: float) -> None:
    """Draw two bars, each with its number."""
    bars = axes.bar(["stock", "patched"], [stock, patched], color=[STOCK, PATCHED], width=0.6)
    axes.bar_label(bars, fmt="{:.1f}", padding=3, fontweight="bold")
    axes.set_title(title, loc="left")
    axes.margins(y=0.12)
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines["left"].set_visible(False)
