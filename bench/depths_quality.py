"""What layers that run for some tokens or sequences cost in quality, on models of real text.

python -m bench.depths_quality --work DIR --json RESULT.json [--picture PNG]

Part "scratch": the small model that was trained to route, as it looks ahead, and decoding by the
threshold and by the predictor, beside the dense model of as many operations. Part "tuned": the lab
model with MindSkip's routers after tuning, beside routers that nobody trained, and the same layers,
or those that change states least, left out for all. Part "fitted": the same with routers that were
fitted without a gradient, for several shares.
"""

import argparse
import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

import adaptive
from adaptive import MixtureOfDepths, RouterWeights
from adaptive.train import fit_router, layer_similarity, least_changing, tune_router
from bench.lab import depths
from bench.lab.evaluate import load as load_lab
from bench.record import Recorder, load
from bench.timing import interleave, speedup

WINDOW = 256
WINDOWS = 64
ROWS = 8
"""Windows of a batch."""
PARTS = ["scratch", "tuned", "fitted"]
TARGETS = (0.25, 0.5, 0.75)
STEPS = 30
CAPACITIES = (0.2, 0.4, 0.6, 0.8)
CALIBRATION = 128
"""Windows that routers are fitted to."""
SEEDS = 2
TUNED = (3, 4, 5, 6, 7)
"""Layers of the lab model with a router: those behind its heads that find things again."""
LAB = depths.HERE / "model"


def held_out(work: Path) -> tuple[list[Tensor], float]:
    """Batches of windows of the held-out text, and its tokens per byte."""
    tokens, size = depths.corpus("heldout", work)
    return windows(tokens, WINDOWS, ROWS), len(tokens) / size


def windows(tokens: np.ndarray, count: int, rows: int) -> list[Tensor]:
    """Batches of ``rows`` of ``count`` windows, evenly spread, the token after each with it."""
    starts = np.linspace(0, len(tokens) - WINDOW - 1, count).astype(int)
    each = [tokens[start : start + WINDOW + 1].astype(np.int64) for start in starts]
    return list(torch.from_numpy(np.stack(each)).split(rows))


@torch.inference_mode()
def nats(model: Any, batches: list[Tensor], first: int = 0) -> float:
    """Mean nats per token; the first tokens, if some are named, come in a pass of their own."""
    losses = []
    for ids in batches:
        given, cache = ids[:, :-1], DynamicCache(config=model.config)
        parts = [given[:, :first], given[:, first:]] if first else [given]
        logits = [model(part, past_key_values=cache).logits for part in parts]
        found = torch.cat(logits, 1).float().flatten(0, 1)
        losses.append(float(F.cross_entropy(found, ids[:, 1:].flatten())))
    return sum(losses) / len(losses)


def scratch(record: Recorder, work: Path) -> None:
    """The models that were trained from scratch."""
    batches, tokens_per_byte = held_out(work)
    model, router = depths.load("routed")
    dense, _ = depths.load("dense")
    assert router is not None
    layers, routed = model.config.num_hidden_layers, len(router.layers)
    common: dict[str, Any] = {"router": router, "weighted": True, "audit_every": None}
    ways = {
        "looking ahead": (MixtureOfDepths(capacity=0.25, **common), 0),
        "threshold": (MixtureOfDepths(threshold=0.5, **common), 0),
        "predictor": (MixtureOfDepths(capacity=0.25, decode="predictor", **common), 1),
    }
    rows = [("dense", float(dense.config.num_hidden_layers), None, nats(dense, batches))]
    for name, (policy, first) in ways.items():
        with adaptive.patch(model, policy) as patched:
            lost = nats(model, batches, first)
            log = patched.report().routing
        assert log is not None
        assert log.share is not None
        rows.append((name, layers - routed + routed * log.share, log.share, lost))
    for name, depth, share, lost in rows:
        row = {"part": "scratch", "policy": name, "layers_run": round(depth, 3), "share": share}
        add(record, row, lost, tokens_per_byte)


def add(record: Recorder, row: dict[str, Any], lost: float, tokens_per_byte: float) -> None:
    """Record one row with its quality."""
    bits = round(lost / math.log(2) * tokens_per_byte, 4)
    record.add({**row, "bits_per_byte": bits, "tokens": WINDOW * WINDOWS})
    print(record.document["rows"][-1], flush=True)


Policies = dict[tuple[str, float], MixtureOfDepths]
"""By name and setting."""


