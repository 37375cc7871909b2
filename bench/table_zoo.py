"""Tables of the zoo: a Block Transformer beside a vanilla model, depth-wise batching."""

from typing import Any

from bench.markdown import Document, machine_line, render


def _cell(found: dict[str, Any], name: str) -> str:
    form = name.partition(", ")[2]
    batch = f"batch {found['batch']}, " if found.get("show_batch") else ""
    return (
        f"{found['tokens_per_s']:.0f} tokens/s ({batch}{form}, prompts {found['prefill_s']:.1f} s, "
        f"KV {found['kv_bytes'] / 2**20:.0f} MiB, error {found['error']:.0e})"
    )


def block_transformer_table(document: Document) -> str:
    """Throughput of both models, each in its faster form, and how decoding alone compares."""
    rows = []
    for row in document["rows"]:
        limit = row["batch"] == "limit"
        cells = []
        for kind in ("vanilla", "block"):
            name = row["speedup"]["tokens_per_s"][kind]
            cells.append(_cell({**row["variants"][name], "show_batch": limit}, name))
        sizes = row["parameters"]
        rows.append(
            [
                f"{sizes['vanilla'] / 1e6:.0f} M / {sizes['block'] / 1e6:.0f} M, "
                f"{row['prompt_tokens']} + {row['new_tokens']} tokens, batch {row['batch']}",
                *cells,
                f"{row['speedup']['tokens_per_s']['ratio']:.1f}x",
                f"{row['speedup']['decode_tokens_per_s']['ratio']:.1f}x",
            ]
        )
    threads = document["rows"][0]["threads"]
    clock = "CPU time" if threads == 1 else "wall time"
    limit = ""
    if any(row["batch"] == "limit" for row in document["rows"]):
        limit = (
            "batch limit: the largest batch of each form whose KV stays below "
            f"{document['settings']['kv_limit_gib']:g} GiB; "
        )
    header = ["parameters, tokens, batch", "vanilla", "**Block Transformer**", "throughput"]
    return (
        render([*header, "decoding alone"], rows)
        + "\n\nNew tokens over the time of prompts and decoding together, each model in the faster "
        + f"of its forms (weights are float32 but for `bf16`); {threads} CPU thread"
        + f"{'s' * (threads > 1)}, {clock}, random weights, variants in turn; "
        + f"{limit}error: largest difference of the logits from float64, over the largest logit. "
        + machine_line(document)
    )


def depth_batching_table(document: Document) -> str:
    """Throughput of three ways to batch one recursive model, and how full the passes were."""
    rows = []
    for row in document["rows"]:
        depths = row["depths"]
        mean = sum(turns * count for turns, count in enumerate(depths)) / sum(depths)
        cells = []
        for name in ("static", "token", "depth"):
            found = row["variants"][name]
            full = ""
            if "passes" in found:
                full = f" ({found['passes']} passes, {found['occupancy']:.0%} full)"
            cells.append(f"{found['tokens_per_s']:.0f} tokens/s{full}")
        rows.append(
            [
                f"width {row['model']}, {row['router']} choice, batch {row['batch']}, "
                f"mean depth {mean:.2f}",
                *cells,
                f"{row['speedup']['token']:.2f}x",
                f"{row['speedup']['static']:.2f}x",
            ]
        )
    threads = document["rows"][0]["threads"]
    header = ["model", "static batches", "token by token, refilled", "**depth-wise**"]
    return (
        render([*header, "over token by token", "over static"], rows)
        + "\n\nBlock of 4 layers, 3 recursions, 1 layer before and behind, vocabulary 1024, random "
        + f"weights, {document['rows'][0]['prompts']} prompts of 4 to 11 tokens, 8 to 24 new ones "
        + "each; the same tokens in all ways; prompts are part of the time, which is "
        + f"{'CPU time of one thread' if threads == 1 else f'wall time of {threads} threads'}; "
        + f"ratios are medians of {document['settings']['rounds']} rounds in turn. "
        + machine_line(document)
    )
