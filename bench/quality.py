"""What skipping keys costs in quality: python -m bench.quality [--json OUT] [--chart PNG].

The lab model reads 8192 tokens densely, then answers with each policy at each budget: a pass key,
several named keys, chains of variables, and held-out text, one token at a time with the right
tokens before it, as greedy decoding would if it made no mistake. Each is compared with the same
model that reads every key. Beside the accuracy stands what it cost: keys and values read, as a
share of the dense ones, and the softmax mass that they had. About twenty minutes on two slow cores.
"""

import argparse
import copy
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import DynamicCache

import adaptive
from bench.lab import data, tasks
from bench.lab.evaluate import HERE, load
from bench.quality_policies import BUDGETS, policies
from bench.record import Recorder

DENSE = "dense"
FIRST_SEED = 1000  # beyond those that chose the model
TEXT_TOKENS = 64


@dataclass(frozen=True)
class Item:
    """A prompt, what truly follows it, and which stretches of that are answers.

    Attributes:
        task: "passkey", "keys", "variables" or "text".
        prompt: Tokens read densely; the last of them is the first decoding step.
        follows: Tokens fed one by one, each predicted from those before it.
        answers: Stretches of ``follows`` that must be right as a whole; none: only compared.
    """

    task: str
    prompt: Tensor
    follows: Tensor
    answers: tuple[slice, ...] = ()


@dataclass
class Score:
    """What one policy did on one task."""

    right: list[bool] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)

    def add(self, item: Item, logits: Tensor, dense: Tensor) -> None:
        """Judge the logits ``[tokens, vocabulary]`` that predict ``item.follows``."""
        best = logits.argmax(-1)
        self.right += [bool((best[s] == item.follows[s]).all()) for s in item.answers]
        log, dense_log = logits.log_softmax(-1), dense.log_softmax(-1)
        self.nats += (-log.gather(1, item.follows[:, None])[:, 0]).tolist()
        self.divergence += (dense_log.exp() * (dense_log - log)).sum(-1).tolist()
        self.agreement += (best == dense.argmax(-1)).float().tolist()

    def to_dict(self) -> dict[str, float | int]:
        """Means; ``accuracy`` only where there are answers."""
        found: dict[str, float | int] = {
            "tokens": len(self.nats),
            "nats": float(np.mean(self.nats)),
            "kl_from_dense": float(np.mean(self.divergence)),
            "top1_agreement": float(np.mean(self.agreement)),
        }
        if self.right:
            found |= {"answers": len(self.right), "accuracy": float(np.mean(self.right))}
        return found


def planted(task: str, sample: tasks.Sample) -> Item:
    """An item of a training sample, whose weights say which tokens are answers."""
    answer = sample.weights == tasks.ANSWER_WEIGHT
    edges = np.flatnonzero(np.diff(np.r_[0, answer.astype(int), 0]))
    first = int(edges[0])
    spans = [slice(int(a) - first, int(b) - first) for a, b in edges.reshape(-1, 2)]
    ids = torch.from_numpy(sample.ids)
    last = spans[-1].stop
    return Item(task, ids[:first], ids[first : first + last], tuple(spans))


def items(tokenizer: Any, context: int, counts: dict[str, int]) -> Iterator[Item]:
    """Prompts of every task, none of which chose the model."""
    encode, bos = tasks.encoder(tokenizer), tasks.bos_id(tokenizer)
    corpus = np.asarray(encode(data.long_document()), dtype=np.int64)
    for number in range(counts["passkey"]):
        depth = (number + 0.5) / counts["passkey"]
        prompt, answer = tasks.passkey_document(tokenizer, context, depth, FIRST_SEED + number)
        digits = torch.tensor(encode(answer))
        yield Item("passkey", torch.tensor(prompt), digits, (slice(0, len(digits)),))
    rng = np.random.default_rng(FIRST_SEED)
    for _ in range(counts["keys"]):
        yield planted("keys", tasks.keys_sample(rng, encode, corpus, context, bos, keys=4))
    for _ in range(counts["variables"]):
        yield planted("variables", tasks.variables_sample(rng, encode, corpus, context, bos))
    for _ in range(counts["text"]):
        sample = tasks.text_sample(rng, corpus, context + TEXT_TOKENS, bos)
        ids = torch.from_numpy(sample.ids)
        yield Item("text", ids[:context], ids[context:])


def decode(model: Any, cache: Any, item: Item) -> Tensor:
    """Logits that predict each token of ``item.follows``, one step a token."""
    found = []
    for token in torch.cat([item.prompt[-1:], item.follows[:-1]]):
        out = model(token[None, None], past_key_values=cache, use_cache=True)
        found.append(out.logits[0, -1].float())
    return torch.stack(found)


