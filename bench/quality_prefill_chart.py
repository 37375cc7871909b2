"""Draws what bench.quality_prefill measured: quality over the scores computed, as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import INK
from bench.quality_chart import curves

LINES = {
    "selected": ("#1d4ed8", "o"),
    "vertical_slash": ("#c2410c", "^"),
    "a_shape": ("#a1a1aa", "v"),
}


def panel(axes: Any, rows: Sequence[dict[str, Any]], task: str, value: str) -> None:
    """One line per pattern, one point per choice of how much."""
    curves(axes, rows, LINES, "scores_share", task, value)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("scores computed, of causal attention", color=INK)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.quality_prefill`` document to ``path``."""
    rows = document["rows"]
    dense = next(row for row in rows if row["policy"] == "dense")["tasks"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), dpi=130)
    panel(left, rows, "passkey", "accuracy")
    left.axhline(dense["passkey"]["accuracy"], color=INK, linewidth=0.8, linestyle="--")
    left.set_ylim(-0.03, 1.03)
    left.set_ylabel(f"pass key found, of {dense['passkey']['answers']}", color=INK)
    panel(middle, rows, "text", "bits_per_byte")
    middle.axhline(dense["text"]["bits_per_byte"], color=INK, linewidth=0.8, linestyle="--")
    middle.set_ylabel("bits per byte of held-out text", color=INK)
    panel(right, rows, "text", "kl_from_dense")
    right.set_ylim(bottom=0)
    right.set_ylabel("KL divergence from dense, nats, same text", color=INK)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="lower center", ncols=3)
    context = rows[0]["context"]
    figure.suptitle(
        f"What skipping blocks of a prompt costs: lab model, {context} tokens; dashed: dense",
        color=INK,
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    plt.close(figure)
