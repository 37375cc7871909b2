"""What early exit costs in quality and saves in time: python -m bench.early_exit [--json OUT].

The lab model, exits after layers 3 to 7. Quality is that of kv="deferred", whose cache is the whole
model's: one full pass gives the logits of every exit for every token, and the criterion says which
of them a token would have been chosen from. Held-out text gives bits per byte; a pass key at 2048
tokens counts as found if each of its tokens would have been right. Time is that of `generate`,
rounds of the exact path and of each policy in turn. A few minutes on two slow cores.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import adaptive
from adaptive.layers.exit_criterion import Judge
from adaptive.layers.exit_head import Outlook
from adaptive.policy import EarlyExit
from bench.lab import data, tasks
from bench.lab.evaluate import HERE, load
from bench.record import Recorder

EXITS = (3, 4, 5, 6, 7)
FIRST_SEED = 2000  # beyond those that chose the model
SWEEP: dict[str, tuple[float | None, ...]] = {
    "confidence": (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97),
    "margin": (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.95),
    "entropy": (4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5),
    "cosine": (0.8, 0.85, 0.9, 0.93, 0.95, 0.97),
    "agreement": (None,),
}
TIMED = (("confidence", 0.0), ("confidence", 0.3), ("confidence", 0.7), ("confidence", 1.1))


def policy(criterion: str, threshold: float | None, **fields: Any) -> EarlyExit:
    """The policy of one point of the sweep."""
    return EarlyExit(layers=EXITS, criterion=criterion, threshold=threshold, **fields)


def all_exits(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each exit and of the whole model, ``[tokens, vocabulary]``, and hidden states."""
    out = model(ids[None], output_hidden_states=True, use_cache=False)
    states = out.hidden_states  # the last has been through the norm
    early = [model.lm_head(model.model.norm(states[ran]))[0].float() for ran in EXITS]
    return [*early, out.logits[0].float()], [state[0] for state in states]


def chosen(point: EarlyExit, logits: list[Tensor], states: list[Tensor]) -> Tensor:
    """Which exit each token leaves at: its number in EXITS, or their count for the whole model."""
    judge = Judge(point)
    where = torch.full((len(logits[0]),), len(EXITS))
    for number, ran in reversed(list(enumerate(EXITS))):
        if point.criterion != "agreement":
            where[judge.leaves(Outlook(logits[number]), states[ran - 1], states[ran])] = number
    if point.criterion == "agreement":
        for number, ran in enumerate(EXITS):
            leaves = judge.leaves(Outlook(logits[number]), states[ran - 1], states[ran])
            where[leaves & (where == len(EXITS))] = number
    return where


class Score:
    """What one point of the sweep did."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.left = torch.zeros(len(EXITS) + 1, dtype=torch.long)
        self.nats: list[float] = []
        self.same: list[float] = []
        self.found: list[bool] = []

    def text(self, where: Tensor, logits: list[Tensor], follows: Tensor) -> None:
        """Count held-out text: what is left out of the probability of the true tokens."""
        self.left += torch.bincount(where, minlength=len(EXITS) + 1)
        taken = torch.stack(logits)[where, torch.arange(len(where))]
        self.nats += (-taken.log_softmax(-1).gather(1, follows[:, None])[:, 0]).tolist()
        self.same += (taken.argmax(-1) == logits[-1].argmax(-1)).float().tolist()

    def passkey(self, where: Tensor, logits: list[Tensor], answer: Tensor) -> None:
        """Count a pass key; its first token is the prompt's, which runs in full."""
        where = where.clone()
        where[0] = len(EXITS)
        taken = torch.stack(logits)[where, torch.arange(len(where))]
        self.found.append(bool((taken.argmax(-1) == answer).all()))

    def to_dict(self, bytes_per_token: float) -> dict[str, Any]:
        """Fields of a row."""
        depths = torch.tensor([*EXITS, 8])
        share = self.left / self.left.sum()
        nats = float(np.mean(self.nats))
        return {
            "exits": {str(int(d)): int(n) for d, n in zip(depths, self.left, strict=True)},
            "mean_depth": float((share * depths).sum()),
            "tasks": {
                "text": {
                    "tokens": len(self.nats),
                    "bits_per_byte": nats / (math.log(2) * bytes_per_token),
                    "top1_agreement": float(np.mean(self.same)),
                },
                "passkey": {"answers": len(self.found), "accuracy": float(np.mean(self.found))},
            },
        }


