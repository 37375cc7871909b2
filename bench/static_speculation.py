"""Times static self-speculation against static plain decoding: python -m bench.static_speculation.

``--shape 8b --device cuda``: a Llama-3-8B-shaped model with random weights drafts with 8 of its 32
layers, against a token by a pass of all layers. On CUDA both are captured in a graph; on a CPU both
run as they are, which says what the form costs and nothing of a GPU. A coin on the device accepts
drafts, so tokens mean nothing. It has two readings: each draft is right with that chance if those
before it are, or that share of all drafts is accepted. Beside each speed is what the bytes of
weights that passes read would give.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptive
from adaptive.layers.cuda_graph import Captured
from adaptive.layers.hf_static_step import StaticStep
from bench.llama import SHAPES, build
from bench.record import Recorder
from bench.timing import Timing, interleave, speedup

NAMES = {"8b": "llama-3-8b", "1b": "llama-3.2-1b", "tiny": "tiny"}
SHAPES["llama-3-8b"] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
PARTS = 4
"""A draft runs one of so many parts of the layers."""

TOSSES = 997
READINGS = ("chance", "share")


def chance_for(share: float, drafts: int) -> float:
    """The chance of each draft, those before it right, at which ``share`` of all is accepted."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        accepted = sum(middle**place for place in range(1, drafts + 1)) / drafts
        low, high = (middle, high) if accepted < share else (low, middle)
    return high


