"""Writes README tables and the chart from result files: python -m bench.table RESULT.json ...

A table goes between the lines ``<!-- table:begin NAME -->`` and ``<!-- table:end NAME -->``. A
speed never appears without the error measured beside it. ``--check`` writes nothing and fails when
a table is not what the results say.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.markdown import Document, machine_line, render, tokens_label
from bench.record import load
from bench.table_encoders import (
    encoder_exit_table,
    encoders_quality_table,
    encoders_table,
    token_merging_quality_table,
    token_merging_table,
    token_pruning_quality_table,
    token_pruning_table,
)
from bench.table_local import local_ops_table, prompts_table
from bench.table_prefill import prefill_table, quality_prefill_table
from bench.table_skip_search import skip_search_table
from bench.table_sparse import quality_table, sparse_models_table, sparse_ops_table
from bench.table_speculation import forced_table, siblings_table, speculation_table
from bench.table_zoo import block_transformer_table, depth_batching_table

HEADLINE_TOKENS = (16384, 32768)


def models_table(document: Document) -> str:
    """Decoding of a whole model: milliseconds a token and logit error of each variant."""
    rows = []
    for row in sorted(document["rows"], key=lambda row: row["context"]):
        variants = row["variants"]
        cells = [
            f"{v['ms']:.0f} ms (error {v['error']:.1e})" if (v := variants.get(name)) else "-"
            for name in ("stock default", "stock StaticCache", "patched")
        ]
        ratios = row["speedup_over"]
        rows.append(
            [
                tokens_label(row["context"]),
                *cells,
                *(
                    f"{ratios[name]:.2f}x" if name in ratios else "-"
                    for name in ("stock default", "stock StaticCache")
                ),
                " / ".join(
                    f"{v['argmax_agreement']:.0%}" if (v := variants.get(name)) else "-"
                    for name in ("stock StaticCache", "patched")
                ),
            ]
        )
    first = document["rows"][0]
    header = ["context", "stock `generate` default", "stock StaticCache", "**patched**"]
    header += ["vs default", "vs StaticCache", "same best token as default: StaticCache / patched"]
    return (
        render(header, rows)
        + f"\n\n{first['model']} shape, random weights, synthetic KV cache, {first['dtype']}, "
        + f"{first['threads']} CPU threads, median milliseconds per token; error: largest "
        + f"difference of the logits from {first['error_against']}, over the largest logit. "
        + "Random weights leave the best tokens near ties: how often the stock caches agree is the "
        + "yardstick. "
        + machine_line(document)
    )


def memory_table(document: Document) -> str:
    """Peak memory of decoding above the weights, by variant."""
    found = document.get("memory", [])
    if not found:
        raise ValueError("bench: memory must be in the result document for this table, got none")
    rows = [
        [
            row["variant"],
            tokens_label(row["context"]),
            f"{row['kv_bytes'] / 2**20:.0f} MiB",
            f"{row['peak_bytes'] / 2**20:.0f} MiB",
            f"{row['peak_over_kv']:.2f}x",
        ]
        for row in found
    ]
    return render(["variant", "context", "KV bytes", "peak above the weights", "ratio"], rows)


def ops_table(document: Document) -> str:
    """The op on one thread at long contexts: time, bandwidth share and error of each form."""
    rows = []
    for row in document["rows"]:
        tokens = row["sizes"].get("capacity")
        wanted = row["op"] == "decode_attention" and tokens in HEADLINE_TOKENS
        if row["threads"] != 1 or not wanted:
            continue
        ours = next(v for v in row["variants"].values() if v["kind"] == "native")
        best = row["variants"][row["best_stock"]]
        gqa = row["variants"]["SDPA enable_gqa"]
        rows.append(
            [
                f"{row['dtype']}, head_dim {row['sizes']['head_dim']}, {tokens_label(tokens)}",
                f"{ours['us'] / 1e3:.2f} ms (error {ours['error']:.0e})",
                f"{ours['share']:.0%}",
                f"{best['us'] / 1e3:.2f} ms (error {best['error']:.0e}; {row['best_stock']})",
                f"{best['us'] / ours['us']:.1f}x",
                f"{gqa['us'] / 1e3:.1f} ms (error {gqa['error']:.0e})",
                f"{gqa['us'] / ours['us']:.0f}x",
            ]
        )
    header = ["one thread", "**adaptive**", "of read bandwidth", "best stock form", "ratio"]
    header += ["`SDPA(enable_gqa=True)`", "ratio"]
    return (
        render(header, sorted(rows))
        + "\n\nOne query token, 32 query and 8 KV heads, cold caches, median CPU time; error: "
        + "largest difference from float64, over the largest value. "
        + machine_line(document)
    )


def modules_table(document: Document) -> str:
    """Plain PyTorch modules: time and error, stock, patched, and with a memory projected once."""
    rows = []
    for row in document["rows"]:
        queries = f"{row['queries']} quer{'y' if row['queries'] == 1 else 'ies'}"
        before = row["variants"].get("projected before")
        size = f"width {row['width']}, {row['heads']} heads, {tokens_label(row['memory'])} tokens"
        rows.append(
            [
                f"`{row['what']}`, {row['dtype']}, {size}, {queries}",
                *(
                    f"{v['us'] / 1e3:.1f} ms (error {v['error']:.0e})"
                    if (v := row["variants"].get(name))
                    else "-"
                    for name in ("stock", "patched")
                ),
                f"{row['speedup']:.1f}x",
                f"{before['us'] / 1e3:.1f} ms (error {before['error']:.0e})" if before else "-",
            ]
        )
    header = ["one thread", "stock", "**patched**", "ratio", "memory projected before, by hand"]
    return (
        render(header, rows)
        + "\n\nBatch 1, cold caches, median CPU time; error: largest difference from float64, "
        + "over the largest value. "
        + machine_line(document)
    )


TABLES: dict[str, tuple[str, Callable[[Document], str]]] = {
    "block_transformer": ("block_transformer", block_transformer_table),
    "depth_batching": ("depth_batching", depth_batching_table),
    "decode": ("models", models_table),
    "local_ops": ("ops", local_ops_table),
    "encoder_exit": ("encoder_exit", encoder_exit_table),
    "encoders": ("encoders", encoders_table),
    "encoders_quality": ("encoders", encoders_quality_table),
    "memory": ("models", memory_table),
    "modules": ("modules", modules_table),
    "ops": ("ops", ops_table),
    "prefill": ("prefill", prefill_table),
    "prompts": ("prompts", prompts_table),
    "quality": ("quality", quality_table),
    "quality_prefill": ("quality_prefill", quality_prefill_table),
    "siblings": ("siblings", siblings_table),
    "skip_search": ("skip_search", skip_search_table),
    "speculation": ("speculation", speculation_table),
    "speculation_forced": ("speculation_shape", forced_table),
    "sparse_models": ("models", sparse_models_table),
    "sparse_ops": ("ops", sparse_ops_table),
    "token_merging": ("token_merging", token_merging_table),
    "token_merging_quality": ("token_merging", token_merging_quality_table),
    "token_pruning": ("token_pruning", token_pruning_table),
    "token_pruning_quality": ("token_pruning", token_pruning_quality_table),
}
"""Name between the markers -> kind of result file it is made from, and how."""


def replace(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the markers of ``name``.

    Raises:
        LookupError: The pair of markers is not there exactly once.
    """
    begin, end = f"<!-- table:begin {name} -->", f"<!-- table:end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise LookupError(
            f"bench: the file must have the lines {begin!r} and {end!r} once, in this order, got "
            f"{text.count(begin)} and {text.count(end)}"
        )
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def update(text: str, documents: Sequence[Document]) -> str:
    """``text`` with every table it has markers for that the documents can fill.

    Raises:
        LookupError: The text has markers for no table that the documents can fill.
    """
    written = 0
    for document in documents:
        for name, (kind, make) in TABLES.items():
            if kind == document["benchmark"] and f"table:begin {name} " in text:
                text = replace(text, name, make(document))
                written += 1
    if not written:
        wanted = [n for n, (k, _) in TABLES.items() if k in {d["benchmark"] for d in documents}]
        raise LookupError(
            "bench: the file must have markers for one of these tables: " + ", ".join(wanted)
        )
    return text


def main() -> None:
    """Update the file and, with ``--chart``, draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--file", type=Path, default=Path("README.md"))
    parser.add_argument("--chart", type=Path, help="PNG of ms/token by context to draw")
    parser.add_argument("--check", action="store_true", help="fail where a table is out of date")
    options = parser.parse_args()
    documents = [load(path) for path in options.results]
    before = options.file.read_text()
    after = update(before, documents)
    if options.check:
        sys.exit(f"{options.file}: tables differ from the results" if after != before else 0)
    options.file.write_text(after)
    if options.chart:
        from bench.chart import draw

        models = [d for d in documents if d["benchmark"] == "models"]
        if not models:
            raise LookupError("bench: --chart needs a result file of bench.models, got none")
        draw(models[-1], options.chart)


if __name__ == "__main__":
    main()
