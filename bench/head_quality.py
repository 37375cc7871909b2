"""What heads that are left out cost in quality: python -m bench.head_quality --work DIR --json OUT.

The lab model has two KV heads in each of eight layers, so a share of its heads is a number of
layers that run one of the two. Which layers and which head costs least is tried out on text of its
training. Beside that: the head of longer vectors in all layers, or in each sequence by its prompt;
routers that `tune_heads` fitted; and heads and routers that nobody chose.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

import adaptive
from adaptive import ExpertRouterWeights, HeadRouting
from adaptive.train import HeadTuning, tune_heads
from bench.depths_quality import LAB, WINDOW, held_out, nats, windows
from bench.lab import depths
from bench.lab.evaluate import load
from bench.record import Recorder

KV_HEADS = 2
SHARES = {0.875: 2, 0.75: 4, 0.5: 8}
"""Of the KV heads, and the layers of which half do not run."""
SEEDS = 3
PROMPT = WINDOW // 2
"""Tokens that run all heads before a sequence's own are chosen."""
TRIED = 16
"""Windows of the training text on which heads are left out in turn."""
ROWS = 8


def fixed(kept: Mapping[int, int]) -> HeadRouting:
    """One KV head of each of these layers, for all tokens."""
    return HeadRouting(heads=tuple(sorted(kept.items())), audit_every=None)


def some(router: ExpertRouterWeights, layers: tuple[int, ...]) -> HeadRouting:
    """These layers of a router: each was fitted by itself."""
    cpu = torch.device("cpu")
    weight, bias = ({n: router.of(n, cpu)[part] for n in layers} for part in (0, 1))
    routers = ExpertRouterWeights.from_tensors(weight, bias)
    return HeadRouting(top_k=1, router=routers, audit_every=None)


def longest(found: HeadTuning, layers: tuple[int, ...]) -> HeadRouting:
    """The head of each layer that adds most on average."""
    return fixed({n: max(range(KV_HEADS), key=found.importance[n].__getitem__) for n in layers})


def cost(model: Any, policy: HeadRouting, batches: list[Tensor]) -> float:
    """Mean nats per token."""
    with adaptive.patch(model, policy):
        return nats(model, batches)


def tried(model: Any, batches: list[Tensor]) -> dict[int, int]:
    """The head of each layer without whose like the model does best; cheapest layers first."""
    costs = {}
    for layer in range(model.config.num_hidden_layers):
        each = [cost(model, fixed({layer: head}), batches) for head in range(KV_HEADS)]
        costs[layer] = min(zip(each, range(KV_HEADS), strict=True))
    return {layer: costs[layer][1] for layer in sorted(costs, key=costs.__getitem__)}


def after_prompts(
    model: Any, choose: Callable[[Tensor], HeadRouting | None], batches: list[Tensor]
) -> float:
    """Mean nats per token behind prompts that run all heads; each sequence's own policy."""
    losses = []
    for ids in torch.cat(batches)[:, None]:
        cache, policy = DynamicCache(config=model.config), choose(ids[:, :PROMPT])
        with torch.inference_mode():
            model(ids[:, :PROMPT], past_key_values=cache)
        with adaptive.patch(model, *([] if policy is None else [policy])), torch.inference_mode():
            logits = model(ids[:, PROMPT:-1], past_key_values=cache).logits
        losses.append(float(F.cross_entropy(logits[0].float(), ids[0, PROMPT + 1 :])))
    return mean(losses)


def run(recorder: Recorder, work: Path, steps: int) -> None:
    """Choose heads on training text, and record what is lost on text held out of it."""
    batches, tokens_per_byte = held_out(work)
    model, _ = load(LAB)
    corpus, _ = depths.corpus("train", work)
    train = [ids[:, :-1] for ids in windows(corpus, steps * ROWS, ROWS)]
    order = tried(model, windows(corpus, TRIED, ROWS))
    tuned = tune_heads(model, train, steps=steps, top_k=1, progress=False)
    print(tuned, flush=True)
    assert tuned.policy.router is not None
    recorder.document["tuning"] = {
        "seconds": round(tuned.seconds, 1),
        "tokens": tuned.tokens,
        "explained": {str(n): round(share, 3) for n, share in tuned.explained.items()},
        "cheapest_layers_first": list(order),
    }
    unit = tokens_per_byte / math.log(2)
    dense = unit * nats(model, batches)
    later = unit * after_prompts(model, lambda _: None, batches)
    row = {"what": "all heads", "share": 1.0, "layers": [], "more_bits": 0.0}
    recorder.add({**row, "bits_per_byte": round(dense, 4), "more_bits_after_prompts": 0.0})
    for share, count in SHARES.items():
        layers = tuple(sorted(list(order)[:count]))
        row = {"share": share, "layers": list(layers)}
        for what, policies in forms(model, order, tuned, layers).items():
            found = unit * mean(cost(model, policy, batches) for policy in policies)
            behind = None
            if len(policies) == 1:
                behind = unit * after_prompts(model, lambda _, p=policies[0]: p, batches) - later
            add(recorder, {"what": what, **row}, found, found - dense, behind)
        own = unit * after_prompts(model, own_longest(model, layers), batches) - later
        add(recorder, {"what": "sequence, longest", **row}, None, None, own)


def forms(
    model: Any, order: Mapping[int, int], tuned: HeadTuning, layers: tuple[int, ...]
) -> dict[str, list[HeadRouting]]:
    """The policies of some layers by name; several where chance chose."""
    width, seeds = model.config.hidden_size, range(SEEDS)
    routers = (ExpertRouterWeights.random(layers, KV_HEADS, width, seed=seed) for seed in seeds)
    chances = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = (torch.randint(KV_HEADS, (len(layers),), generator=rng).tolist() for rng in chances)
    assert tuned.policy.router is not None
    return {
        "fixed, tried out": [fixed({n: order[n] for n in layers})],
        "fixed, longest": [longest(tuned, layers)],
        "token, tuned": [some(tuned.policy.router, layers)],
        "fixed, random": [fixed(dict(zip(layers, heads, strict=True))) for heads in drawn],
        "token, random": [some(router, layers) for router in routers],
    }


def own_longest(model: Any, layers: tuple[int, ...]) -> Callable[[Tensor], HeadRouting]:
    """What chooses the heads of a sequence by its prompt."""

    def choose(prompt: Tensor) -> HeadRouting:
        return longest(tune_heads(model, [prompt], steps=1, top_k=1, progress=False), layers)

    return choose


def add(
    recorder: Recorder,
    row: dict[str, Any],
    found: float | None,
    more: float | None,
    behind: float | None,
) -> None:
    """Record a row, in bits per byte."""
    named = {"bits_per_byte": found, "more_bits": more, "more_bits_after_prompts": behind}
    numbers = {name: None if x is None else round(x, 4) for name, x in named.items()}
    recorder.add({**row, **numbers})
    print(recorder.document["rows"][-1], flush=True)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.head_quality", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where encoded text is cached")
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    parser.add_argument("--steps", type=int, default=120, help="batches that routers see")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"threads": 1, "window": WINDOW, "prompt": PROMPT, "steps": options.steps}
    recorder = Recorder("head_quality", options.json, {**settings, "rows": ROWS, "seeds": SEEDS})
    run(recorder, options.work, options.steps)


if __name__ == "__main__":
    main()
