"""What skipping blocks of a prompt costs: python -m bench.quality_prefill [--json OUT].

The lab model reads each prompt with every policy, from nothing to its last token but one. For pass
keys, the answer is then decoded with every key; for held-out text, every token of the prompt is a
prediction. Each is compared with the same model that computes all of its attention. Beside the
quality stands what was computed, as a share of the scores of causal attention, and the softmax mass
that it had. The file is written after every prompt, so that a run can be cut short. About half an
hour on two slow cores.
"""

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

import adaptive
from bench.lab import data, tasks
from bench.lab.evaluate import HERE, load
from bench.quality import DENSE, Item, decode, items, measure
from bench.record import Recorder

POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("selected", {"mass": mass}) for mass in (0.5, 0.7, 0.9)),
    *(("vertical_slash", {"mass": mass}) for mass in (0.5, 0.7)),
    *(("a_shape", {"budget": budget}) for budget in (0.05, 0.1, 0.2)),
)
"""Patterns, and how much of them; a window's share is one of the prompt, not of what it sees."""

STRIDE = 7
"""Prompts go through the depths of their key in steps of so many; no divisor of their number."""


@dataclass
class Score:
    """What one policy did: pass keys found, and for each token of text its loss."""

    right: list[bool] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add_text(self, ids: Tensor, log: Tensor, dense: Tensor) -> None:
        """Judge the log-probabilities ``[tokens, vocabulary]`` of the tokens after the first."""
        self.nats += (-log.gather(1, ids[1:, None])[:, 0]).tolist()
        self.divergence += (dense.exp() * (dense - log)).sum(-1).tolist()
        self.agreement += (log.argmax(-1) == dense.argmax(-1)).float().tolist()

    def tasks(self, bytes_per_token: float) -> dict[str, dict[str, float | int]]:
        """Means, for each task that there was."""
        found: dict[str, dict[str, float | int]] = {}
        if self.right:
            found["passkey"] = {
                "answers": len(self.right),
                "accuracy": float(np.mean(self.right)),
            }
        if self.nats:
            found["text"] = {
                "tokens": len(self.nats),
                "nats": float(np.mean(self.nats)),
                "bits_per_byte": float(np.mean(self.nats)) / (math.log(2) * bytes_per_token),
                "kl_from_dense": float(np.mean(self.divergence)),
                "top1_agreement": float(np.mean(self.agreement)),
            }
        return found


def read(model: Any, ids: Tensor, keep: int) -> tuple[Any, Tensor]:
    """A cache that holds ``ids``, and the log-probabilities after the last ``keep`` of them."""
    cache = DynamicCache(config=model.config)
    out = model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return cache, out.logits[0].float().log_softmax(-1)


def ask(patches: dict[str, Any], scores: dict[str, Score], item: Item) -> None:
    """Let every policy read one prompt, the dense model first."""
    dense = torch.empty(0)
    for name, patched in patches.items():
        began = time.monotonic()
        if item.task == "passkey":
            cache, _ = read(patched.model, item.prompt[:-1], 1)
            scores[name].seconds.append(time.monotonic() - began)
            best = decode(patched.model, cache, item).argmax(-1)
            scores[name].right.append(bool((best == item.follows).all()))
            continue
        _, log = read(patched.model, item.prompt[:-1], len(item.prompt) - 1)
        scores[name].seconds.append(time.monotonic() - began)
        dense = log if name == DENSE else dense
        scores[name].add_text(item.prompt, log, dense)


def cost(patched: Any) -> dict[str, float | None]:
    """The share of the scores that was computed, and the mass that it had."""
    layers = patched.report().layers
    dense = sum(layer.dense_scores for layer in layers)
    held = [layer for layer in layers if layer.mass_mean is not None]
    return {
        "scores_share": sum(layer.scores for layer in layers) / dense if dense else 1.0,
        "mass_mean": float(np.mean([layer.mass_mean for layer in held])) if held else None,
        "mass_p10": min((layer.mass_p10 for layer in held), default=None),
    }


def label(pattern: str, fields: dict[str, Any]) -> str:
    """A policy by its pattern and the one number that it differs in."""
    return pattern + "".join(f" {name}={value}" for name, value in fields.items())


def run(options: argparse.Namespace, recorder: Recorder, console: Console) -> None:
    """Ask every policy every prompt; passkeys and texts in turn."""
    torch.set_num_threads(options.threads)
    model, tokenizer = load(HERE / "model")
    document = data.long_document()
    bytes_per_token = len(document.encode()) / len(tasks.encoder(tokenizer)(document))
    patches = {DENSE: adaptive.patch(copy.deepcopy(model))}
    fields = {label(pattern, given): (pattern, given) for pattern, given in POLICIES}
    for name, (pattern, given) in fields.items():
        policy = adaptive.BlockSparsePrefill(pattern=pattern, min_context=1, **given)
        patches[name] = adaptive.patch(copy.deepcopy(model), policy)
    scores = {name: Score() for name in patches}
    counts = {"passkey": options.passkey, "keys": 0, "variables": 0, "text": options.text}
    wanted = list(items(tokenizer, options.context, counts))
    texts = [item for item in wanted if item.task == "text"]
    keys = [item for item in wanted if item.task == "passkey"]
    # Depths in an order that leaves them spread wherever the run is cut.
    keys = [keys[i * STRIDE % len(keys)] for i in range(len(keys))]
    order = sorted(keys + texts, key=lambda item: _place(item, keys, texts))
    for number, item in enumerate(order, 1):
        ask(patches, scores, item)
        recorder.document["rows"] = [
            {
                "policy": fields[name][0] if name in fields else name,
                "choice": fields[name][1] if name in fields else {},
                "context": options.context,
                "policies": str(patched.report().policies[0]),
                **cost(patched),
                "seconds_per_prompt": float(np.median(scores[name].seconds)),
                "tasks": scores[name].tasks(bytes_per_token),
            }
            for name, patched in patches.items()
        ]
        recorder.save()
        console.print(f"{number} of {len(order)} prompts", highlight=False)


def _place(item: Item, keys: Sequence[Item], texts: Sequence[Item]) -> float:
    mine = keys if item.task == "passkey" else texts
    return (next(i for i, one in enumerate(mine) if one is item) + 0.5) / len(mine)


def print_rows(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One line per policy."""
    for row in rows:
        found = row["tasks"]
        shown = [f"{label(row['policy'], row['choice']):28} scores {row['scores_share']:6.1%}"]
        if row["mass_mean"] is not None:
            shown.append(f"mass {row['mass_mean']:.3f}")
        if "passkey" in found:
            shown.append(
                f"passkey {found['passkey']['accuracy']:.1%} of {found['passkey']['answers']}"
            )
        if "text" in found:
            text = found["text"]
            shown.append(
                f"{text['bits_per_byte']:.4f} bits/byte, KL {text['kl_from_dense']:.4f}, "
                f"same token {text['top1_agreement']:.1%}"
            )
        console.print("  ".join(shown), highlight=False, soft_wrap=True)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality_prefill", description=__doc__)
    add = parser.add_argument
    add("--context", type=int, default=8192, help="tokens of a prompt")
    add("--passkey", type=int, default=50, help="prompts with a pass key, no multiple of 7")
    add("--text", type=int, default=8, help="stretches of held-out text")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, help="result file")
    add("--chart", type=Path, help="PNG of quality over scores computed to draw")
    return parser


if __name__ == "__main__":
    measure("quality_prefill", arguments().parse_args(), run, print_rows)
