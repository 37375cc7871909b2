"""Draws what bench.quality measured: quality over the share of keys and values read, as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.chart import FAINT, INK

LINES = {
    "TidalDecode": ("#1d4ed8", "o"),
    "TidalDecode, calibrated": ("#0891b2", "D"),
    "TidalDecode x RazorAttention": ("#15803d", "P"),
    "RazorAttention": ("#a16207", "s"),
    "Quest": ("#c2410c", "^"),
    "StreamingLLM": ("#a1a1aa", "v"),
}


def curves(
    axes: Any,
    rows: Sequence[dict[str, Any]],
    lines: Mapping[str, tuple[str, str]],
    share: str,
    task: str,
    value: str,
) -> None:
    """One line for each policy in ``lines``, over the field ``share`` of its rows."""
    for policy, (colour, marker) in lines.items():
        points = sorted(
            (row[share], row["tasks"][task][value])
            for row in rows
            if row["policy"] == policy and task in row["tasks"]
        )
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=policy)
    axes.grid(color=FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def panel(axes: Any, rows: Sequence[dict[str, Any]], task: str, value: str) -> None:
    """One line per policy, one point per budget."""
    curves(axes, rows, LINES, "kv_read_share", task, value)
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.03, 0.1, 0.3, 1.0], ["1 %", "3 %", "10 %", "30 %", "100 %"])
    axes.set_xlim(0.008, 1.1)
    axes.minorticks_off()
    axes.set_xlabel("keys and values read per token, of dense", color=INK)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the chart of a ``bench.quality`` document to ``path``."""
    rows = document["rows"]
    dense = next(row for row in rows if row["policy"] == "dense")["tasks"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), dpi=160)
    panel(left, rows, "passkey", "accuracy")
    left.axhline(dense["passkey"]["accuracy"], color=INK, linewidth=0.8, linestyle="--")
    left.set_ylim(-0.03, 1.03)
    left.set_ylabel(f"pass key found, of {dense['passkey']['answers']}", color=INK)
    panel(right, rows, "text", "kl_from_dense")
    right.set_yscale("log")
    right.set_ylabel("KL divergence from dense, nats, held-out text", color=INK)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=6)
    context = rows[0]["context"]
    figure.suptitle(
        f"What skipping keys costs: lab model, {context} tokens, answers decoded sparsely",
        color=INK,
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    plt.close(figure)
