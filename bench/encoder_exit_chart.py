"""Draws what bench.encoder_exit measured: cosine over time, and time over layers, as a PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import FAINT, INK

LINES = {
    "fixed": ("every sentence at one depth", "#a16207", "s"),
    "cosine": ("by the cosine of its states", "#1d4ed8", "o"),
    "gate": ("where a gate says", "#c2410c", "^"),
}
TARGET = 0.85
"""Of the share of layers that is skipped, what has to be saved of the time."""


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.encoder_exit`` document to ``path``."""
    rows = document["rows"]
    exact = next(row for row in rows if row["rule"] == "exact")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), dpi=160)
    for rule, (label, colour, marker) in LINES.items():
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}
        found = sorted((r for r in rows if r["rule"] == rule), key=lambda r: r["skipped_share"])
        times = [100 * (1 - row["time_saved"]) for row in found]
        left.plot(times, [row["cosine_mean"] for row in found], label=label, **style)
        shares = [100 * row["skipped_share"] for row in found]
        right.plot(shares, [100 * row["time_saved"] for row in found], **style)
    left.plot([100], [1.0], color=INK, marker="D", markersize=6)
    left.annotate("all layers", (100, 1.0), (12, 6), textcoords="offset points", ha="right")
    right.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle="--")
    right.plot([0, 100], [0, 100 * TARGET], color=INK, linewidth=0.8, linestyle=":")
    right.annotate("all of it", (60, 63), color=INK, fontsize=8, ha="right")
    right.annotate("85 % of it", (72, 56), color=INK, fontsize=8)
    left.set_xlabel("time, % of all layers", color=INK)
    left.set_ylabel("cosine with the full embedding, mean", color=INK)
    left.set_ylim(0, 1.05)
    right.set_xlabel("layers skipped, %", color=INK)
    right.set_ylabel("time saved, %", color=INK)
    for axes in (left, right):
        axes.grid(color=FAINT)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="lower center", ncols=len(LINES))
    figure.suptitle(
        f"Leaving {exact['model']} early: {exact['sentences']} sentences in padded batches of "
        f"{exact['batch']}",
        color=INK,
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    plt.close(figure)
