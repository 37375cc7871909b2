"""Times reading a prompt, stock against patched: python -m bench.prompts [--json OUT].

Decoders of the width of Llama-3.2-1B, with random weights and few layers (all are alike, and what a
prompt costs besides them is little): Mistral's, whose layers have a window, and Llama's, whole or
with half of its batch padded. One forward pass each, in turn in one process, with the same weights.
Outputs are compared with the same model in float32 before anything is timed.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import adaptive
from bench.llama import SHAPES, uniform
from bench.memory import peak_bytes
from bench.record import Recorder
from bench.timing import interleave, relative_error

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 2e-2}
LAST = 64  # tokens whose outputs are compared
LONG = 16384


class Case(NamedTuple):
    """A prompt; ``window`` None: Llama. With ``padded``, every second row is half padding."""

    window: int | None
    tokens: int
    batch: int = 1
    padded: bool = False

    @property
    def label(self) -> str:
        """For people."""
        kind = "Llama" if self.window is None else f"Mistral, window {self.window}"
        rows = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{kind}, {self.tokens} tokens{rows}{', padded' if self.padded else ''}"


CASES = (
    Case(1024, 16384),
    Case(1024, 4096),
    Case(4096, 16384),
    Case(None, 4096),
    Case(None, 4096, 2, True),
    Case(None, 512),
)
VARIANTS: dict[str, dict[str, bool] | None] = {
    "stock": None,
    "patched": {},
    "patched, stock linears": {"exact_linear": False},
}


def build(case: Case, layers: int, dtype: torch.dtype) -> nn.Module:
    """A model in eval mode with weights of the sizes that initialisation gives them."""
    shape = {**SHAPES["llama-3.2-1b"], "num_hidden_layers": layers, "vocab_size": 4096}
    config: Any = LlamaConfig(**shape, max_position_embeddings=1 << 17)
    if case.window is not None:
        config = MistralConfig(**shape, max_position_embeddings=1 << 17, sliding_window=case.window)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu").eval()
    for number, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.copy_(uniform(tuple(parameter.shape), 0.02, dtype, number))
    rotary = model.model.rotary_emb
    rotary.inv_freq, _ = rotary.compute_default_rope_parameters(config)
    rotary.original_inv_freq = rotary.inv_freq
    return model


def read(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """What the last tokens of a prompt come to."""
    with torch.no_grad():
        return model.model(ids, attention_mask=mask, use_cache=True).last_hidden_state[:, -LAST:]


def prompt(case: Case) -> tuple[Tensor, Tensor | None]:
    """Token numbers, and the mask of a padded batch: its left halves."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (case.batch, case.tokens), generator=rng)
    if not case.padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[::2, : case.tokens // 2] = 0
    return ids, mask


def measure(case: Case, options: argparse.Namespace, budget_s: float) -> dict[str, Any]:
    """Compare all variants, weigh their memory, time them."""
    began = time.monotonic()
    ids, mask = prompt(case)
    dtype = getattr(torch, options.dtype)
    truth = None
    if options.truth and dtype != torch.float32:
        truth = read(build(case, options.layers, torch.float32), ids, mask)
    runs, errors, peaks = {}, {}, {}
    for name, how in VARIANTS.items():
        model = build(case, options.layers, dtype)
        if how is not None:
            adaptive.patch(model, **how)
        runs[name] = lambda model=model: read(model, ids, mask)
        gc.collect()
        with peak_bytes() as peak:
            result = runs[name]()
        truth = result if truth is None else truth
        errors[name] = relative_error(result, truth)
        peaks[name] = peak()
        if errors[name] > TOLERANCE[options.dtype]:
            raise RuntimeError(f"bench: error of {name!r} must be small, got {errors[name]:.3g}")
    left = max(0.0, budget_s - (time.monotonic() - began))
    # What runs for minutes is timed once more after its proof, and that is all.
    least = 1 if case.tokens >= LONG else 2
    timings = interleave(runs, threads=options.threads, budget_s=left, at_least=least)
    stock = timings["stock"].median_us
    return {
        "model": case.label,
        **case._asdict(),
        "layers": options.layers,
        "dtype": options.dtype,
        "threads": options.threads,
        "error_against": "float32" if options.truth else "stock",
        "variants": {
            name: {
                "ms": round(timing.median_us / 1e3, 1),
                "ms_min": round(timing.minimum_us / 1e3, 1),
                "clean": timing.clean,
                "dropped": timing.dropped,
                "error": errors[name],
                "peak_bytes": peaks[name],
                "speedup": round(stock / timing.median_us, 3),
            }
            for name, timing in timings.items()
        },
    }


def print_row(console: Console, row: dict[str, Any]) -> None:
    """One line per variant, the error beside the speed."""
    console.print(f"\n{row['model']}, {row['dtype']}, {row['layers']} layers", style="bold")
    for name, v in row["variants"].items():
        console.print(
            f"  {name:24} {v['ms']:10.0f} ms  {v['speedup']:6.2f}x stock  error {v['error']:.1e}"
            f"  {v['peak_bytes'] / 2**20:7.0f} MiB more at its peak",
            highlight=False,
            soft_wrap=True,
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.prompts", description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget-s", type=float, default=600.0, help="wall time to aim at")
    parser.add_argument("--no-truth", dest="truth", action="store_false", help="compare with stock")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recorder = Recorder("prompts", options.json, {"layers": options.layers})
    console = Console()
    ends = time.monotonic() + options.budget_s
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # a refreshing thread would preempt what is being timed
    ) as progress:
        chosen = [CASES[number] for number in options.cases]
        task = progress.add_task("", total=len(chosen))
        for number, case in enumerate(chosen):
            progress.update(task, description=case.label)
            progress.refresh()
            weights = [other.tokens * other.batch for other in chosen[number:]]
            budget_s = max(0.0, ends - time.monotonic()) * weights[0] / sum(weights)
            try:
                row = measure(case, options, budget_s)
                recorder.add(row)
                print_row(console, row)
            except (RuntimeError, ValueError, TypeError, MemoryError) as error:
                recorder.fail(case.label, error)
                console.print(f"[red]{case.label}: {error}")
            gc.collect()
            progress.advance(task)
        progress.update(task, description="done")


if __name__ == "__main__":
    main()
