"""Draws what bench.speculation measured on the lab model: heat maps of speed and acceptance."""

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench.chart import INK

_CELL = re.compile(r"exit (\d+), (\d+)")
SLOWEST, FASTEST = 0.4, 1.9
"""Ends of the colour scale; its middle is "as fast as without"."""


def grid(variants: dict[str, Any]) -> tuple[list[int], list[int], np.ndarray, np.ndarray]:
    """Exit layers, draft lengths, and for each pair the speed-up and the acceptance."""
    found = {
        (int(match[1]), int(match[2])): row
        for name, row in variants.items()
        if (match := _CELL.fullmatch(name))
    }
    exits = sorted({layer for layer, _ in found})
    drafts = sorted({draft for _, draft in found})
    speed = np.array([[found[e, d]["speedup"] for d in drafts] for e in exits])
    acceptance = np.array([[found[e, d]["acceptance"] or 0.0 for d in drafts] for e in exits])
    return exits, drafts, speed, acceptance


def draw(document: dict[str, Any], path: Path) -> None:
    """Write one heat map per text to ``path``, and the other variants as a line below each."""
    rows = [row for row in document["rows"] if row["what"] == "lab"]
    figure, panels = plt.subplots(1, len(rows), figsize=(4.4 * len(rows), 3.9), squeeze=False)
    scale = mpl.colors.TwoSlopeNorm(vcenter=1.0, vmin=SLOWEST, vmax=FASTEST)
    for axes, row in zip(panels[0], rows, strict=True):
        exits, drafts, speed, acceptance = grid(row["variants"])
        image = axes.imshow(speed, cmap="RdBu", norm=scale, aspect="auto")
        for (y, x), value in np.ndenumerate(speed):
            colour = "white" if value < 0.6 or value > 1.6 else INK
            text = f"{value:.2f}x\n{acceptance[y, x]:.0%}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(drafts)), drafts)
        axes.set_yticks(range(len(exits)), exits)
        axes.set_xlabel("tokens drafted per check", color=INK)
        axes.set_ylabel("layers that draft, of 8", color=INK)
        adaptive = max(
            value["speedup"] for name, value in row["variants"].items() if "adaptive" in name
        )
        tree = row["variants"]["tree"]["speedup"]
        axes.set_title(
            f"{row['text']}: adaptive {adaptive:.2f}x, tree {tree:.2f}x", fontsize=10, color=INK
        )
    figure.colorbar(image, ax=panels[0].tolist(), label="speed of the exact path", shrink=0.9)
    figure.suptitle("Self-speculation on the lab model: speed-up, and drafts accepted", color=INK)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
