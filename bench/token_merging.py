"""Token merging: time of ViT-B/16 over its tokens, and cosine of a trained text encoder.

python -m bench.token_merging --minilm FOLDER --json RESULT.json --picture RESULT.png

Images are noise and the ViT's weights random: its time does not depend on them. Ideal is stock
attention and stock layers on as many tokens as are left, without matching, merging or sizes. The
text encoder and its sentences are those of `bench.encoder_exit`.
"""

import argparse
import copy
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import adaptive
from bench.encoder_exit import BATCH, batches, embed, nearest
from bench.record import Recorder
from bench.timing import interleave, speedup

REMOVED = (4, 8, 13)
KEEP = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
SENTENCES = 48


def vit(**fields: Any) -> Any:
    """ViT-B/16 with random weights; its configuration is the default one."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**fields)
    return transformers.ViTModel._from_config(config, attn_implementation="sdpa").eval()


def shortened(model: Any, counts: list[int]) -> Callable[[Tensor], Tensor]:
    """The same model, of which layer ``i`` runs on the first ``counts[i]`` tokens only."""
    holder = model if hasattr(model, "layers") else model.encoder
    layers = holder.layers if hasattr(holder, "layers") else holder.layer

    def run(images: Tensor) -> Tensor:
        states = model.embeddings(images)
        whole = states.clone()
        for layer, count in zip(layers, counts, strict=True):
            made = layer(states[:, :count])
            states = made[0] if isinstance(made, tuple) else made
        whole[:, : states.shape[1]] = states
        made = model.layernorm(whole)
        return model.pooler(made) if model.pooler is not None else made

    return run


def measure_images(record: Recorder, threads: int, budget_s: float, model: Any) -> None:
    """One row for stock and one for each number of tokens merged per layer."""
    size = model.config.image_size
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    shared = {id(weight): weight for weight in model.parameters()}
    calls: dict[str, Callable[[], object]] = {"stock": lambda: model(images)}
    logs: dict[int, Any] = {}
    for removed in REMOVED:
        merging = copy.deepcopy(model, dict(shared))
        policy = adaptive.TokenMerging(r=removed, audit_every=None)
        handle = adaptive.patch(merging, policy)
        calls[f"merged {removed}"] = lambda m=merging: m(images)
        with torch.inference_mode():
            merging(images)
        logs[removed] = handle.report().token_merging
        ideal = shortened(model, logs[removed].tokens)
        calls[f"ideal {removed}"] = lambda run=ideal: run(images)
    with torch.inference_mode():
        timings = interleave(calls, threads=threads, repetitions=9, budget_s=budget_s)
    for removed in (0, *REMOVED):
        name = f"merged {removed}" if removed else "stock"
        timing = timings[name].to_dict()
        ideal = timings.get(f"ideal {removed}", timings["stock"])
        record.add(
            {
                "model": "ViT-B/16, random weights",
                "rule": "r",
                "setting": removed,
                "threads": threads,
                "kept_share": logs[removed].kept_share if removed else 1.0,
                "tokens_last": logs[removed].tokens[-1] if removed else logs[REMOVED[0]].tokens[0],
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


def measure_texts(
    record: Recorder, threads: int, budget_s: float, model: nn.Module, tokenizer: Any
) -> None:
    """One row in "quality" for each share of tokens kept, and for exact attention."""
    given = batches(tokenizer, sorted(pydoc_data.topics.topics)[::2], SENTENCES)
    full = embed(model, given)
    near = nearest(full)
    shared = {id(weight): weight for weight in model.parameters()}
    made, logs, calls = {}, {}, {}
    for keep in (1.0, *KEEP):
        own = copy.deepcopy(model, dict(shared))
        handle = adaptive.patch(own, adaptive.TokenMerging(keep=keep, audit_every=None))
        made[keep] = embed(own, given)
        logs[keep] = handle.report().token_merging
        calls[str(keep)] = lambda m=own: embed(m, given)
    timings = interleave(calls, threads=threads, repetitions=7, budget_s=budget_s)
    for keep, embeddings in made.items():
        cosine = (embeddings * full).sum(-1)
        timing = timings[str(keep)]
        record.add(
            {
                "model": "all-MiniLM-L6-v2",
                "rule": "keep",
                "setting": keep,
                "threads": threads,
                "sentences": len(full),
                "batch": BATCH,
                "kept_share": round(logs[keep].kept_share, 4),
                "merge_share": round(logs[keep].reduce_seconds / logs[keep].seconds, 4),
                "ms": round(timing.median_us / 1e3, 2),
                "speedup": round(speedup(timings["1.0"], timing), 3),
                "cosine_mean": round(float(cosine.mean()), 4),
                "cosine_min": round(float(cosine.min()), 4),
                "same_neighbour": round(float((nearest(embeddings) == near).float().mean()), 4),
            },
            "quality",
        )
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
    record = Recorder("token_merging", chosen.json, settings)
    measure_images(record, chosen.threads, chosen.budget / 2, vit())
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.minilm)
    model = transformers.AutoModel.from_pretrained(chosen.minilm).eval()
    measure_texts(record, chosen.threads, chosen.budget / 3, model, tokenizer)
    measure_bias(record, chosen.threads, chosen.budget / 20)
    if chosen.picture:
        from bench.token_merging_chart import draw

        draw(record.document, chosen.picture)


if __name__ == "__main__":
    main()
