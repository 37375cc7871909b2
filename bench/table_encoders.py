"""Tables of encoders: what running them by windows saves, and what a policy costs embeddings."""

from bench.markdown import Document, machine_line, render


def encoders_table(document: Document) -> str:
    """One pass of an encoder: stock, exact, and with GlobalLocalAttention."""
    rows = []
    for row in document["rows"]:
        variants, ratios = row["variants"], row["speedup"]
        padded = ", a full and a half-empty row" if row["padded"] else ""
        rows.append(
            [
                f"{row['model']}, {row['tokens']} tokens{padded}",
                f"{variants['stock']['ms']:.0f} ms",
                f"{variants['exact']['ms']:.0f} ms (error {variants['exact']['error']:.0e})",
                f"{ratios['exact']:.2f}x",
                f"{variants['policy']['ms']:.0f} ms",
                f"{variants['policy']['computed_share']:.1%}",
                f"{ratios['policy']:.2f}x",
            ]
        )
    first = document["rows"][0]
    header = ["model", "stock", "**exact**", "ratio", "**policy**", "of all pairs", "ratio"]
    counts = {row["model"]: row["layers"] for row in document["rows"]}
    layers = ", ".join(f"{count} of {name}" for name, count in counts.items())
    return (
        render(header, rows)
        + f"\n\nLayers of public shapes ({layers}), random weights, {first['dtype']}, "
        + f"{first['threads']} thread, median CPU time of a pass; policy: "
        + f"`GlobalLocalAttention(window={first['window']})`; error: largest difference from stock "
        + "outputs of tokens that are not padding, over the largest. "
        + machine_line(document)
    )


def encoders_quality_table(document: Document) -> str:
    """Embeddings of a trained encoder under the policy, against stock and against cut texts."""
    rows = []
    for row in document["quality"]:
        if row["kind"] == "policy":
            name = f"window {row['window']}, {row['globals']} global"
            mass = f"{row['mass_mean']:.2f}"
        else:
            name, mass = f"text cut to {row['kept']} tokens, stock attention", "-"
        rows.append(
            [
                name,
                f"{row['computed_share']:.1%}",
                mass,
                f"{row['cosine_mean']:.3f}",
                f"{row['cosine_min']:.3f}",
                f"{row['same_neighbour']:.0%}",
            ]
        )
    first = document["quality"][0]
    header = ["", "of all pairs", "mass kept", "mean cosine", "least cosine", "same nearest text"]
    return (
        render(header, rows)
        + f"\n\n{first['model']}, {first['texts']} texts of {first['tokens']} tokens from the "
        + "language reference of Python; cosine of each text's embedding with that of stock "
        + "attention on all tokens, and how often the nearest of the other texts is the same."
    )


def encoder_exit_table(document: Document) -> str:
    """Time of embeddings against their cosine with those of all layers, by when sentences leave."""
    names = {
        "stock": "all layers, stock",
        "exact": "all layers, exact",
        "fixed": "`layer={}`",
        "cosine": "`threshold={}`",
        "gate": "gate, fitted with `tolerance={}`",
    }
    rows = []
    for row in document["rows"]:
        share = row["saved_of_skipped"]
        rows.append(
            [
                names[row["rule"]].format(row["setting"]),
                f"{row['mean_depth']:.2f}",
                f"{row['skipped_share']:.1%}",
                f"{row['ms']:.0f} ms",
                f"{row['time_saved']:.1%}",
                "-" if share is None else f"{share:.0%}",
                f"{row['cosine_mean']:.3f}",
                f"{row['cosine_min']:.3f}",
                f"{row['same_neighbour']:.0%}",
            ]
        )
    first, tokens = document["rows"][0], document["tokens"]
    header = ["", "mean depth", "layers skipped", "time", "saved", "of the layers' share"]
    header += ["mean cosine", "least cosine", "same nearest sentence"]
    threads = f"{first['threads']} thread{'s' * (first['threads'] != 1)}"
    return (
        render(header, rows)
        + f"\n\n{first['model']}, 6 layers, float32, {first['sentences']} paragraphs of the "
        + f"language reference of Python, {tokens['real']} tokens, {tokens['padded']} with padding "
        + f"in batches of {first['batch']}; saved: against all layers, exact; cosine of each "
        + "embedding with that of all layers; gates learned from other topics. "
        + f"{threads}, median CPU time. "
        + machine_line(document)
    )


def token_merging_table(document: Document) -> str:
    """Images a second of a ViT over the tokens that are left."""
    return _images_table(document, "`r={:g}`", 0, "not matched, merged or sized")


def token_pruning_table(document: Document) -> str:
    """Images a second of a ViT over the tokens that are left."""
    return _images_table(document, "`keep={:g}`", 1, "with nothing chosen, copied or fused")


def _images_table(document: Document, label: str, stock: float, ideal: str) -> str:
    """One row for each setting; that of ``stock`` changes nothing, and ``ideal`` says what is."""
    rows = [
        [
            "stock" if row["setting"] == stock else label.format(row["setting"]),
            f"{row['tokens_last']}",
            f"{row['kept_share']:.1%}",
            f"{row['images_per_s']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['of_ideal']:.0%}",
        ]
        for row in document["rows"]
    ]
    first = document["rows"][0]
    header = ["", "tokens in the last layer", "of all tokens", "images/s", "speedup", "of ideal"]
    threads = f"{first['threads']} thread{'s' * (first['threads'] != 1)}"
    return (
        render(header, rows)
        + f"\n\n{first['model']}, float32, one image of 224 x 224 at a time, {threads}, median CPU "
        + f"time; ideal: stock layers on as many tokens, {ideal}. "
        + machine_line(document)
    )


def token_merging_quality_table(document: Document) -> str:
    """Cosine of embeddings with the full ones, over the tokens that are left."""
    rows = [
        [
            f"`keep={row['setting']:g}`",
            f"{row['kept_share']:.1%}",
            f"{row['speedup']:.2f}x",
            f"{row['merge_share']:.1%}",
            f"{row['cosine_mean']:.3f}",
            f"{row['cosine_min']:.3f}",
            f"{row['same_neighbour']:.0%}",
        ]
        for row in document["quality"]
    ]
    first = document["quality"][0]
    header = ["", "of all tokens", "speedup", "time to merge", "mean cosine", "least cosine"]
    header += ["same nearest sentence"]
    return (
        render(header, rows)
        + f"\n\n{first['model']}, float32, {first['sentences']} paragraphs of the language "
        + f"reference of Python, in padded batches of {first['batch']}; speedup: against `keep=1`; "
        + "cosine of each embedding with that of all tokens."
    )


def token_pruning_quality_table(document: Document) -> str:
    """Cosine of embeddings with the full ones, by method and over the tokens that are left."""
    rows = [
        [
            row["method"],
            f"`keep={row['setting']:g}`",
            f"{row['kept_share']:.1%}",
            f"{row['speedup']:.2f}x" if row["speedup"] else "-",
            f"{row['cosine_mean']:.3f}",
            f"{row['cosine_min']:.3f}",
            f"{row['same_neighbour']:.0%}",
        ]
        for row in document["quality"]
    ]
    first = document["quality"][0]
    header = ["", "", "of all tokens", "speedup", "mean cosine", "least cosine"]
    header += ["same nearest sentence"]
    return (
        render(header, rows)
        + f"\n\n{first['model']}, float32, {first['sentences']} paragraphs of the language "
        + f"reference of Python, in padded batches of {first['batch']}; speedup: against exact "
        + "attention; cosine of each embedding with that of all tokens."
    )
