"""Tables of what skipping keys saves, and of what it costs in quality."""

from bench.markdown import Document, machine_line, render, tokens_label


def sparse_ops_table(document: Document) -> str:
    """The ops that choose keys, on one thread: time, error, best PyTorch form, dense attention."""
    rows = []
    for row in document["rows"]:
        if row["threads"] != 1 or row["op"] == "decode_attention":
            continue
        sizes, variants = row["sizes"], row["variants"]
        ours = next(v for v in variants.values() if v["kind"] == "native")
        best = variants[row["best_stock"]]
        beside = next(((n, v) for n, v in variants.items() if v["kind"] == "beside"), None)
        chosen = sizes.get("chosen") or sizes.get("budget")
        many = f"{chosen} of {tokens_label(sizes['capacity'])}" if chosen else "all of "
        rows.append(
            [
                f"`{row['op']}`, {many}{'' if chosen else tokens_label(sizes['capacity'])}",
                f"{ours['us'] / 1e3:.2f} ms (error {ours['error']:.0e})",
                f"{best['us'] / 1e3:.2f} ms (error {best['error']:.0e}; {row['best_stock']})",
                f"{best['us'] / ours['us']:.1f}x",
                f"{beside[1]['us'] / ours['us']:.2f}x {beside[0]}" if beside else "-",
            ]
        )
    header = ["one thread, bfloat16", "**adaptive**", "best PyTorch form", "ratio", "beside"]
    return (
        render(header, rows)
        + "\n\nOne query token, 32 query and 8 KV heads, head size 128, cold caches, median CPU "
        + "time; error: largest difference from float64, over the largest value. "
        + machine_line(document)
    )


def sparse_models_table(document: Document) -> str:
    """Decoding with policies that skip keys, against the same model reading all of them."""
    rows = []
    against_stock = all("stock default" in row["variants"] for row in document["rows"])
    for row in sorted(document["rows"], key=lambda row: (row["batch"], row["context"])):
        dense = row["variants"]["patched"]
        for name, ratios in row["policy_speedup"].items():
            made = row["variants"][name]
            rows.append(
                [
                    f"{tokens_label(row['context'])} x {row['batch']}, {name}",
                    f"{dense['ms']:.0f} ms, attention {dense['attention_ms']:.0f}",
                    f"{made['ms']:.0f} ms, attention {made['attention_ms']:.0f}",
                    f"{ratios['patched']:.2f}x",
                    f"{dense['attention_ms'] / made['attention_ms']:.1f}x",
                    *([f"{ratios['stock default']:.1f}x"] if against_stock else []),
                ]
            )
    first = document["rows"][0]
    header = ["context x batch, policy", "every key", "**policy**", "ratio", "of attention"]
    header += ["vs stock `generate`"] * against_stock
    return (
        render(header, rows)
        + f"\n\n{first['model']} shape, random weights, synthetic KV cache, {first['dtype']}, "
        + f"{first['threads']} CPU threads, median milliseconds per token; 2048 keys a step. What "
        + "skipping costs in quality is measured on a trained model, below. "
        + machine_line(document)
    )


def quality_table(document: Document) -> str:
    """What each policy answers at each budget, and what it reads for that."""
    rows = []
    for row in document["rows"]:
        tasks = row["tasks"]
        text = tasks["text"]
        name = row["policy"] + (f", {row['budget']} keys" if row["budget"] else "")
        rows.append(
            [
                name,
                f"{row['kv_read_share']:.1%}",
                *(f"{tasks[task]['accuracy']:.0%}" for task in ("passkey", "keys", "variables")),
                f"{text['bits_per_byte']:.3f}",
                f"{text['kl_from_dense']:.3f}",
                f"{text['top1_agreement']:.0%}",
            ]
        )
    answers = {task: row["tasks"][task]["answers"] for task in ("passkey", "keys", "variables")}
    header = ["policy", "KV read", *(f"{task} (of {n})" for task, n in answers.items())]
    header += ["bits per byte", "KL from dense", "same token as dense"]
    context = document["rows"][0]["context"]
    return (
        render(header, rows)
        + f"\n\nLab model, {tokens_label(context)} tokens read densely, answers and "
        + f"{document['rows'][0]['tasks']['text']['tokens']} tokens of held-out text decoded with "
        + "the policy, the right tokens fed. "
        + machine_line(document)
    )
