"""Token pruning: time of ViT-B/16 over its tokens, and cosine of a trained text encoder.

python -m bench.token_pruning --minilm FOLDER --json RESULT.json --picture RESULT.png

What is timed, and what is ideal: `bench.token_reduction`; the text encoder: `bench.minilm`. Texts
are pruned by each rule and merged after the same layers, so that as many tokens are left; and
merged after every layer, as `TokenMerging` does unless told otherwise.
"""

import pydoc_data.topics
from typing import Any

import adaptive
from bench.minilm import batches, run
from bench.record import Recorder
from bench.token_reduction import SENTENCES, image_rows, text_rows, vit

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
    policies = {k: adaptive.TokenPruning(keep=k, audit_every=None) for k in IMAGE_KEEP}
    timing = {"threads": threads, "repetitions": 11, "budget_s": budget_s}
    for row in image_rows(model, policies, 1.0, **timing):
        record.add(row)
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
    policies: dict[tuple[str, float], adaptive.Policy] = {
        ("exact", 1.0): adaptive.Exact(),
        **text_policies(model.config.num_hidden_layers),
    }
    timing = {"threads": threads, "repetitions": 5, "budget_s": budget_s}
    for row in text_rows(model, given, policies, TIMED, **timing):
        record.add(row, "quality")
        print(record.document["quality"][-1])


def measure(record: Recorder, threads: int, budget_s: float, model: Any, tokenizer: Any) -> None:
    """All of it, on this text encoder."""
    measure_images(record, threads, budget_s / 2, vit())
    measure_texts(record, threads, budget_s / 2, model, tokenizer)


if __name__ == "__main__":
    run("token_pruning", __doc__, measure)
