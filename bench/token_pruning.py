"""Token pruning: time of ViT-B/16 over its tokens, and cosine of a trained text encoder.

python -m bench.token_pruning --minilm FOLDER --json RESULT.json --picture RESULT.png

Images, weights, sentences and what is ideal are those of `bench.token_merging`. Texts are pruned by
each rule and merged after the same layers, so that as many tokens are left; and merged after every
layer, as `TokenMerging` does unless told otherwise.
"""

import argparse
import copy
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import adaptive
from bench.encoder_exit import BATCH, batches, embed, nearest
from bench.record import Recorder
from bench.timing import interleave, speedup
from bench.token_merging import SENTENCES, shortened, vit

IMAGE_KEEP = (0.9, 0.7, 0.5)
KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)
MERGE_KEEP = (0.95, 0.9, 0.85, 0.8)
FORMS: dict[str, dict[str, str]] = {
    "pruned": {},
    "by information": {"rule": "information"},
    "into a sum": {"fused": "sum"},
    "cached": {"restore": "cached"},
}
"""TokenPruning by what tables call it: the fields that are not at their defaults."""
TIMED = ("exact", "pruned", "by information", "merged, same layers")
"""The other forms of pruning do as much work; merging after every layer has a page of its own."""


def measure_images(record: Recorder, threads: int, budget_s: float, model: Any) -> None:
    """One row for stock and one for each share of tokens kept."""
    size = model.config.image_size
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    shared = {id(weight): weight for weight in model.parameters()}
    calls: dict[str, Callable[[], object]] = {"stock": lambda: model(images)}
    logs: dict[float, Any] = {}
    for keep in IMAGE_KEEP:
        own = copy.deepcopy(model, dict(shared))
        handle = adaptive.patch(own, adaptive.TokenPruning(keep=keep, audit_every=None))
        calls[f"pruned {keep}"] = lambda m=own: m(images)
        with torch.inference_mode():
            own(images)
        logs[keep] = handle.report().token_pruning
        ideal = shortened(model, logs[keep].tokens)
        calls[f"ideal {keep}"] = lambda run=ideal: run(images)
    with torch.inference_mode():
        timings = interleave(calls, threads=threads, repetitions=11, budget_s=budget_s)
    for keep in (1.0, *IMAGE_KEEP):
        name = f"pruned {keep}" if keep < 1 else "stock"
        timing = timings[name].to_dict()
        ideal = timings.get(f"ideal {keep}", timings["stock"])
        tokens = logs[keep].tokens if keep < 1 else logs[IMAGE_KEEP[0]].tokens[:1]
        record.add(
            {
                "model": "ViT-B/16, random weights",
                "setting": keep,
                "threads": threads,
                "kept_share": logs[keep].kept_share if keep < 1 else 1.0,
                "tokens_last": tokens[-1],
                "ms": round(timing.pop("us") / 1e3, 2),
                "ms_min": round(timing.pop("us_min") / 1e3, 2),
                **timing,
                "ideal_ms": round(ideal.median_us / 1e3, 2),
                "speedup": round(speedup(timings["stock"], timings[name]), 3),
                "of_ideal": round(speedup(ideal, timings[name]), 3),
                "images_per_s": round(1e6 / timings[name].median_us, 2),
            }
        )
        print(record.document["rows"][-1])


def text_policies(layers: int) -> dict[tuple[str, float], adaptive.Policy]:
    """What is compared on a text encoder of so many layers, by method and share."""
    found: dict[tuple[str, float], adaptive.Policy] = {}
    for method, fields in FORMS.items():
        for keep in KEEP:
            policy: Any = adaptive.TokenPruning(keep=keep, audit_every=None, pool="mean", **fields)
            found[method, keep] = policy
    for keep in KEEP:
        same = policy.reducing_layers(layers)
        found["merged, same layers", keep] = adaptive.TokenMerging(
            keep=keep, layers=same, audit_every=None
        )
    for keep in MERGE_KEEP:
        found["merged, every layer", keep] = adaptive.TokenMerging(keep=keep, audit_every=None)
    return found


def measure_texts(
    record: Recorder, threads: int, budget_s: float, model: Any, tokenizer: Any
) -> None:
    """One row in "quality" for each method and share, and for exact attention."""
    given = batches(tokenizer, sorted(pydoc_data.topics.topics)[::2], SENTENCES)
    full = embed(model, given)
    near = nearest(full)
    shared = {id(weight): weight for weight in model.parameters()}
    policies: dict[tuple[str, float], adaptive.Policy] = {
        ("exact", 1.0): adaptive.Exact(),
        **text_policies(model.config.num_hidden_layers),
    }
    made, logs, calls = {}, {}, {}
    for (method, keep), policy in policies.items():
        own: nn.Module = copy.deepcopy(model, dict(shared))
        handle = adaptive.patch(own, policy)
        made[method, keep] = embed(own, given)
        report = handle.report()
        logs[method, keep] = report.token_pruning or report.token_merging
        if method in TIMED:
            calls[f"{method} {keep}"] = lambda m=own: embed(m, given)
    timings = interleave(calls, threads=threads, repetitions=5, budget_s=budget_s)
    for (method, keep), embeddings in made.items():
        cosine = (embeddings * full).sum(-1)
        timing, log = timings.get(f"{method} {keep}"), logs[method, keep]
        record.add(
            {
                "model": "all-MiniLM-L6-v2",
                "method": method,
                "setting": keep,
                "threads": threads,
                "sentences": len(full),
                "batch": BATCH,
                "kept_share": 1.0 if log is None else round(log.kept_share, 4),
                "reduce_share": 0.0 if log is None else round(log.reduce_seconds / log.seconds, 4),
                "ms": timing and round(timing.median_us / 1e3, 2),
                "speedup": timing and round(speedup(timings["exact 1.0"], timing), 3),
                "cosine_mean": round(float(cosine.mean()), 4),
                "cosine_min": round(float(cosine.min()), 4),
                "same_neighbour": round(float((nearest(embeddings) == near).float().mean()), 4),
            },
            "quality",
        )
        print(record.document["quality"][-1])


def main() -> None:
    """Measure, write the result, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minilm", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--picture", type=Path, help="where the PNG goes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds of timing")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = {"threads": chosen.threads, "budget_s": chosen.budget}
    record = Recorder("token_pruning", chosen.json, settings)
    measure_images(record, chosen.threads, chosen.budget / 2, vit())
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.minilm)
    model = transformers.AutoModel.from_pretrained(chosen.minilm).eval()
    measure_texts(record, chosen.threads, chosen.budget / 2, model, tokenizer)
    if chosen.picture:
        from bench.token_pruning_chart import draw

        draw(record.document, chosen.picture)


if __name__ == "__main__":
    main()
