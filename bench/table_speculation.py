"""The table of a speculation result file: what each form of drafting gained."""

import re

from bench.markdown import Document, machine_line, render

_FIXED = re.compile(r"exit \d+, \d+")


def speculation_table(document: Document) -> str:
    """Per text: the best fixed length, adaptive lengths and trees, against exact."""
    rows = []
    for row in document["rows"]:
        if row["what"] != "lab":
            continue
        variants = row["variants"]
        fixed = [(v["speedup"], name) for name, v in variants.items() if _FIXED.fullmatch(name)]
        adaptive = [(v["speedup"], name) for name, v in variants.items() if "adaptive" in name]
        cells = [f"{max(fixed)[1]}: {max(fixed)[0]:.2f}x"] if fixed else ["-"]
        best = max(adaptive)
        tree = variants["tree"]
        steps = tree["steps"] + tree["plain_steps"]
        rows.append(
            [
                row["text"],
                *cells,
                f"{best[1]}: {best[0]:.2f}x",
                f"{tree['speedup']:.2f}x, {steps} passes",
                f"{variants['exact']['ms']:.0f} ms",
            ]
        )
    header = ["text", "best fixed length", "best adaptive length", "tree", "exact path"]
    settings = document["settings"]
    return (
        render(header, rows)
        + f"\n\nLab model, prompts of 384 tokens, {settings['tokens']} new tokens, "
        + "every variant's tokens equal to those of the exact path; median CPU time, "
        + f"{settings['threads']} thread. "
        + machine_line(document)
    )


def forced_table(document: Document) -> str:
    """A larger shape whose drafts are accepted by a coin: measured against the bytes read."""
    rows = []
    for row in document["rows"]:
        if row["what"] != "shape":
            continue
        cells = [
            f"{v['speedup']:.2f}x (by bytes {v['by_bytes']:.2f}x)" for v in row["variants"].values()
        ]
        rows.append([f"{float(row['text']):.0%}", *cells])
    drafts = list(next(r for r in document["rows"] if r["what"] == "shape")["variants"])
    note = (
        "Llama-3.2-1B shape, random weights, bfloat16, 4 of 16 layers draft; drafts accepted by a "
        "coin, so that the tokens mean nothing and only the time does; by bytes: what the weights "
        "that each pass reads would give. "
    )
    table = render(["accepted", *(f"{n} drafts" for n in drafts)], rows)
    return f"{table}\n\n{note}{machine_line(document)}"


def siblings_table(document: Document) -> str:
    """Per text and way to draft: a chain against the same with siblings."""
    rows = []
    for row in document["rows"]:
        variants = row["variants"]
        for name in variants:
            if (with_siblings := variants.get(f"{name}, siblings")) is None:
                continue
            cells = [
                f"{v['speedup']:.2f}x, {v['steps'] + v['plain_steps']} passes"
                for v in (variants[name], with_siblings)
            ]
            rows.append([row["text"], name, *cells])
    header = ["text", "drafts", "chain", "with siblings"]
    settings = document["settings"]
    return (
        render(header, rows)
        + "\n\nSpeed of the exact path, and passes of the whole model; lab model, prompts of 384 "
        + f"tokens, {settings['tokens']} new ones, every variant's tokens equal to those of the "
        + "exact path; exit 3, 4: drafts of four tokens, the others as many as pay; skip: "
        + "attention and MLP of layers 2, 4 and 6. Median CPU time, "
        + f"{settings['threads']} thread. {machine_line(document)}"
    )