class Coin:
    """Accepts drafts by tosses made beforehand, on their device, in place of `verify_draft`."""

    def __init__(self, chance: float, batch: int, drafts: int, device: torch.device) -> None:
        """Toss: each draft is right with that chance if those before it are."""
        rng = torch.Generator().manual_seed(0)
        right = torch.rand(TOSSES, batch, drafts, generator=rng) < chance
        self._accepted = right.long().cumprod(-1).sum(-1).to(device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, drafted: Tensor, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `verify_draft`, but for the path."""
        accepted = self._accepted.index_select(0, self._place)[0]
        self._place.add_(1).remainder_(TOSSES)
        tokens = torch.cat([drafted, drafted[:, -1:]], 1)
        tokens.scatter_(1, accepted[:, None], choices.gather(1, accepted[:, None]))
        return accepted, drafted, tokens


class Variant:
    """A static step over a cache that holds a context, and a number of runs of it."""

    def __init__(self, model: Any, options: argparse.Namespace, drafts: int, chance: float) -> None:
        """Set it up, and capture it on CUDA."""
        self.steps: int = options.steps
        self.context: int = options.context
        capacity = self.context + (self.steps + 1) * (drafts + 1)
        layers = model.config.num_hidden_layers
        exit_layer = max(layers // PARTS, 1)
        self.step = StaticStep(model, options.batch, capacity, exit_layer, drafts, 1)
        if drafts:
            self.step.verify = Coin(chance, options.batch, drafts, model.device)
        held: Any = self.step.cache.layers
        for layer in held:
            layer.keys.normal_()
            layer.values.normal_()
        self.reset()
        cuda = model.device.type == "cuda"
        self._run: Callable[[], None] = Captured(self.step.step) if cuda else self.step.step

    def reset(self) -> None:
        """Forget what was made."""
        rows = self.step.rows
        lengths = torch.full_like(rows.lengths, self.context)
        rows.begin(lengths, torch.full_like(rows.last, 7), rows.tokens.shape[1], [], 0)

    @torch.no_grad()
    def run(self) -> None:
        """Make the steps."""
        for _ in range(self.steps):
            self._run()

    def tokens_per_step(self) -> float:
        """Of the last run, for each row."""
        rows = self.step.rows
        return (float(rows.made.float().mean()) - 1) / self.steps  # one came with the context


def time_cuda(variants: dict[str, Variant], repetitions: int) -> dict[str, Timing]:
    """Time runs in turn, by events around all steps of each."""
    rounds: dict[str, dict[int, float]] = {name: {} for name in variants}
    for turn in range(repetitions):
        for name, variant in variants.items():
            variant.reset()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            variant.run()
            end.record()
            end.synchronize()
            rounds[name][turn] = start.elapsed_time(end) * 1e3
    return {name: Timing(times, len(times), 0) for name, times in rounds.items()}


def time_cpu(variants: dict[str, Variant], repetitions: int) -> dict[str, Timing]:
    """Time runs in turn, by the time of this thread."""

    def again(variant: Variant) -> Callable[[], None]:
        def run() -> None:
            variant.reset()
            variant.run()

        return run

    runs = {name: again(variant) for name, variant in variants.items()}
    return interleave(runs, threads=1, repetitions=repetitions, budget_s=60.0)


def by_bytes(model: Any, drafts: int, tokens: float) -> float:
    """Speed over plain decoding if a pass took the time of the weights that it reads."""
    layers = list(model.model.layers)
    layer = sum(p.nbytes for p in layers[0].parameters())
    head, part = model.lm_head.weight.nbytes, max(len(layers) // PARTS, 1)
    plain = len(layers) * layer + head
    step = ((drafts + 1) * part + len(layers) - part) * layer + (drafts + 1) * head
    return float(tokens * plain / step)


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row: plain decoding and each number of drafts, at both readings of the share."""
    dtype = getattr(torch, options.dtype)
    model = build(NAMES[options.shape], dtype).to(options.device)
    exit_layer = max(model.config.num_hidden_layers // PARTS, 1)
    policy = adaptive.SelfSpeculative(exit_layer=exit_layer, draft=1, static=True)
    with adaptive.patch(model, policy):
        variants = {"plain": Variant(model, options, 0, 0.0)}
        for drafts in options.drafts:
            for reading in READINGS:
                each = reading == "chance"
                chance = options.accepted if each else chance_for(options.accepted, drafts)
                variants[f"{drafts} drafts, {reading}"] = Variant(model, options, drafts, chance)
        for variant in variants.values():
            variant.run()
        cuda = model.device.type == "cuda"
        timings = (time_cuda if cuda else time_cpu)(variants, options.repetitions)
        found = {}
        for name, variant in variants.items():
            tokens, drafts = variant.tokens_per_step(), variant.step.drafts
            found[name] = {
                "us_per_step": round(timings[name].median_us / options.steps, 3),
                "tokens_per_step": round(tokens, 3),
                "speedup": round(speedup(timings["plain"], timings[name]) * tokens, 3),
                "by_bytes": round(by_bytes(model, drafts, tokens), 3),
                "clean": timings[name].clean,
                "dropped": timings[name].dropped,
            }
    return {
        "model": NAMES[options.shape],
        "dtype": options.dtype,
        "device": str(model.device),
        "captured": cuda,
        "batch": options.batch,
        "context": options.context,
        "exit_layer": exit_layer,
        "accepted": options.accepted,
        "variants": found,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.static_speculation", description=__doc__)
    add = parser.add_argument
    add("--shape", default="8b", choices=sorted(NAMES))
    add("--device", default="cuda")
    add("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    add("--batch", type=int, default=1)
    add("--context", type=int, default=1024, help="tokens in the cache when a run begins")
    add("--accepted", type=float, default=0.7, help="what the coin gives")
    add("--drafts", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    add("--steps", type=int, default=64, help="steps of each run")
    add("--repetitions", type=int, default=11)
    add("--json", type=Path, help="result file")
    return parser.parse_args(arguments)


def main() -> int:
    """Measure, print, write; 1 if it could not be measured."""
    options = parse()
    torch.set_num_threads(1)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    recorder = Recorder("static_speculation", options.json, settings)
    try:
        recorder.add(row := measure(options))
    except (RuntimeError, ValueError, MemoryError) as error:
        recorder.fail(options.shape, error)
        print(error, file=sys.stderr)
        return 1
    for name, variant in row["variants"].items():
        print(name, variant, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
