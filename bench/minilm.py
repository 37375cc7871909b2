"""The trained text encoder of benchmarks: its sentences, how near embeddings stay, the call.

The model is all-MiniLM-L6-v2, as for `bench.encoders_quality`. The sentences are paragraphs of the
language reference that comes with Python, of mixed length, in padded batches.
"""

import argparse
import importlib
import pydoc_data.topics
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.record import Recorder

NAME = "all-MiniLM-L6-v2"
FEWEST, MOST = 6, 128
BATCH = 16
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


def agreement(embeddings: Tensor, full: Tensor) -> dict[str, float]:
    """How near embeddings stay to the full ones, and how many keep their nearest neighbour."""
    cosine = (embeddings * full).sum(-1)
    same = _nearest(embeddings) == _nearest(full)
    return {
        "cosine_mean": round(float(cosine.mean()), 4),
        "cosine_min": round(float(cosine.min()), 4),
        "same_neighbour": round(float(same.float().mean()), 4),
    }


def _nearest(embeddings: Tensor) -> Tensor:
    """Of each sentence, the other one whose embedding is nearest."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(-1)


def run(
    kind: str, doc: str | None, measure: Callable[[Recorder, int, float, Any, Any], None]
) -> None:
    """Measure as the command line says, write the result, and draw the picture.

    Args:
        kind: Of the rows; ``bench.<kind>_chart`` draws them.
        doc: What ``--help`` says.
        measure: Gets the record, threads, seconds of timing, the text encoder and its tokenizer.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--minilm", type=Path, required=True, help=f"folder of {NAME}")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--picture", type=Path, help="where the PNG goes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds of timing")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = {"threads": chosen.threads, "budget_s": chosen.budget}
    record = Recorder(kind, chosen.json, settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.minilm)
    model = transformers.AutoModel.from_pretrained(chosen.minilm).eval()
    measure(record, chosen.threads, chosen.budget, model, tokenizer)
    if chosen.picture:  # matplotlib is needed for no number
        importlib.import_module(f"bench.{kind}_chart").draw(record.document, chosen.picture)
