"""Tokens per second of a Block Transformer and a vanilla one of its size, batch 1 to a KV limit.

Both are models of `adaptive.zoo` with random weights and run the same kernels. Prompts are run for
real, tokens are generated greedily, nothing is extrapolated: the throughput is all new tokens over
the time of prompts and decoding together. Variants take turns chunk by chunk, so that a slow moment
is slow for all; ratios of decoding are medians over the rounds. One thread: CPU time. Each variant
first shows how far its logits are from float64.
"""

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from adaptive.zoo import (
    BlockTransformer,
    BlockTransformerConfig,
    VanillaTransformer,
    VanillaTransformerConfig,
)
from adaptive.zoo.model import ZooModel
from adaptive.zoo.run import best
from bench.machine import read_bandwidth
from bench.record import Recorder
from bench.timing import WrongResultError, relative_error

SHAPES: dict[str, dict[str, int]] = {
    "33m": {"vocab_size": 50304, "width": 256, "heads": 8, "layers": 6},
    "77m": {"vocab_size": 50304, "width": 512, "heads": 8, "layers": 6},
    "tiny": {"vocab_size": 256, "width": 64, "heads": 2, "layers": 2},
}
"""Width, heads and layers of the paper's two smallest; a Block Transformer halves the layers."""

LIMIT = 0
"""Instead of a batch: each variant's largest whose KV stays below the limit."""
CELLS = (
    ("33m", 2048, 128, (1, 8, 32, 128, LIMIT)),
    ("33m", 128, 2048, (32,)),
    ("77m", 2048, 128, (1, 8, 32, LIMIT)),
    ("tiny", 64, 32, (2, LIMIT)),  # for its tests
)
"""Shape, prompt tokens, new tokens, batches."""
ROUNDS = 8
NARROW_BATCH = 1
"""Rows up to which 16-bit weights are tried: where the CPU has no 16-bit arithmetic, PyTorch runs
prompts through them many times slower than through float32."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
QUICK_S = 3.0
"""A prefill below this is repeated, and its median counts."""


def now() -> float:
    """Seconds: CPU time where there is one thread, which no neighbour can inflate."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def build(shape: str, kind: str, dtype: torch.dtype) -> ZooModel:
    """A model with random weights, the same ones in every dtype."""
    sizes = dict(SHAPES[shape])
    layers = sizes.pop("layers")
    torch.manual_seed(0)
    model: ZooModel
    if kind == "block":
        half = layers // 2
        config = BlockTransformerConfig(**sizes, block_layers=half, token_layers=layers - half)
        model = BlockTransformer(config)
    else:
        model = VanillaTransformer(VanillaTransformerConfig(**sizes, layers=layers))
    return model.to(dtype).eval()


