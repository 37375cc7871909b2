"""Draws what bench.depths_quality measured: bits per byte over the time saved, as a PNG."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import FAINT, INK

LINES = {
    "tuned": ("routers after tuning (MindSkip)", "#1d4ed8", "o"),
    "least changing": ("dropped for all: the least changing", "#15803d", "s"),
    "last": ("dropped for all: the last", "#a16207", "^"),
    "random": ("routers that nobody trained", "#a1a1aa", "v"),
}


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the chart to ``path``."""
    figure, axes = plt.subplots(figsize=(8, 4.4), dpi=150)
    for policy, (label, colour, marker) in LINES.items():
        points = sorted(
            (row["time_saved"] * 100, row["bits_per_byte"])
            for row in rows
            if row["policy"] == policy
        )
        if not points:
            continue
        x, y = zip(*points, strict=True)
        style = "none" if policy == "random" else "-"
        axes.plot(x, y, color=colour, marker=marker, linestyle=style, linewidth=1.8, label=label)
    dense = next(row for row in rows if row["policy"] == "dense")
    axes.axhline(dense["bits_per_byte"], color=INK, linewidth=1, linestyle=":", label="dense")
    axes.set_xlabel("time of a pass saved, % (one sequence of 256 tokens)", color=INK)
    axes.set_ylabel("bits per byte, held-out source", color=INK)
    axes.grid(color=FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title("Lab model, attention of layers 3 to 7 skipped", loc="left", color=INK)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
