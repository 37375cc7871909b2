"""Mixture-of-Depths by sequence: what it gains to decode those together that decided alike.

python -m bench.sequence_groups --json RESULT.json

32 sequences on the model of `bench.mixture_of_depths`, decoded eight at a time: in the order in
which they came, and sorted by the layers that they run, so that a layer's weights are not read in
batches that all skip it. Tokens of a sequence are proved to be the same in either batch.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaptive
from adaptive import RouterWeights
from bench.llama import build
from bench.mixture_of_depths import (
    BATCH,
    CONTEXT,
    DROPPED,
    ROUTED,
    SHARES,
    Steps,
    _times,
    drawn,
    layers_us,
    scores_in,
    twins,
    unaudited,
)
from bench.record import Recorder
from bench.timing import TOLERANCE, WrongResultError, interleave, relative_error

SEQUENCES = 32


class Batches:
    """Decodes sequences in batches, one batch after another."""

    def __init__(self, model: nn.Module, tokens: Tensor, order: Tensor) -> None:
        """Read the contexts."""
        self.each = [Steps(model, tokens[part]) for part in order.split(BATCH)]

    def __call__(self) -> None:
        """Decode all tokens of all batches, and take them back."""
        for steps in self.each:
            steps()


@torch.inference_mode()
def next_logits(model: Any, tokens: Tensor, order: Tensor) -> Tensor:
    """Logits after the contexts, ``[sequences, vocabulary]``, of batches in that order."""
    made = [model(tokens[part, :CONTEXT]).logits[:, -1] for part in order.split(BATCH)]
    return torch.cat(made)[order.argsort()]


def alike_first(runs: Tensor) -> Tensor:
    """An order in which sequences that run the same layers, ``[layers, sequences]``, are next.

    That of a Gray code, in which neighbouring groups differ in few layers, since batches mix them.
    """
    ranks = (runs.long().flip(0).cumsum(0) % 2).flip(0)
    return (ranks * 2 ** torch.arange(len(runs))[:, None]).sum(0).argsort(stable=True)


def measure(model: Any, record: Recorder, threads: int, budget_s: float) -> None:
    """Both orders at each share."""
    router, tokens = RouterWeights.random(ROUTED, model.config.hidden_size), drawn(SEQUENCES)
    scores = scores_in(model, router, tokens, mean=True)
    came, logs, orders = torch.arange(SEQUENCES), {}, {}
    models = twins(model, ["dense", "dropped", *map(str, SHARES)])
    adaptive.patch(models["dense"], adaptive.Exact())
    adaptive.patch(models["dropped"], DROPPED)
    variants: dict[str, Any] = {n: Batches(models[n], tokens, came) for n in ("dense", "dropped")}
    for share in SHARES:
        least = float(scores.quantile(1 - share))
        runs = scores.view(len(ROUTED), SEQUENCES) >= least
        found = models[str(share)]
        policy = unaudited(router=router, threshold=least, decide="sequence")
        handle = adaptive.patch(found, policy)
        for name, order in (("as they came", came), ("alike together", alike_first(runs))):
            orders[name, share] = order
            variants[f"{name} {share}"] = Batches(found, tokens, order)
            handle.reset_stats()
            variants[f"{name} {share}"]()
            logs[name, share] = handle.report().routing
        first, second = (
            next_logits(found, tokens, orders[n, share]) for n, s in logs if s == share
        )
        error = relative_error(first, second)
        if error > TOLERANCE["bfloat16"]:
            raise WrongResultError(f"bench: another batch moves the logits by {error}")
    timings = interleave(variants, threads=threads, repetitions=5, budget_s=budget_s)
    full = layers_us(timings, "dense")
    for (name, share), log in logs.items():
        assert log is not None
        assert log.share is not None
        layers = log.layers.values()
        record.add(
            {
                "what": name,
                "sequences": SEQUENCES,
                "batch": BATCH,
                "share": round(log.share, 4),
                **_times(timings[f"{name} {share}"]),
                "calls_skipped": round(
                    sum(x.decode_skipped for x in layers) / sum(x.decode_calls for x in layers), 4
                ),
                "saved_of_layers": round(1 - layers_us(timings, f"{name} {share}") / full, 4),
            }
        )
        print(record.document["rows"][-1])


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds of all variants")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = {"threads": chosen.threads, "budget_s": chosen.budget, "dtype": "bfloat16"}
    record = Recorder("sequence_groups", chosen.json, settings)
    measure(build("routed", torch.bfloat16), record, chosen.threads, chosen.budget)
    record.save()


if __name__ == "__main__":
    main()