def prefill(model: Any, item: Item) -> Any:
    """A cache that has read all of the prompt but its last token."""
    cache = DynamicCache(config=model.config)
    model(item.prompt[None, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def cost(patched: Any) -> dict[str, float | None]:
    """What the policy read, as a share of the dense reading, and the mass that it kept."""
    layers = patched.report().to_dict()["layers"]
    dense = sum(layer["dense_bytes"] or layer["kv_bytes"] for layer in layers)
    held = [layer for layer in layers if layer["mass_mean"] is not None]
    return {
        "kv_read_share": sum(layer["kv_bytes"] for layer in layers) / dense,
        "mass_mean": float(np.mean([layer["mass_mean"] for layer in held])) if held else None,
        "mass_min": min((layer["mass_min"] for layer in held), default=None),
    }


def run(options: argparse.Namespace, recorder: Recorder, console: Console) -> None:
    """Ask every item of every policy; what is left to do shows as a bar."""
    torch.set_num_threads(options.threads)
    model, tokenizer = load(HERE / "model")
    document = data.long_document()
    bytes_per_token = len(document.encode()) / len(tasks.encoder(tokenizer)(document))
    wanted = policies(model, options.budgets)
    patches = {DENSE: adaptive.patch(copy.deepcopy(model))}
    for name, chosen in wanted.items():
        patches[name] = adaptive.patch(copy.deepcopy(model), *chosen)
    scores: dict[str, dict[str, Score]] = {name: {} for name in patches}
    counts = {task: getattr(options, task) for task in ("passkey", "keys", "variables", "text")}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("", total=sum(counts.values()))
        for item in items(tokenizer, options.context, counts):
            progress.update(bar, description=item.task)
            cache = prefill(patches[DENSE].model, item)
            patches[DENSE].reset_stats()
            dense = decode(patches[DENSE].model, copy.deepcopy(cache), item)
            for name, patched in patches.items():
                logits = dense
                if name != DENSE:
                    logits = decode(patched.model, copy.deepcopy(cache), item)
                scores[name].setdefault(item.task, Score()).add(item, logits, dense)
            progress.advance(bar)
    for name, patched in patches.items():
        policy, _, budget = name.partition(" K=")
        results = {task: score.to_dict() for task, score in scores[name].items()}
        if "text" in results:
            results["text"]["bits_per_byte"] = results["text"]["nats"] / (
                math.log(2) * bytes_per_token
            )
        recorder.add(
            {
                "policy": policy,
                "budget": int(budget) if budget else None,
                "context": options.context,
                "policies": [str(p) for p in wanted.get(name, ())],
                **cost(patched),
                "tasks": results,
            }
        )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    add = parser.add_argument
    add("--context", type=int, default=8192, help="tokens of a prompt")
    add("--budgets", type=int, nargs="+", default=list(BUDGETS), help="keys per step and KV head")
    add("--passkey", type=int, default=100, help="prompts with one key")
    add("--keys", type=int, default=8, help="prompts with four named keys")
    add("--variables", type=int, default=8, help="prompts with a chain of variables")
    add("--text", type=int, default=8, help=f"texts, {TEXT_TOKENS} tokens each")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, help="result file")
    add("--chart", type=Path, help="PNG of quality over keys read to draw")
    return parser


def print_rows(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One line per policy and budget."""
    for row in rows:
        text = row["tasks"].get("text", {})
        shown = [f"{row['policy']:24}{row['budget'] or '':>6}  reads {row['kv_read_share']:6.1%}"]
        if row["mass_mean"] is not None:
            shown.append(f"mass {row['mass_mean']:.3f}")
        for task, result in row["tasks"].items():
            if "accuracy" in result:
                shown.append(f"{task} {result['accuracy']:.1%} of {result['answers']}")
        if text:
            shown.append(
                f"{text['bits_per_byte']:.3f} bits/byte, KL {text['kl_from_dense']:.4f}, "
                f"same token {text['top1_agreement']:.1%}"
            )
        console.print("  ".join(shown), highlight=False, soft_wrap=True)


def measure(
    kind: str,
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace, Recorder, Console], None],
    print_rows: Callable[[Console, Sequence[dict[str, Any]]], None],
) -> None:
    """Measure, print, write, and draw by ``bench.<kind>_chart``."""
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "chart")}
    recorder = Recorder(kind, options.json, settings)
    began = time.monotonic()
    with torch.inference_mode():
        run(options, recorder, Console())
    print_rows(Console(), recorder.document["rows"])
    recorder.document["seconds"] = round(time.monotonic() - began)
    recorder.save()
    if options.chart:  # matplotlib is needed for no number
        importlib.import_module(f"bench.{kind}_chart").draw(recorder.document, options.chart)


if __name__ == "__main__":
    measure("quality", arguments().parse_args(), run, print_rows)