@dataclass
class Variant:
    """A model, the dtype of its KV, and one generation under way."""

    kind: str
    model: ZooModel
    kv_dtype: torch.dtype
    error: float
    batch: int = 0
    prefill_s: list[float] = field(default_factory=list)
    chunks_s: list[float] = field(default_factory=list)
    run: Any = None
    kv_bytes: int = 0

    def most_rows(self, limit_bytes: int, tokens: int) -> int:
        """Rows of so many tokens whose KV stays below the limit."""
        shrink = self.kv_dtype.itemsize / self.model.dtype.itemsize
        return max(1, int(limit_bytes // (self.model.kv_bytes_per_token * shrink * tokens)))

    def start(self, batch: int, prompt: int, new: int) -> None:
        """Run the prompts."""
        self.batch, self.chunks_s, self.prefill_s = batch, [], []
        rng = torch.Generator().manual_seed(1)
        ids = torch.randint(self.model.config.vocab_size, (batch, prompt), generator=rng)
        while len(self.prefill_s) < 3 and sum(self.prefill_s) < QUICK_S:
            self.run = None
            begin = now()
            self.run = self.model._start(list(ids), new, self.kv_dtype)
            self.prefill_s.append(now() - begin)

    def chunk(self, tokens: int) -> None:
        """Generate some tokens of every row, as ``generate`` does, and note the time."""
        begin = now()
        length = self.model.block_length
        for _ in range(tokens // length):
            block: list[Tensor] = []
            for _ in range(length):
                block.append(best(self.run.logits(block[-1] if block else None)))
            self.run.advance(torch.stack(block, 1))
        self.chunks_s.append(now() - begin)
        self.kv_bytes = self.run.kv_bytes

    def to_dict(self, new: int) -> dict[str, Any]:
        """Fields of a result file."""
        prefill, decode = median(self.prefill_s), sum(self.chunks_s)
        tokens = self.batch * new / len(self.chunks_s)
        return {
            "batch": self.batch,
            "kv_bytes": self.kv_bytes,
            "prefill_s": round(prefill, 4),
            "decode_tokens_per_s": round(tokens / median(self.chunks_s), 2),
            "tokens_per_s": round(self.batch * new / (prefill + decode), 2),
            "rounds_s": [round(s, 4) for s in self.chunks_s],
            "error": self.error,
        }


def logits_error(model: ZooModel, exact: ZooModel, kv_dtype: torch.dtype) -> float:
    """Largest relative error of decoded logits against teacher forcing in float64."""
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (2, 76), generator=rng)
    run = model._start(list(ids[:, :68]), 8, kv_dtype)
    found = []
    for at in range(68, 76):
        inside = at % model.block_length
        found.append(run.logits(ids[:, at - 1] if inside else None))
        if inside == model.block_length - 1:
            run.advance(ids[:, at + 1 - model.block_length : at + 1])
    return relative_error(torch.stack(found, 1), exact(ids)[:, 67:-1])


def variants(shape: str, batch: int) -> dict[str, Variant]:
    """Both models in each form that may be the fastest at this batch, proven right."""
    forms = {"float32": (torch.float32, torch.float32), "bf16 KV": (torch.float32, torch.bfloat16)}
    if batch != LIMIT and batch <= NARROW_BATCH:
        forms["bf16"] = (torch.bfloat16, torch.bfloat16)
    found = {}
    for kind in ("vanilla", "block"):
        models = {torch.float32: build(shape, kind, torch.float32)}
        exact = copy.deepcopy(models[torch.float32]).double()
        for form, (dtype, kv_dtype) in forms.items():
            model = models.setdefault(dtype, build(shape, kind, dtype))
            error = logits_error(model, exact, kv_dtype)
            if error > TOLERANCE[kv_dtype]:
                raise WrongResultError(
                    f"bench: the error of {kind}, {form} must be at most {TOLERANCE[kv_dtype]}, "
                    f"got {error:.3g}"
                )
            found[f"{kind}, {form}"] = Variant(kind, model, kv_dtype, error)
    return found


def measure(
    shape: str, prompt: int, new: int, batch: int, limit_bytes: int, show: Callable[[str], None]
) -> dict[str, Any]:
    """One row of the result."""
    contenders = variants(shape, batch)
    for name, variant in contenders.items():
        rows = batch or variant.most_rows(limit_bytes, prompt + new)
        variant.start(rows, prompt, new)
        show(f"  {name}: {rows} prompts in {median(variant.prefill_s):.2f} s")
    step = new // ROUNDS
    for _ in range(ROUNDS):
        for variant in contenders.values():
            variant.chunk(step)
    found = {name: variant.to_dict(new) for name, variant in contenders.items()}

    def fastest(kind: str, what: str) -> str:
        names = [name for name in found if contenders[name].kind == kind]
        return max(names, key=lambda name: found[name][what])

    speedup = {}
    for what in ("tokens_per_s", "decode_tokens_per_s"):
        ours, theirs = fastest("block", what), fastest("vanilla", what)
        speedup[what] = {"block": ours, "vanilla": theirs}
        ratio = found[ours][what] / found[theirs][what]
        if what == "decode_tokens_per_s":
            a, b = contenders[ours], contenders[theirs]
            pairs = zip(a.chunks_s, b.chunks_s, strict=True)
            ratio = median(other / mine for mine, other in pairs) * a.batch / b.batch
        speedup[what]["ratio"] = round(ratio, 3)
    parameters = {v.kind: v.model.report().parameters for v in contenders.values()}
    return {
        "model": shape,
        "parameters": parameters,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "batch": batch or "limit",
        "threads": torch.get_num_threads(),
        "variants": found,
        "speedup": speedup,
    }


def run(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measure every cell; one that fails does not stop the others."""

    def show(text: str) -> None:
        print(text, flush=True)

    recorder.document["bandwidth_gb_s"] = {
        str(options.threads): read_bandwidth(options.threads, repetitions=5)
    }
    limit_bytes = int(options.kv_limit_gib * 2**30)
    for shape, prompt, new, batches in CELLS:
        if shape not in options.shapes or prompt not in options.prompts:
            continue
        for batch in options.batches or batches:
            label = f"{shape}, {prompt}/{new}, batch {batch or 'limit'}"
            show(label)
            try:
                row = measure(shape, prompt, new, batch, limit_bytes, show)
                recorder.add(row)
                show_row(row, show)
            except (WrongResultError, RuntimeError, MemoryError) as error:
                recorder.fail(label, error)
                show(f"  {error}")
            gc.collect()


def show_row(row: dict[str, Any], show: Callable[[str], None]) -> None:
    """Print what was found."""
    for name, found in row["variants"].items():
        kv_mib = found["kv_bytes"] / 2**20
        show(
            f"  {name:18} batch {found['batch']:5}: {found['tokens_per_s']:8.1f} tokens/s, "
            f"decoding {found['decode_tokens_per_s']:8.1f}, KV {kv_mib:7.1f} MiB, "
            f"error {found['error']:.1e}"
        )
    for what, found in row["speedup"].items():
        show(f"  {what}: {found['block']} over {found['vanilla']}: {found['ratio']:.2f}x")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.block_transformer", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["33m", "77m"], choices=sorted(SHAPES))
    add("--prompts", nargs="+", type=int, default=[128, 2048], help="prompt tokens of the cells")
    add("--batches", nargs="+", type=int, help="instead of the cells' own; 0: at the KV limit")
    add("--kv-limit-gib", type=float, default=2.0, help="KV of one variant (default %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    recorder = Recorder("block_transformer", options.json, settings)
    with torch.no_grad():
        run(options, recorder)
    recorder.save()
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
