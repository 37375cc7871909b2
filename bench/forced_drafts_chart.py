"""Draws what bench.forced_drafts found: speeds that the cost model promised, and those measured."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import FAINT, INK

COLOURS = {1: "#a1a1aa", 2: "#c2410c", 4: "#1d4ed8", 8: "#15803d"}
TITLES = {False: "drafts of 4 of 16 layers", True: "with siblings"}


def curves(document: dict[str, Any], siblings: bool) -> dict[int, list[tuple[float, float, float]]]:
    """By number of drafts: shares accepted, what was promised and what was measured."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    for row in document["rows"]:
        if row["siblings"] == siblings:
            point = row["accepted"], row["promised"], row["measured"]
            found.setdefault(row["draft"], []).append(point)
    return {draft: sorted(points) for draft, points in found.items()}


def draw(document: dict[str, Any], path: Path) -> None:
    """Write one panel without siblings and one with them to ``path``."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True)
    for axes, siblings in zip(panels, (False, True), strict=True):
        for draft, points in curves(document, siblings).items():
            shares, promised, measured = zip(*points, strict=True)
            colour = COLOURS[draft]
            axes.plot(shares, promised, color=colour, linewidth=1.6, label=f"{draft} drafted")
            axes.plot(shares, measured, color=colour, marker="o", linestyle="none", markersize=5)
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("share of drafts accepted", color=INK)
        axes.set_title(TITLES[siblings], fontsize=10, color=INK)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(color=FAINT, linewidth=0.6)
    panels[0].set_ylabel("speed of plain decoding", color=INK)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle("Promised by the cost model (lines) and measured (points)", color=INK)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
