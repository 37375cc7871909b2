"""Draws what bench.ffn_experts --quality measured: bits per byte by share of neurons, as a PNG."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import FAINT, INK

LINES = {
    "clusters": ("balanced clusters, mean gate", "#1d4ed8", "o-"),
    "cut": ("neighbours, mean gate", "#0f766e", "D-"),
    "trained router": ("balanced clusters, trained router", "#7c3aed", "^-"),
    "random router": ("neighbours, random router", "#c2410c", "s--"),
}


def draw(source: Path, path: Path) -> None:
    """Write the chart of a result file of ``bench.ffn_experts --quality`` to ``path``."""
    document = json.loads(source.read_text())
    rows, dense = document["rows"], document["dense_bits_per_byte"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=160)
    for name, (label, colour, style) in LINES.items():
        points = sorted((100 * r["share"], r) for r in rows if r["what"] == name)
        if not points:
            continue
        shares = [share for share, _ in points]
        for axes, field in ((left, "bits_per_byte"), (right, "ffn_error_mean")):
            values = [row[field] for _, row in points]
            axes.plot(shares, values, style, color=colour, label=label, markersize=4)
    left.axhline(dense, color=INK, linewidth=1, linestyle=":", label=f"dense, {dense:.2f}")
    left.set_ylabel("bits per byte, held-out text", color=INK)
    right.set_ylabel("relative error of an FFN, mean of audited rows", color=INK)
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("neurons that run, %", color=INK)
        axes.grid(color=FAINT)
        axes.invert_xaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    experts = rows[0]["experts"]
    figure.suptitle(f"lab model, FFNs of {experts} experts", color=INK, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
