"""Charts of the lab model's training and evaluation (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def loss_chart(log: Path, target: Path) -> None:
    """Draw training loss, held-out loss and passkey accuracy over tokens seen."""
    plt = _pyplot()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    millions = [row["tokens"] / 1e6 for row in rows]
    top.plot(millions, [row["loss"] for row in rows], lw=0.5, alpha=0.6, label="training mixture")
    checks = [row for row in rows if "passkey" in row]
    seen = [row["tokens"] / 1e6 for row in checks]
    top.plot(seen, [row["heldout_nats"] for row in checks], "o-", ms=3, label="held-out text")
    top.set_ylabel("nats per token")
    top.legend()
    for length in sorted({k for row in checks for k in row["passkey"]}, key=int):
        pairs = [(s, r["passkey"][length]) for s, r in zip(seen, checks, strict=True)
                 if length in r["passkey"]]  # fmt: skip
        bottom.plot(*zip(*pairs, strict=True), "o-", ms=3, label=f"{length} tokens")
    phases: list[str] = []
    for row, x in zip(rows, millions, strict=True):
        if row["phase"] not in phases:
            phases.append(row["phase"])
            for axis in (top, bottom):
                axis.axvline(x, color="0.8", lw=0.8, zorder=0)
            top.text(x, top.get_ylim()[1], row["phase"], fontsize=7, rotation=30)
    bottom.set_ylabel("passkey accuracy")
    bottom.set_xlabel("million tokens seen")
    bottom.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def passkey_chart(passkey: dict[str, Any], target: Path) -> None:
    """Draw the heat map of passkey accuracy by depth and length."""
    plt = _pyplot()
    lengths = list(passkey["lengths"])
    grid = [passkey["lengths"][length]["by_depth"] for length in lengths]
    figure, axis = plt.subplots(figsize=(8, 3.2))
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(passkey["depths"])), [f"{d:g}" for d in passkey["depths"]])
    axis.set_yticks(range(len(lengths)), lengths)
    axis.set_xlabel("depth of the needle (0: start, 1: just before the question)")
    axis.set_ylabel("prompt tokens")
    axis.set_title(f"passkey accuracy, {passkey['seeds']} prompts per cell")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def exit_chart(results: dict[str, Any], target: Path) -> None:
    """Draw bits per byte, next-token accuracy, copying and passkey by exit layer."""
    plt = _pyplot()
    text = results["text"]["long_document"]
    layers = range(1, len(text["accuracy_by_exit"]) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(layers, text["bits_per_byte_by_exit"], "o-")
    left.set_ylabel("bits per byte, held-out document")
    right.plot(layers, text["accuracy_by_exit"], "o-", label="next token, held-out document")
    right.plot(layers, results["copy_accuracy_by_exit"], "s-", label="copy of random tokens")
    for length, row in results["passkey"]["lengths"].items():
        right.plot(layers, row["by_exit"], ".--", lw=0.9, label=f"passkey at {length}")
    right.set_ylabel("accuracy")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("layers run before the exit")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def induction_chart(scores: list[list[float]], target: Path) -> None:
    """Draw the prefix-matching score of every head."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(4, 5))
    image = axis.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, values in enumerate(scores):
        for column, value in enumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="w", fontsize=8)
    axis.set_xticks(range(len(scores[0])))
    axis.set_yticks(range(len(scores)))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title("prefix matching on\nrepeated random tokens", fontsize=10)
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_all(results: dict[str, Any], log: Path, folder: Path) -> None:
    """Write every chart into ``folder``; the loss curve only where a log is at hand."""
    if log.exists():
        loss_chart(log, folder / "loss.png")
    passkey_chart(results["passkey"], folder / "passkey.png")
    exit_chart(results, folder / "exits.png")
    induction_chart(results["induction"]["scores"], folder / "induction.png")
