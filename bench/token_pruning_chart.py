"""Draws what bench.token_pruning measured: images a second, and cosine over tokens, as a PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import FAINT, INK
from bench.token_merging_chart import IDEAL, MERGED

PRUNED = "#047857"
STYLES = {
    "pruned": (PRUNED, "o-"),
    "by information": (PRUNED, "s--"),
    "into a sum": (PRUNED, "^:"),
    "cached": (PRUNED, "v:"),
    "merged, same layers": (MERGED, "o-"),
    "merged, every layer": (MERGED, "s--"),
}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.token_pruning`` document to ``path``."""
    images, texts = document["rows"], document["quality"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=160)
    shares = [100 * row["kept_share"] for row in images]
    left.plot(shares, [1e3 / row["ideal_ms"] for row in images], "--", color=IDEAL, label="ideal")
    made = [row["images_per_s"] for row in images]
    left.plot(shares, made, "o-", color=PRUNED, label="pruned")
    for row, share, speed in zip(images, shares, made, strict=True):
        label = f"keep={row['setting']:g}" if row["setting"] < 1 else "stock"
        left.annotate(label, (share, speed), (0, -14), textcoords="offset points", fontsize=8)
    left.set_ylabel("images a second", color=INK)
    left.set_ylim(0, 1.2 * max(made))
    left.set_title(images[0]["model"], color=INK, fontsize=10)
    for method, (color, style) in STYLES.items():
        rows = [row for row in texts if row["method"] in ("exact", method)]
        values = [row["cosine_mean"] for row in rows]
        shares = [100 * row["kept_share"] for row in rows]
        right.plot(shares, values, style, color=color, label=method, markersize=4)
    right.set_ylabel("mean cosine with the full embedding", color=INK)
    right.set_title(texts[0]["model"], color=INK, fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("tokens of all layers, %", color=INK)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color=FAINT)
        axes.invert_xaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
