"""Draws milliseconds per token by context length, stock against patched, as a PNG."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.markdown import tokens_label

LINES = {
    "stock default": ("stock, default cache", "#c2410c", "o"),
    "stock StaticCache": ("stock, StaticCache", "#a1a1aa", "s"),
    "patched": ("adaptive.patch(model)", "#1d4ed8", "D"),
}
INK, FAINT = "#27272a", "#e4e4e7"


def subtitle(rows: list[dict[str, Any]]) -> str:
    """What was run, and the largest logit error of stock and patched: no speed without it."""
    first = rows[0]
    threads = f"{first['threads']} CPU thread{'s' * (first['threads'] != 1)}"
    worst = {
        name: max((r["variants"][name]["error"] for r in rows if name in r["variants"]), default=0)
        for name in ("stock default", "patched")
    }
    return (
        f"{first['model']} shape, {first['dtype']}, {threads}; largest logit error "
        f"{worst['patched']:.1e} patched, {worst['stock default']:.1e} stock"
    )


def label_offsets(ends: dict[str, float]) -> dict[str, int]:
    """Points by which to move the label of each line's end, so that close ones do not overlap."""
    offsets = dict.fromkeys(ends, 0)
    for upper, lower in pairwise(sorted(ends, key=lambda name: -ends[name])):
        if ends[upper] < 1.35 * ends[lower]:
            offsets[upper] += 9
            offsets[lower] -= 9
    return offsets


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.models`` document to ``path``."""
    rows = sorted(document["rows"], key=lambda row: row["context"])
    lift = label_offsets({name: v["ms"] for name, v in rows[-1]["variants"].items()})
    figure, axes = plt.subplots(figsize=(8, 4.4), dpi=200)
    for name, (label, colour, marker) in LINES.items():
        points = [(r["context"], r["variants"][name]["ms"]) for r in rows if name in r["variants"]]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        wide = 2.6 if name == "patched" else 1.8
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=wide)
        axes.annotate(
            f"{label}\n{y[-1]:,.0f} ms",
            (x[-1], y[-1]),
            xytext=(9, lift.get(name, 0)),
            textcoords="offset points",
            color=colour if name != "stock StaticCache" else "#71717a",
            fontsize=9,
            fontweight="bold" if name == "patched" else "normal",
            va="center",
        )
    contexts = [row["context"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [tokens_label(c) for c in contexts])
    axes.set_xlim(contexts[0] * 0.9, contexts[-1] * 1.1)
    low, high = axes.get_ylim()
    ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:,} ms" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.set_xlabel("tokens in the KV cache", color=INK, fontsize=9)
    axes.set_title("Time per generated token", loc="left", color=INK, fontsize=13, pad=24)
    axes.text(
        0,
        1.035,
        f"{subtitle(rows)}; both axes logarithmic",
        transform=axes.transAxes,
        color="#52525b",
        fontsize=8.5,
    )
    figure.subplots_adjust(left=0.09, right=0.78, top=0.85, bottom=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    plt.close(figure)
