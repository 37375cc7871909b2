"""Times encoders, stock against exact and GlobalLocalAttention: python -m bench.encoders.

Models of public shapes with few layers and random weights: time does not depend on what weights
say, and every layer of a kind costs the same. ``--minilm`` measures quality besides, on trained
weights; see `bench.encoders_quality`.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import adaptive
from bench.record import Recorder
from bench.timing import interleave, relative_error, speedup

_BASE = {"hidden_size": 768, "num_attention_heads": 12}
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base": ("BertConfig", "BertModel", {**_BASE, "num_hidden_layers": 1}),
    # one layer that sees all tokens and two that see 64 to each side, as in the model
    "modernbert-base": (
        "ModernBertConfig",
        "ModernBertModel",
        {**_BASE, "intermediate_size": 1152, "num_hidden_layers": 3},
    ),
    "vit-large": (
        "ViTConfig",
        "ViTModel",
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "num_hidden_layers": 1,
        },
    ),
}
"""Class of the configuration, class of the model, and fields, by name."""

GRIDS = {512: (28, 18), 2048: (64, 32), 8192: (128, 64)}
"""Patches of 4 x 4 pixels of an image that has about as many tokens."""
VOCABULARY = 1000


def build(shape: str, tokens: int, dtype: torch.dtype) -> nn.Module:
    """A model of ``shape`` that takes ``tokens`` tokens."""
    config_class, model_class, fields = SHAPES[shape]
    if shape == "vit-large":
        rows, columns = GRIDS[tokens]
        sizes: dict[str, Any] = {"image_size": (4 * rows, 4 * columns), "patch_size": 4}
    else:
        sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": tokens}
        if shape == "modernbert-base":
            special = ("pad", "bos", "eos", "cls", "sep")
            sizes |= {f"{name}_token_id": number for number, name in enumerate(special)}
    config = getattr(transformers, config_class)(**fields, **sizes)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_class)(config)
    return model.to(dtype).requires_grad_(False).eval()


def draw(shape: str, tokens: int, padded: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs: one row, or one full and one half-empty row."""
    rng = torch.Generator().manual_seed(1)
    if shape == "vit-large":
        rows, columns = GRIDS[tokens]
        return {"pixel_values": torch.randn(1, 3, 4 * rows, 4 * columns, generator=rng).to(dtype)}
    ids = torch.randint(5, VOCABULARY, (1 + padded, tokens), generator=rng)
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def measure(
    shape: str, tokens: int, padded: bool, dtype: torch.dtype, window: int, budget_s: float
) -> dict[str, Any]:
    """Time one forward pass of each variant, after comparing its outputs with those of stock.

    Raises:
        RuntimeError: The exact variant computes something else.
    """
    given = draw(shape, tokens, padded, dtype)
    models = {"stock": build(shape, tokens, dtype)}
    models["exact"] = copy.deepcopy(models["stock"])
    models["policy"] = copy.deepcopy(models["stock"])
    policy = adaptive.GlobalLocalAttention(window=window, audit_every=None)
    handles = {
        "exact": adaptive.patch(models["exact"]),
        "policy": adaptive.patch(models["policy"], policy),
    }
    real = given["attention_mask"].bool() if padded else slice(None)
    with torch.inference_mode():
        outputs = {name: model(**given)[0][real] for name, model in models.items()}
        shares = {name: _computed_share(handle) for name, handle in handles.items()}
        errors = {name: relative_error(out, outputs["stock"]) for name, out in outputs.items()}
        limit = 1e-4 if dtype == torch.float32 else 6e-2
        if errors["exact"] > limit:
            raise RuntimeError(f"bench: exact must be within {limit}, got {errors['exact']:.3g}")
        timings = interleave(
            {name: lambda model=model: model(**given) for name, model in models.items()},
            threads=torch.get_num_threads(),
            repetitions=9,
            at_least=2,
            budget_s=budget_s,
        )
    places = next(iter(outputs.values())).shape[-2] if not padded else tokens
    return {
        "model": shape,
        "layers": len(handles["exact"].report().layers),
        "tokens": places,
        "batch": 1 + padded,
        "padded": padded,
        "window": window,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "speedup": {n: round(speedup(timings["stock"], timings[n]), 3) for n in handles},
        "variants": {
            name: {
                "ms": round(timing.median_us / 1e3, 3),
                "ms_min": round(timing.minimum_us / 1e3, 3),
                "clean": timing.clean,
                "dropped": timing.dropped,
                "error": errors[name],
                "computed_share": shares.get(name, 1.0),
            }
            for name, timing in timings.items()
        },
    }


def _computed_share(handle: adaptive.Patched) -> float:
    """Pairs of query and key that were computed, over all pairs; a stock call computes all."""
    report = handle.report()
    shares = [lay.scores / lay.dense_scores if lay.dense_scores else 1.0 for lay in report.layers]
    return round(sum(shares) / len(shares), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=12.0, help="seconds for each row")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2: quality, too")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(chosen).items()}
    settings.pop("json")
    settings["minilm"] = bool(chosen.minilm)
    recorder = Recorder("encoders", chosen.json, settings)
    if chosen.minilm:
        from bench.encoders_quality import measure_quality

        for row in measure_quality(chosen.minilm):
            print(row)
            recorder.add(row, "quality")
    for tokens in chosen.tokens:
        for shape in chosen.models:
            for padded in (False, True) if shape != "vit-large" else (False,):
                dtype = getattr(torch, chosen.dtype)
                row = measure(shape, tokens, padded, dtype, chosen.window, chosen.budget)
                times = {name: found["ms"] for name, found in row["variants"].items()}
                print(shape, row["tokens"], "padded" if padded else "", times, row["speedup"])
                recorder.add(row)


if __name__ == "__main__":
    main()
