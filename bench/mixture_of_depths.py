"""Mixture-of-Depths: time of routed layers against the share that runs, in prompts and decoding.

python -m bench.mixture_of_depths --json RESULT.json

A model of three layers of width 2048 with random weights; the last two are routed. Prompts: blocks
by capacity, against what a layer costs in full times the share. Decoding, one sequence: what a
skipped block saves of its time. Decoding, eight: calls and time saved where tokens decide for
themselves, against the chance that all eight skip, and where sequences decide once.
"""

import argparse
import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import adaptive
from adaptive import MixtureOfDepths, RouterWeights
from bench.llama import SHAPES, build
from bench.mixture_of_depths_truth import by_hand
from bench.record import Recorder
from bench.timing import TOLERANCE, Timing, WrongResultError, interleave, relative_error, speedup

SHAPES["routed"] = {
    "hidden_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 512,
}
ROUTED = (1, 2)
TOKENS = 2048
PROVEN = 256
"""Tokens of the prompt that is compared with a computation by hand."""
SHARES = (0.125, 0.25, 0.5)
BATCH = 8
STEPS = 16
CONTEXT = 256
NEVER = 2.0
"""A threshold that no score reaches."""


def twins(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """A model per name, with modules of its own and the same weights in memory."""
    shared = {id(weight): weight for weight in model.parameters()}
    return {name: copy.deepcopy(model, dict(shared)) for name in names}


unaudited = functools.partial(MixtureOfDepths, audit_every=None)
"""What is timed is the policy, not what measures its error."""
DROPPED = unaudited(layers=ROUTED, decide="sequence")


@torch.inference_mode()
def prompt(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a prompt."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def proven(model: Any, policies: dict[str, Any], ids: Tensor) -> dict[str, float]:
    """Errors of the policies against `by_hand`, in float32: bfloat16 moves what is nearly equal.

    Raises:
        WrongResultError: One is too large, or another share ran.
    """
    exact = copy.deepcopy(model).float()
    errors = {}
    for capacity in SHARES:
        router = policies[str(capacity)].router
        wanted = by_hand(exact, ids, router, capacity)
        with adaptive.patch(exact, policies[str(capacity)]) as patched:
            errors[str(capacity)] = relative_error(prompt(exact, ids), wanted)
            log = patched.report().routing
        if errors[str(capacity)] > TOLERANCE["float32"] or log is None or log.share != capacity:
            raise WrongResultError(f"bench: capacity {capacity} is wrong: {errors}, {log}")
    return errors


def prompts(model: nn.Module, record: Recorder, threads: int, budget_s: float) -> None:
    """Prompts of 2048 tokens by capacity; the layers' time is what is above dropping them."""
    ids = torch.randint(0, 512, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    router = RouterWeights.random(ROUTED, model.config.hidden_size)
    policies: dict[str, Any] = {
        "dense": adaptive.Exact(),
        "dropped": DROPPED,
        **{str(c): unaudited(router=router, capacity=c) for c in SHARES},
    }
    errors = proven(model, policies, ids[:, :PROVEN])
    models = twins(model, list(policies))
    for name, policy in policies.items():
        adaptive.patch(models[name], policy)
        prompt(models[name], ids[:, :PROVEN])
    timings = interleave(
        {name: (lambda m=found: prompt(m, ids)) for name, found in models.items()},
        threads=threads,
        repetitions=5,
        at_least=2,
        budget_s=budget_s,
    )
    full = layers_us(timings, "dense")
    for capacity in SHARES:
        routed = layers_us(timings, str(capacity))
        record.add(
            {
                "what": "prompt",
                "tokens": TOKENS,
                "batch": 1,
                "share": capacity,
                **_times(timings[str(capacity)]),
                "layers_ms": round(routed / 1e3, 2),
                "dense_layers_ms": round(full / 1e3, 2),
                "speedup_of_layers": round(full / routed, 3),
                "of_ideal": round(full / routed * capacity, 3),
                "speedup": round(speedup(timings["dense"], timings[str(capacity)]), 3),
                "error": errors[str(capacity)],
            }
        )
        print(record.document["rows"][-1])


def layers_us(timings: dict[str, Timing], name: str) -> float:
    """Time of the routed layers: of the model, less that of the model without them."""
    found, without = timings[name].rounds, timings["dropped"].rounds
    each = sorted(found[i] - without[i] for i in found.keys() & without.keys())
    return each[len(each) // 2]


def _times(timing: Timing) -> dict[str, Any]:
    us, least = (found := timing.to_dict()).pop("us"), found.pop("us_min")
    return {"ms": round(us / 1e3, 3), "ms_min": round(least / 1e3, 3), **found}


def drawn(batch: int) -> Tensor:
    """Sequences of random tokens, of a context and what is decoded after it."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (batch, CONTEXT + STEPS), generator=rng)


class Steps:
    """Decodes given tokens after a context; every call begins anew behind it."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        """Fill a cache with the context."""
        self.model = model
        self.tokens = tokens
        self.cache: Any = DynamicCache(config=model.config)  # type: ignore[arg-type]
        with torch.inference_mode():
            model(self.tokens[:, :CONTEXT], past_key_values=self.cache, use_cache=True)

    def __call__(self) -> None:
        """Decode all tokens, and take them back."""
        with torch.inference_mode():
            for step in range(CONTEXT, CONTEXT + STEPS):
                self.model(self.tokens[:, step : step + 1], past_key_values=self.cache)
        self.cache.crop(-STEPS)


def decoding(model: Any, record: Recorder, threads: int, budget_s: float) -> None:
    """One sequence: the share of a block's time that a skipped block saves."""
    router = RouterWeights.random(ROUTED, model.config.hidden_size)
    never = unaudited(router=router, threshold=0.0, decode_threshold=NEVER)
    always = unaudited(router=router, threshold=0.0)
    policies = {"dense": adaptive.Exact(), "never": never, "always": always}
    models = twins(model, [*policies, "shallow"])
    models["shallow"].model.layers = models["shallow"].model.layers[:1]
    policies["shallow"], variants = adaptive.Exact(), {}
    for name, found in models.items():
        adaptive.patch(found, policies[name])
        variants[name] = Steps(found, drawn(1))
    timings = interleave(variants, threads=threads, repetitions=7, budget_s=budget_s)
    names = ("dense", "shallow", "never", "always")
    full, shallow, skipped, run = (timings[name].rounds for name in names)
    common = sorted(full.keys() & shallow.keys() & skipped.keys() & run.keys())
    saved = sorted((full[i] - skipped[i]) / (full[i] - shallow[i]) for i in common)
    costs = sorted(run[i] / full[i] - 1 for i in common)
    record.add(
        {
            "what": "decode",
            "tokens": STEPS,
            "batch": 1,
            "share": 0.0,
            **_times(timings["never"]),
            "dense_ms": _times(timings["dense"])["ms"],
            "without_layers_ms": _times(timings["shallow"])["ms"],
            "saved_of_block": round(saved[len(saved) // 2], 3),
            "cost_if_all_run": round(costs[len(costs) // 2], 4),
        }
    )
    print(record.document["rows"][-1])


def scores_in(model: nn.Module, router: RouterWeights, tokens: Tensor, mean: bool) -> Tensor:
    """Scores of the decoded tokens, or of the sequences' contexts, layer by layer."""
    seen: list[Tensor] = []
    steps = None if mean else Steps(model, tokens)
    hooks = []
    for index in router.layers:
        weight, _ = router.of(index, torch.device("cpu"))
        norm = model.get_submodule(f"model.layers.{index}.input_layernorm")
        hooks.append(
            norm.register_forward_hook(
                lambda _, __, out, w=weight: seen.append((out.float().mean(1) @ w).sigmoid())
            )
        )
    if steps is None:
        Steps(model, tokens)
    else:
        steps()
    for hook in hooks:
        hook.remove()
    return torch.cat(seen)


def batches(model: nn.Module, record: Recorder, threads: int, budget_s: float) -> None:
    """Eight sequences: calls and time saved, tokens against sequences."""
    router, tokens = RouterWeights.random(ROUTED, model.config.hidden_size), drawn(BATCH)
    models = twins(model, ["dense", "dropped"])
    adaptive.patch(models["dense"], adaptive.Exact())
    adaptive.patch(models["dropped"], DROPPED)
    variants: dict[str, Any] = {name: Steps(found, tokens) for name, found in models.items()}
    logs = {}
    found = twins(model, [f"{d} {s}" for d in ("token", "sequence") for s in SHARES])
    scores = {d: scores_in(model, router, tokens, d == "sequence") for d in ("token", "sequence")}
    for share in SHARES:
        for decide in scores:
            least = float(scores[decide].quantile(1 - share))
            name = f"{decide} {share}"
            rule = {"decode_threshold": least} if decide == "token" else {}
            threshold = 0.0 if decide == "token" else least
            policy = unaudited(router=router, threshold=threshold, decide=decide, **rule)
            handle = adaptive.patch(found[name], policy)
            variants[name] = Steps(found[name], tokens)
            handle.reset_stats()
            variants[name]()
            logs[name] = handle.report().routing
    timings = interleave(variants, threads=threads, repetitions=5, budget_s=budget_s)
    full = layers_us(timings, "dense")
    for name, log in logs.items():
        assert log is not None
        assert log.share is not None
        layers = log.layers.values()
        quiet = sum(x.decode_skipped for x in layers) / sum(x.decode_calls for x in layers)
        record.add(
            {
                "what": f"decode by {name.split()[0]}",
                "tokens": STEPS,
                "batch": BATCH,
                "share": round(log.share, 4),
                **_times(timings[name]),
                "calls_skipped": round(quiet, 4),
                "all_skip_by_chance": round((1 - log.share) ** BATCH, 4),
                "saved_of_layers": round(1 - layers_us(timings, name) / full, 4),
            }
        )
        print(record.document["rows"][-1])


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--threads", type=int, default=1)
    parts = {"decoding": decoding, "prompts": prompts, "batches": batches}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of each part")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = {"threads": chosen.threads, "budget_s": chosen.budget, "dtype": "bfloat16"}
    record = Recorder("mixture_of_depths", chosen.json, settings)
    model = build("routed", torch.bfloat16)
    for name in chosen.parts:
        parts[name](model, record, chosen.threads, chosen.budget)
    record.save()


if __name__ == "__main__":
    main()