def tuned_policies(model: Any, corpus: np.ndarray) -> Policies:
    """All policies of the part "tuned" on the lab model's attention."""
    train = [ids[:, :-1] for ids in windows(corpus, STEPS * 4, 4)]
    found: Policies = {}
    for target in TARGETS:
        tuned = tune_router(
            model, train, steps=STEPS, layers=TUNED, target=target, strength=8.0, progress=False
        )
        print(tuned, flush=True)
        found["tuned", target] = tuned.policy
    found |= left_out(model, train[:4])
    for count in range(1, len(TUNED)):
        found["last", count] = MixtureOfDepths.drop(TUNED[-count:], unit="attention")
    for seed in range(3):
        router = RouterWeights.random(TUNED, model.config.hidden_size, seed=seed)
        found["random", seed] = MixtureOfDepths.mindskip(router)
    return found


def fitted_policies(model: Any, corpus: np.ndarray) -> Policies:
    """All policies of the part "fitted": routers whose thresholds are for the same shares."""
    train = [ids[:, :-1] for ids in windows(corpus, CALIBRATION, ROWS)]
    found = left_out(model, train)
    for capacity in CAPACITIES:
        common: dict[str, Any] = {"capacity": capacity, "unit": "attention"}
        fit = fit_router(model, train, layers=TUNED, **common)
        print(fit, flush=True)
        found["fitted", capacity] = fit.policy
        fit = fit_router(model, train, layers=TUNED, per_layer=True, **common)
        found["fitted per layer", capacity] = fit.policy
        for seed in range(SEEDS):
            router = RouterWeights.random(TUNED, model.config.hidden_size, seed=seed)
            fit = fit_router(model, train, router=router, per_layer=True, **common)
            found[f"random per layer, seed {seed}", capacity] = fit.policy
    return found


def left_out(model: Any, train: list[Tensor]) -> Policies:
    """The layers whose attention changes least, left out for all."""
    similarity = layer_similarity(model, train, unit="attention")
    spared = [layer for layer in range(len(similarity)) if layer not in TUNED]
    return {
        ("least changing", count): MixtureOfDepths.drop(
            least_changing(similarity, count, spared), unit="attention"
        )
        for count in range(1, len(TUNED))
    }


def compared(record: Recorder, work: Path, part: str) -> None:
    """The lab model with the policies of a part: bits per byte, and time saved of a pass."""
    batches, tokens_per_byte = held_out(work)
    model, _ = load_lab(LAB)
    corpus, _ = depths.corpus("train", work)
    one = [ids[row : row + 1, :-1] for ids in batches[:2] for row in range(0, ROWS, 2)]
    made = {"tuned": tuned_policies, "fitted": fitted_policies}[part](model, corpus)
    for (name, setting), policy in {("dense", 0): None, **made}.items():
        twin = copy.deepcopy(model)
        ours = policy and dataclasses.replace(policy, audit_every=None)
        with adaptive.patch(model), adaptive.patch(twin, ours or adaptive.Exact()) as patched:
            lost = nats(twin, batches)
            log = patched.report().routing
            timings = interleave(
                {"dense": _pass(model, one), "ours": _pass(twin, one)},
                threads=1,
                repetitions=7 if part == "tuned" else 5,
                budget_s=20,
            )
        row = {
            "part": part,
            "policy": name,
            "setting": setting,
            "share": None if log is None else log.share,
            "shares": {} if log is None else {str(i): x.share for i, x in log.layers.items()},
            "ms": round(timings["ours"].median_us / 1e3 / len(one), 3),
            "time_saved": round(1 - 1 / speedup(timings["dense"], timings["ours"]), 4),
        }
        add(record, row, lost, tokens_per_byte)


def _pass(model: Any, batches: list[Tensor]) -> Any:
    def run() -> None:
        with torch.inference_mode():
            for ids in batches:
                model(ids, use_cache=False)

    return run


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture of the part "tuned": bits per byte over time saved."""
    from bench.depths_chart import picture

    picture([row for row in document["rows"] if row["part"] == "tuned"], path)


def main() -> None:
    """Measure, write the result, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="where encoded text is cached")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--picture", type=Path, help="where the picture goes; alone: of --json")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.parts and chosen.work:
        settings = {
            "threads": 1,
            "window": WINDOW,
            "windows": WINDOWS,
            "steps": STEPS,
            "calibration": CALIBRATION,
        }
        record = Recorder("depths_quality", chosen.json, settings)
        for part in chosen.parts:
            if part == "scratch":
                scratch(record, chosen.work)
            else:
                compared(record, chosen.work, part)
        record.save()
    if chosen.picture:
        draw(load(chosen.json), chosen.picture)


if __name__ == "__main__":
    main()
