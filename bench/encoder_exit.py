"""Early exit of a trained encoder: time against cosine to the full embedding.

python -m bench.encoder_exit --minilm FOLDER --json RESULT.json --picture RESULT.png

The model is all-MiniLM-L6-v2, as for `bench.encoders_quality`. The sentences are paragraphs of the
language reference that comes with Python, of mixed length, in padded batches; gates learn from the
paragraphs of other topics.
"""

import argparse
import copy
import pydoc_data.topics
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import adaptive
from adaptive.train import encoder_gate
from bench.record import Recorder
from bench.timing import interleave, speedup

FEWEST, MOST = 6, 128
BATCH = 16
SENTENCES = 96
LEARNED = 480
THRESHOLDS = (0.75, 0.8, 0.85, 0.9, 0.92, 0.94)
# Few sentences come closer than this before the last layer: the model was not trained to be left.
TOLERANCES = (0.5, 0.6, 0.7)
LEAST_SKIPPED = 0.15
"""Below it, time saved over layers skipped is noise: times repeat to 1 or 2 percent."""
Batch = dict[str, Tensor]


def batches(tokenizer: Any, topics: Sequence[str], most: int) -> list[Batch]:
    """Paragraphs of 6 to 128 tokens of these topics, shuffled, in padded batches of 16."""
    found = []
    for topic in topics:
        for text in pydoc_data.topics.topics[topic].split("\n\n"):
            if (
                FEWEST
                <= len(tokenizer(text, truncation=True, max_length=MOST + 1).input_ids)
                <= MOST
            ):
                found.append(text)
    random.Random(0).shuffle(found)
    pieces = [found[i : i + BATCH] for i in range(0, min(most, len(found)), BATCH)]
    return [dict(tokenizer(piece, padding=True, return_tensors="pt")) for piece in pieces]


def embed(model: nn.Module, given: Sequence[Batch]) -> Tensor:
    """Sentence embeddings: means of the last hidden states without padding, of length 1."""
    made = []
    with torch.inference_mode():
        for batch in given:
            mask = batch["attention_mask"][..., None]
            states = model(**batch).last_hidden_state
            made.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(made), dim=-1)


def nearest(embeddings: Tensor) -> Tensor:
    """Of each sentence, the other one whose embedding is nearest."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(-1)


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


def measure(folder: Path, record: Recorder, threads: int, budget_s: float) -> None:
    """One row for each policy, and for the model without one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    topics = sorted(pydoc_data.topics.topics)
    given = batches(tokenizer, topics[::2], SENTENCES)
    layers = model.config.num_hidden_layers
    chosen = policies(model, layers, batches(tokenizer, topics[1::2], LEARNED))
    chosen = {"stock": ("stock", None, None), "exact": ("exact", None, adaptive.Exact()), **chosen}
    shared = {id(weight): weight for weight in model.parameters()}
    models = {name: copy.deepcopy(model, dict(shared)) for name in chosen}
    full = embed(model, given)
    near = nearest(full)
    patched, made = {}, {}
    for name, (_, _, policy) in chosen.items():
        if policy is not None:
            patched[name] = adaptive.patch(models[name], policy)
        made[name] = embed(models[name], given)
    logs = {name: handle.report().encoder_exit for name, handle in patched.items()}
    variants = {name: (lambda m=models[name]: embed(m, given)) for name in chosen}
    timings = interleave(variants, threads=threads, repetitions=7, budget_s=budget_s)
    for name, (kind, setting, _) in chosen.items():
        cosine = (made[name] * full).sum(-1)
        log = logs.get(name)
        skipped = 0.0 if log is None else log.skipped_share
        saved = 1 - 1 / speedup(timings["exact"], timings[name])
        timing = timings[name].to_dict()
        record.add(
            {
                "model": "all-MiniLM-L6-v2",
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
                "cosine_mean": round(float(cosine.mean()), 4),
                "cosine_min": round(float(cosine.min()), 4),
                "same_neighbour": round(float((nearest(made[name]) == near).float().mean()), 4),
            }
        )
        print(record.document["rows"][-1])
    record.document["tokens"] = {
        "real": int(sum(batch["attention_mask"].sum() for batch in given)),
        "padded": int(sum(batch["attention_mask"].numel() for batch in given)),
    }
    record.save()


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
    record = Recorder("encoder_exit", chosen.json, settings)
    measure(chosen.minilm, record, chosen.threads, chosen.budget)
    if chosen.picture:
        from bench.encoder_exit_chart import draw

        draw(record.document, chosen.picture)


if __name__ == "__main__":
    main()
