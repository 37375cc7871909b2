"""Draws what bench.early_exit measured: quality over the layers run per token, as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import INK
from bench.quality_chart import curves

LINES = {
    "confidence": ("#1d4ed8", "o"),
    "margin": ("#0891b2", "D"),
    "entropy": ("#15803d", "P"),
    "cosine": ("#c2410c", "^"),
    "agreement": ("#a16207", "s"),
}


def panel(axes: Any, rows: Sequence[dict[str, Any]], task: str, value: str) -> None:
    """One line per criterion, one point per threshold."""
    named = [{**row, "policy": row["criterion"]} for row in rows]
    curves(axes, named, LINES, "mean_depth", task, value)
    axes.set_xlabel("layers run per token, of 8", color=INK)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.early_exit`` document to ``path``."""
    rows = document["rows"]
    whole = max(rows, key=lambda row: row["mean_depth"])["tasks"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), dpi=130)
    panel(axes[0], rows, "text", "bits_per_byte")
    axes[0].axhline(whole["text"]["bits_per_byte"], color=INK, linewidth=0.8, linestyle="--")
    axes[0].set_ylabel("bits per byte of held-out text", color=INK)
    panel(axes[1], rows, "text", "top1_agreement")
    axes[1].set_ylabel("best token is that of the whole model", color=INK)
    panel(axes[2], rows, "passkey", "accuracy")
    axes[2].axhline(whole["passkey"]["accuracy"], color=INK, linewidth=0.8, linestyle="--")
    axes[2].set_ylim(-0.03, 1.03)
    axes[2].set_ylabel(f"pass key found, of {whole['passkey']['answers']}", color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="lower center", ncols=5)
    title = "What leaving early costs: lab model, exits after 3 to 7 layers; dashed: all layers"
    figure.suptitle(title, color=INK, fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    plt.close(figure)
