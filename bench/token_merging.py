"""Token merging: time of ViT-B/16 over its tokens, and cosine of a trained text encoder.

python -m bench.token_merging --minilm FOLDER --json RESULT.json --picture RESULT.png

What is timed, and what is ideal: `bench.token_reduction`; the text encoder: `bench.minilm`.
"""

import pydoc_data.topics
from typing import Any

import torch
from torch import nn

import adaptive
from bench.minilm import batches, run
from bench.record import Recorder
from bench.timing import interleave
from bench.token_reduction import SENTENCES, image_rows, text_rows, vit

REMOVED = (4, 8, 13)
KEEP = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)


def measure_images(record: Recorder, threads: int, budget_s: float, model: Any) -> None:
    """One row for stock and one for each number of tokens merged per layer."""
    policies = {r: adaptive.TokenMerging(r=r, audit_every=None) for r in REMOVED}
    timing = {"threads": threads, "repetitions": 9, "budget_s": budget_s}
    for row in image_rows(model, policies, 0, **timing):
        record.add({"rule": "r", **row})
        print(record.document["rows"][-1])


def measure_texts(
    record: Recorder, threads: int, budget_s: float, model: nn.Module, tokenizer: Any
) -> None:
    """One row in "quality" for each share of tokens kept, and for exact attention."""
    given = batches(tokenizer, sorted(pydoc_data.topics.topics)[::2], SENTENCES)
    policies = {
        ("merged", keep): adaptive.TokenMerging(keep=keep, audit_every=None)
        for keep in (1.0, *KEEP)
    }
    timing = {"threads": threads, "repetitions": 7, "budget_s": budget_s}
    for row in text_rows(model, given, policies, ["merged"], **timing):
        record.add({"rule": "keep", "merge_share": row.pop("reduce_share"), **row}, "quality")
        print(record.document["quality"][-1])


def measure_bias(record: Recorder, threads: int, budget_s: float) -> None:
    """Rows in "bias": attention without a mask, with a number per key, and with a dense mask."""
    attend = torch.nn.functional.scaled_dot_product_attention
    for tokens in (99, 197):
        rng = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, 12, tokens, 64, generator=rng) for _ in range(3))
        row = torch.rand(2, 1, 1, tokens, generator=rng)
        dense = row.expand(2, 1, tokens, tokens).contiguous()
        masks = {"no mask": None, "a number per key": row, "dense mask": dense}
        calls = {
            name: (lambda mask=mask, q=query, k=key, v=value: attend(q, k, v, attn_mask=mask))
            for name, mask in masks.items()
        }
        timings = interleave(calls, threads=threads, repetitions=31, budget_s=budget_s)
        variants = {name: timing.to_dict() for name, timing in timings.items()}
        record.add({"tokens": tokens, "threads": threads, "variants": variants}, "bias")
        print(record.document["bias"][-1])


def measure(record: Recorder, threads: int, budget_s: float, model: Any, tokenizer: Any) -> None:
    """All of it, on this text encoder."""
    measure_images(record, threads, budget_s / 2, vit())
    measure_texts(record, threads, budget_s / 3, model, tokenizer)
    measure_bias(record, threads, budget_s / 20)


if __name__ == "__main__":
    run("token_merging", __doc__, measure)
