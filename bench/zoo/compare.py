"""Compare what bench.zoo.train made: a table, a JSON file and a picture of the losses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.zoo.train import BATCH, CONTEXT, LAYERS, SIZES, build

HERE = Path(__file__).parent
TITLES = {
    "vanilla": "vanilla",
    "vanilla-4": "vanilla",
    "block": "Block Transformer",
    "block-deep": "Block Transformer, deeper",
    "expert": "recursive, expert choice",
    "token": "recursive, token choice",
}
GROUPS = {
    "block": ("vanilla", "block", "block-deep"),
    "recursive": ("vanilla-4", "vanilla", "expert", "token"),
}
"""What is compared with what."""
FILES = {
    "block": (HERE / "results.json", "block_transformer.png"),
    "recursive": (HERE / "recursive.json", "recursive.png"),
}
SMOOTH = 16
"""Steps over which the training loss is averaged."""


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a log in order; of steps that a resumed run repeated, the last ones."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def common(logs: list[list[dict[str, Any]]]) -> int:
    """The largest number of tokens after which every run was evaluated."""
    evaluated = [{row["tokens"] for row in rows if "bits_per_byte" in row} for rows in logs]
    shared = set.intersection(*evaluated)
    if not shared:
        raise ValueError("bench: every run must be evaluated after the same tokens once, got none")
    return max(shared)


def summary(name: str, rows: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """What one run came to after so many tokens, and its curves."""
    rows = [row for row in rows if row["tokens"] <= tokens]
    evaluated = [row for row in rows if "bits_per_byte" in row]
    last = rows[-1]
    report = build(name).report()
    return {
        "model": name,
        "layers": list(LAYERS[name]),
        "mean_layers": evaluated[-1].get("mean_layers", sum(LAYERS[name])),
        "parameters": report.parameters,
        "kv_bytes_per_token": report.kv_bytes_per_token,
        "tokens": last["tokens"],
        "bits_per_byte": evaluated[-1]["bits_per_byte"],
        "cpu_seconds": last["seconds"],
        "tokens_per_cpu_second": round(last["tokens"] / last["seconds"], 1),
        "heldout": [[row["tokens"], row["bits_per_byte"]] for row in evaluated],
        "training": [[row["tokens"], row["loss"]] for row in rows],
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | layers | parameters | KV bytes per token | tokens trained on | "
        "bits per byte, held out | tokens per CPU second of training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        layers = " + ".join(map(str, row["layers"])) + _run(row)
        lines.append(
            f"| {TITLES[row['model']]} | {layers} | {row['parameters'] / 1e6:.2f} M | "
            f"{row['kv_bytes_per_token']:.0f} | {row['tokens'] / 1e6:.2f} M | "
            f"{row['bits_per_byte']:.3f} | {row['tokens_per_cpu_second']:.0f} |"
        )
    return "\n".join(lines)


def _run(row: dict[str, Any]) -> str:
    """How many layers a token passes, where these are not all once."""
    told = row["mean_layers"] != sum(row["layers"])
    return f", {row['mean_layers']:.2f} run" if told else ""


def draw(found: list[dict[str, Any]], target: Path) -> None:
    """Losses over tokens, and over the CPU time that they took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for color, row in zip(("C0", "C1", "C2", "C3"), found, strict=False):
        tokens = [t / 1e6 for t, _ in row["heldout"]]
        bits = [b for _, b in row["heldout"]]
        rate = row["tokens_per_cpu_second"] * 60 / 1e6  # million tokens in a minute
        label = f"{TITLES[row['model']]}{_run(row)}, {row['parameters'] / 1e6:.2f} M"
        axes[0].plot(tokens, bits, "o-", ms=3, color=color, label=label)
        axes[1].plot([t / rate for t in tokens], bits, "o-", ms=3, color=color, label=label)
    axes[0].set_xlabel("million tokens of training text")
    axes[1].set_xlabel("CPU minutes of training, one thread")
    axes[0].set_ylabel("bits per byte, held-out source")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Read the command line, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.zoo.compare", description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder that bench.zoo.train wrote")
    add("--group", choices=sorted(GROUPS), default="block", help="which models")
    add("--json", type=Path, help="instead of the file that the documentation is made from")
    add("--chart", type=Path, help="instead of the documentation's picture")
    options = parser.parse_args()
    logs = {name: options.work / f"{name}.jsonl" for name in GROUPS[options.group]}
    runs = {name: read(path) for name, path in logs.items() if path.exists()}
    tokens = common(list(runs.values()))
    found = [summary(name, rows, tokens) for name, rows in runs.items()]
    settings = {**SIZES, "context": CONTEXT, "batch": BATCH}
    target, picture = FILES[options.group]
    (options.json or target).write_text(json.dumps({"settings": settings, "models": found}) + "\n")
    draw(found, options.chart or HERE.parents[1] / "docs" / "img" / picture)
    print(table(found))


if __name__ == "__main__":
    main()
