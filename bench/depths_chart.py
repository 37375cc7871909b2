"""Draws what bench.depths_quality measured: bits per byte over what was skipped, and over time."""

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
PANELS = {
    "skipped": "attention skipped, layers of 8, in the mean",
    "time_saved": "time of a pass saved, % (CPU time, one sequence)",
}


def _x(row: dict[str, Any], field: str) -> float:
    if field == "skipped":
        return sum(1.0 - share for share in row["shares"].values())
    return float(row["time_saved"]) * 100


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the chart to ``path``."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 4.4), dpi=150, sharey=True)
    dense = next(row for row in rows if row["policy"] == "dense")
    for axes, (field, label) in zip(panels, PANELS.items(), strict=True):
        for policy, (name, colour, marker) in LINES.items():
            points = sorted(
                (_x(row, field), row["bits_per_byte"]) for row in rows if row["policy"] == policy
            )
            if not points:
                continue
            x, y = zip(*points, strict=True)
            joined = "-" if field == "skipped" and policy != "random" else "none"
            axes.plot(x, y, color=colour, marker=marker, linestyle=joined, label=name)
        axes.axhline(dense["bits_per_byte"], color=INK, linewidth=1, linestyle=":", label="dense")
        axes.set_xlabel(label, color=INK)
        axes.grid(color=FAINT)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("bits per byte, held-out source", color=INK)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_title("Lab model, attention of layers 3 to 7", loc="left", color=INK)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
