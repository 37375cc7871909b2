"""Draws what bench.token_merging measured: images a second, and cosine over tokens, as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.chart import FAINT, INK

MERGED, IDEAL = "#1d4ed8", "#a16207"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.token_merging`` document to ``path``."""
    images, texts = document["rows"], document["quality"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=160)
    draw_images(left, images, "merged", MERGED, "r={}")
    shares = [100 * row["kept_share"] for row in texts]
    for name, label, style in (("mean", "mean", "o-"), ("min", "least", "s--")):
        values = [row[f"cosine_{name}"] for row in texts]
        right.plot(shares, values, style, color=MERGED, label=label)
    right.set_ylabel("cosine with the full embedding", color=INK)
    right.set_title(texts[0]["model"], color=INK, fontsize=10)
    finish(figure, path)


def draw_images(
    axes: Axes, images: Sequence[Mapping[str, Any]], name: str, color: str, label: str
) -> None:
    """Images a second over the tokens that are left; the first of them is stock."""
    shares = [100 * row["kept_share"] for row in images]
    axes.plot(shares, [1e3 / row["ideal_ms"] for row in images], "--", color=IDEAL, label="ideal")
    made = [row["images_per_s"] for row in images]
    axes.plot(shares, made, "o-", color=color, label=name)
    for row, share, speed in zip(images, shares, made, strict=True):
        text = "stock" if row is images[0] else label.format(row["setting"])
        axes.annotate(text, (share, speed), (0, -14), textcoords="offset points", fontsize=8)
    axes.set_ylabel("images a second", color=INK)
    axes.set_ylim(0, 1.2 * max(made))
    axes.set_title(images[0]["model"], color=INK, fontsize=10)


def finish(figure: Figure, path: Path) -> None:
    """Give each of the axes what they share, and write the PNG."""
    for axes in figure.axes:
        axes.set_xlabel("tokens of all layers, %", color=INK)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color=FAINT)
        axes.invert_xaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
