"""Draws what bench.token_merging measured: images a second, and cosine over tokens, as a PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import FAINT, INK

MERGED, IDEAL = "#1d4ed8", "#a16207"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.token_merging`` document to ``path``."""
    images, texts = document["rows"], document["quality"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=160)
    shares = [100 * row["kept_share"] for row in images]
    left.plot(shares, [1e3 / row["ideal_ms"] for row in images], "--", color=IDEAL, label="ideal")
    made = [row["images_per_s"] for row in images]
    left.plot(shares, made, "o-", color=MERGED, label="merged")
    for row, share, speed in zip(images, shares, made, strict=True):
        label = f"r={row['setting']}" if row["setting"] else "stock"
        left.annotate(label, (share, speed), (0, -14), textcoords="offset points", fontsize=8)
    left.set_xlabel("tokens of all layers, %", color=INK)
    left.set_ylabel("images a second", color=INK)
    left.set_ylim(0, 1.2 * max(made))
    left.legend(frameon=False, fontsize=8)
    left.set_title(images[0]["model"], color=INK, fontsize=10)
    shares = [100 * row["kept_share"] for row in texts]
    for name, label, style in (("mean", "mean", "o-"), ("min", "least", "s--")):
        values = [row[f"cosine_{name}"] for row in texts]
        right.plot(shares, values, style, color=MERGED, label=label)
    right.set_xlabel("tokens of all layers, %", color=INK)
    right.set_ylabel("cosine with the full embedding", color=INK)
    right.legend(frameon=False, fontsize=8)
    right.set_title(texts[0]["model"], color=INK, fontsize=10)
    for axes in (left, right):
        axes.grid(color=FAINT)
        axes.invert_xaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