def quality(model: Any, tokenizer: Any, options: argparse.Namespace, recorder: Recorder) -> None:
    """Sweep every criterion over the same texts and pass keys."""
    encode, bos = tasks.encoder(tokenizer), tasks.bos_id(tokenizer)
    document = data.long_document()
    corpus = np.asarray(encode(document), dtype=np.int64)
    bytes_per_token = len(document.encode()) / len(corpus)
    points = [(name, value) for name, values in SWEEP.items() for value in values]
    points.append(("confidence", 1.1))
    scores = {point: Score() for point in points}
    rng = np.random.default_rng(FIRST_SEED)
    for _ in range(options.texts):
        sample = tasks.text_sample(rng, corpus, options.tokens, bos)
        ids = torch.from_numpy(sample.ids)
        logits, states = all_exits(model, ids)
        for point, score in scores.items():
            where = chosen(policy(*point), [each[:-1] for each in logits], _cut(states, 0, -1))
            score.text(where, [each[:-1] for each in logits], ids[1:])
    for number in range(options.passkeys):
        depth = (number + 0.5) / options.passkeys
        prompt, answer = tasks.passkey_document(tokenizer, 2048, depth, FIRST_SEED + number)
        digits = torch.tensor(encode(answer))
        logits, states = all_exits(model, torch.cat([torch.tensor(prompt), digits]))
        cut = len(prompt) - 1
        asked = [each[cut:-1] for each in logits]
        for point, score in scores.items():
            where = chosen(policy(*point), asked, _cut(states, cut, -1))
            score.passkey(where, asked, digits)
    for (criterion, threshold), score in scores.items():
        row = {"criterion": criterion, "threshold": threshold, **score.to_dict(bytes_per_token)}
        recorder.add(row)


def _cut(states: list[Tensor], begin: int, end: int) -> list[Tensor]:
    return [state[begin:end] for state in states]


def timing(model: Any, tokenizer: Any, options: argparse.Namespace, recorder: Recorder) -> None:
    """Tokens per second of `generate`, as a ratio to the exact path in the same round.

    One thread is timed by its own CPU time, which other work on the machine does not touch.
    """
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    corpus = tasks.encoder(tokenizer)(data.long_document())
    prompt = torch.tensor(corpus[: options.prompt])[None]
    fields = {"max_new_tokens": options.new, "do_sample": False, "eos_token_id": None}
    fields["pad_token_id"] = 0
    wanted = [(c, t, kv) for c, t in TIMED for kv in ("deferred", "copy", "project")]
    seconds: dict[Any, list[float]] = {point: [] for point in [None, *wanted]}
    logs: dict[Any, Any] = {}
    for _ in range(options.rounds):
        for point in seconds:
            policies = [policy(*point[:2], kv=point[2], audit=None)] if point else []
            with adaptive.patch(model, *policies) as patched:
                start = clock()
                model.generate(prompt, **fields)
                seconds[point].append(clock() - start)
                logs[point] = patched.report().exits
    for point in wanted:
        ratios = [a / b for a, b in zip(seconds[None], seconds[point], strict=True)]
        log, saved = logs[point], 1 - 1 / median(ratios)
        row = {
            "criterion": point[0],
            "threshold": point[1],
            "kv": point[2],
            "mean_depth": log.mean_depth,
            "skipped": log.skipped,
            "speedup": median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
            "saved_of_skipped": saved / log.skipped if log.skipped else None,
            "exact_tokens_per_s": options.new / median(seconds[None]),
        }
        recorder.add(row, "timing")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.early_exit", description=__doc__)
    add = parser.add_argument
    add("--texts", type=int, default=16, help="held-out texts")
    add("--tokens", type=int, default=512, help="tokens of a text")
    add("--passkeys", type=int, default=33, help="prompts with a pass key")
    add("--prompt", type=int, default=64, help="tokens before the timed ones")
    add("--new", type=int, default=256, help="tokens timed")
    add("--rounds", type=int, default=5, help="of timing")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, help="result file")
    add("--chart", type=Path, help="PNG of quality over mean depth to draw")
    return parser


def main() -> int:
    """Measure, print, write."""
    options = arguments().parse_args()
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "chart")}
    recorder = Recorder("early_exit", options.json, {**settings, "exits": list(EXITS)})
    torch.set_num_threads(options.threads)
    model, tokenizer = load(HERE / "model")
    with torch.inference_mode():
        quality(model, tokenizer, options, recorder)
    timing(model, tokenizer, options, recorder)
    for section in ("rows", "timing"):
        for row in recorder.document[section]:
            Console().print(row, highlight=False, soft_wrap=True)
    if options.chart:
        from bench.early_exit_chart import draw

        draw(recorder.document, options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
