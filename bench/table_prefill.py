"""Tables of prompts that read chosen blocks: what that saves, and what it costs in quality."""

from bench.markdown import Document, machine_line, render, tokens_label

DENSE = "SDPA, causal"
OURS = "adaptive, causal"


def prefill_table(document: Document) -> str:
    """Whole attention of a layer: time and error of each variant, and its parts."""
    rows = []
    for row in document["rows"]:
        dense, ours = row["variants"][DENSE], row["variants"][OURS]
        for name, made in row["variants"].items():
            split = row["split_ms"].get(name, {})
            order = [part for part in ("pool", "score", "select", "attend") if part in split]
            rows.append(
                [
                    f"head size {row['head_dim']}, {name}",
                    f"{made['us'] / 1e6:.2f} s (error {made['error']:.0e})",
                    "-" if name == DENSE else f"{dense['us'] / made['us']:.1f}x",
                    "-" if name in (DENSE, OURS) else f"{ours['us'] / made['us']:.1f}x",
                    ", ".join(f"{part} {split[part]:.0f}" for part in order) or "-",
                    f"{split['audit']:.0f}" if split else "-",
                ]
            )
    first = document["rows"][0]
    header = ["pattern, share of blocks", "time", "vs SDPA", "vs our causal", "parts, ms"]
    header += ["audit, ms"]
    return (
        render(header, rows)
        + f"\n\n{tokens_label(first['tokens'])} tokens, {first['heads']} query and "
        + f"{first['kv_heads']} KV heads, {first['dtype']}, threads: {first['threads']}, median "
        + "CPU time; a_shape: a window of half that share of the prompt; error: largest difference "
        + "from float64 on the keys to be read, over the largest value. "
        + machine_line(document)
    )


def quality_prefill_table(document: Document) -> str:
    """What each pattern answers, and what it computes for that."""
    rows = []
    for row in document["rows"]:
        passkey, text = row["tasks"]["passkey"], row["tasks"]["text"]
        choice = "".join(f", {name} {value}" for name, value in row["choice"].items())
        mass = row["mass_mean"]
        rows.append(
            [
                row["policy"] + choice,
                f"{row['scores_share']:.0%}",
                "-" if mass is None else f"{mass:.3f}",
                f"{passkey['accuracy']:.0%}",
                f"{text['bits_per_byte']:.4f}",
                f"{text['kl_from_dense']:.3f}",
                f"{text['top1_agreement']:.1%}",
            ]
        )
    first = document["rows"][0]
    answers, tokens = first["tasks"]["passkey"]["answers"], first["tasks"]["text"]["tokens"]
    header = ["pattern", "scores computed", "mass, audited", f"passkey (of {answers})"]
    header += ["bits per byte", "KL from dense", "same token as dense"]
    return (
        render(header, rows)
        + f"\n\nLab model, prompts of {tokens_label(first['context'])} tokens; pass keys decoded "
        + f"with every key; {tokens} tokens of held-out text predicted in the prompt. "
        + machine_line(document)
    )
