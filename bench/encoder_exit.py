"""Early exit of a trained encoder: time against cosine to the full embedding.

python -m bench.encoder_exit --minilm FOLDER --json RESULT.json --picture RESULT.png

The text encoder and its sentences: `bench.minilm`. Gates learn from the paragraphs of other topics.
"""

import copy
import pydoc_data.topics
from collections.abc import Sequence
from typing import Any

from torch import nn

import adaptive
from adaptive.train import encoder_gate
from bench.minilm import BATCH, NAME, Batch, agreement, batches, embed, run
from bench.record import Recorder
from bench.timing import interleave, speedup

SENTENCES = 96
LEARNED = 480
THRESHOLDS = (0.75, 0.8, 0.85, 0.9, 0.92, 0.94)
# Few sentences come closer than this before the last layer: the model was not trained to be left.
TOLERANCES = (0.5, 0.6, 0.7)
LEAST_SKIPPED = 0.15
"""Below it, time saved over layers skipped is noise: times repeat to 1 or 2 percent."""


def policies(model: nn.Module, layers: int, learned: Sequence[Batch]) -> dict[str, Any]:
    """The policies to compare, by what they are called: (kind, setting, policy)."""
    found: dict[str, Any] = {}
    for depth in range(1, layers):
        found[f"fixed {depth}"] = (
            "fixed",
            depth,
            adaptive.EncoderExit(layer=depth, audit_every=None),
        )
    for threshold in THRESHOLDS:
        policy = adaptive.EncoderExit(threshold=threshold, audit_every=None)
        found[f"cosine {threshold}"] = ("cosine", threshold, policy)
    for tolerance in TOLERANCES:
        gate = encoder_gate(model, learned, layers=list(range(1, layers)), tolerance=tolerance)
        policy = adaptive.EncoderExit(gate=gate, audit_every=None)
        found[f"gate {tolerance}"] = ("gate", tolerance, policy)
    return found


def measure(record: Recorder, threads: int, budget_s: float, model: Any, tokenizer: Any) -> None:
    """One row for each policy, and for the model without one."""
    topics = sorted(pydoc_data.topics.topics)
    given = batches(tokenizer, topics[::2], SENTENCES)
    layers = model.config.num_hidden_layers
    chosen = policies(model, layers, batches(tokenizer, topics[1::2], LEARNED))
    chosen = {"stock": ("stock", None, None), "exact": ("exact", None, adaptive.Exact()), **chosen}
    shared = {id(weight): weight for weight in model.parameters()}
    models = {name: copy.deepcopy(model, dict(shared)) for name in chosen}
    full = embed(model, given)
    patched, made = {}, {}
    for name, (_, _, policy) in chosen.items():
        if policy is not None:
            patched[name] = adaptive.patch(models[name], policy)
        made[name] = embed(models[name], given)
    logs = {name: handle.report().encoder_exit for name, handle in patched.items()}
    variants = {name: (lambda m=models[name]: embed(m, given)) for name in chosen}
    timings = interleave(variants, threads=threads, repetitions=7, budget_s=budget_s)
    for name, (kind, setting, _) in chosen.items():
        log = logs.get(name)
        skipped = 0.0 if log is None else log.skipped_share
        saved = 1 - 1 / speedup(timings["exact"], timings[name])
        timing = timings[name].to_dict()
        record.add(
            {
                "model": NAME,
                "rule": kind,
                "setting": setting,
                "sentences": len(full),
                "batch": BATCH,
                "threads": threads,
                "mean_depth": layers if log is None else round(log.mean_depth, 3),
                "skipped_share": round(skipped, 4),
                "ms": round(timing.pop("us") / 1e3, 2),
                "ms_min": round(timing.pop("us_min") / 1e3, 2),
                **timing,
                "time_saved": round(saved, 4),
                "saved_of_skipped": round(saved / skipped, 3) if skipped > LEAST_SKIPPED else None,
                **agreement(made[name], full),
            }
        )
        print(record.document["rows"][-1])
    record.document["tokens"] = {
        "real": int(sum(batch["attention_mask"].sum() for batch in given)),
        "padded": int(sum(batch["attention_mask"].numel() for batch in given)),
    }
    record.save()


if __name__ == "__main__":
    run("encoder_exit", __doc__, measure)
