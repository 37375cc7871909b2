"""Draws what bench.token_pruning measured: images a second, and cosine over tokens, as a PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import INK
from bench.token_merging_chart import MERGED, draw_images, finish

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
    draw_images(left, images, "pruned", PRUNED, "keep={:g}")
    for method, (color, style) in STYLES.items():
        rows = [row for row in texts if row["method"] in ("exact", method)]
        values = [row["cosine_mean"] for row in rows]
        shares = [100 * row["kept_share"] for row in rows]
        right.plot(shares, values, style, color=color, label=method, markersize=4)
    right.set_ylabel("mean cosine with the full embedding", color=INK)
    right.set_title(texts[0]["model"], color=INK, fontsize=10)
    finish(figure, path)
