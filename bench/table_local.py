"""Tables of local and block-sparse attention, and of whole prompts."""

from bench.markdown import Document, machine_line, render, tokens_label

OPS = ("local_attention", "block_sparse_attention")
LEAST = 10
"""Ratios below this are shown with a digit after the point."""


def ratio(slow: float, fast: float) -> str:
    """How many times as fast, for people."""
    found = slow / fast
    return f"{found:.0f}x" if found >= LEAST else f"{found:.1f}x"


def local_ops_table(document: Document) -> str:
    """The ops: time, error, the best PyTorch loop, and attention to every key."""
    rows = []
    threads = max(row["threads"] for row in document["rows"])
    for row in document["rows"]:
        if row["threads"] != threads or row["op"] not in OPS:
            continue
        sizes, variants = row["sizes"], row["variants"]
        ours = next(v for v in variants.values() if v["kind"] == "native")
        best = variants[row["best_stock"]]
        which = f"window {sizes['window']}" if "window" in sizes else f"{sizes['chosen']} blocks"
        others = [
            f"{ratio(v['us'], ours['us'])} {name}"
            for name, v in variants.items()
            if name in ("SDPA, dense mask", "SDPA, causal", "adaptive, causal")
        ]
        tokens = tokens_label(sizes["tokens"])
        rows.append(
            [
                f"`{row['op']}`, {row['dtype']}, {tokens}, head size {sizes['head_dim']}, {which}",
                f"{ours['us'] / 1e3:.0f} ms (error {ours['error']:.0e})",
                f"{best['us'] / 1e3:.0f} ms (error {best['error']:.0e}; {row['best_stock']})",
                ratio(best["us"], ours["us"]),
                ", ".join(others),
            ]
        )
    header = [
        f"threads: {threads}",
        "**adaptive**",
        "best PyTorch loop",
        "ratio",
        "times the speed of",
    ]
    return (
        render(header, rows)
        + "\n\nAs many queries as keys, 32 query and 8 KV heads, median CPU time; blocks are the "
        + "most that a row of 64 queries sees, of 64 keys each; error: largest difference from "
        + "float64, over the largest value. "
        + machine_line(document)
    )


def prompts_table(document: Document) -> str:
    """Reading a prompt: time, error and peak memory, stock and patched."""
    rows = []
    for row in document["rows"]:
        stock, patched = row["variants"]["stock"], row["variants"]["patched"]
        alone = row["variants"]["patched, stock linears"]
        rows.append(
            [
                row["model"],
                *(f"{v['ms'] / 1e3:.2f} s (error {v['error']:.0e})" for v in (stock, patched)),
                f"{patched['speedup']:.2f}x",
                f"{alone['speedup']:.2f}x",
                " / ".join(f"{v['peak_bytes'] / 2**20:.0f} MiB" for v in (stock, patched)),
            ]
        )
    first = document["rows"][0]
    layers = f"{first['layers']} layer{'s' * (first['layers'] > 1)}"
    header = ["prompt", "stock", "**patched**", "ratio", "with stock linear layers"]
    header += ["more memory at the peak: stock / patched"]
    return (
        render(header, rows)
        + f"\n\n{layers} of the width of Llama-3.2-1B, random weights, "
        + f"{first['dtype']}, {first['threads']} CPU threads, median; error: largest difference of "
        + f"the last 64 outputs from {first['error_against']}, over the largest. "
        + machine_line(document)
    )
