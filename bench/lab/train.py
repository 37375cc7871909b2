"""Train the lab model from the standard library's text: resumable, one recipe, one command."""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.lab import measure, tasks
from bench.lab import model as lab
from bench.lab.data import prepare
from bench.lab.export import export
from bench.lab.muon import Muon

HERE = Path(__file__).parent
EXAMPLES = """examples:
  python -m bench.lab.train --work /tmp/lab            train, or go on after a stop
  python -m bench.lab.train --work /tmp/lab --export   write bench/lab/model from the checkpoint

The checkpoint in --work holds weights, optimizer state and the step, which seeds all randomness.
A stopped run (Ctrl-C saves first) goes on where it was; the recipe is read anew each time, so
later phases may be edited in between.
"""


class Batches:
    """Draws training batches: a mixture of text and synthetic tasks with skip-wise positions."""

    def __init__(self, tokenizer: Any, corpus: np.ndarray, vocab: int) -> None:
        """Take the tokenizer, the encoded training text and the size of the vocabulary."""
        self.encode = tasks.encoder(tokenizer)
        self.bos = tasks.bos_id(tokenizer)
        self.corpus = corpus
        self.vocab = vocab
        self.digits = np.asarray(self.encode("0123456789"))

    def sample(self, rng: np.random.Generator, phase: dict[str, Any]) -> tasks.Sample:
        """Return one sequence of ``context + 1`` tokens from the phase's mixture."""
        kinds = list(phase["mixture"])
        kind = rng.choice(kinds, p=[phase["mixture"][k] for k in kinds])
        length = phase["context"] + 1
        if kind == "text":
            return tasks.text_sample(rng, self.corpus, length, self.bos)
        if kind == "copy":
            longest = int(rng.choice(phase["copy_lengths"]))
            return tasks.copy_sample(rng, length, self.bos, self.alphabet(rng, phase), longest)
        args = (rng, self.encode, self.corpus, length, self.bos)
        if kind == "variables":
            return tasks.variables_sample(*args, hops=int(rng.integers(1, 4)))
        keys = 1 if rng.random() < 0.4 else int(rng.integers(2, phase["max_keys"] + 1))
        return tasks.keys_sample(*args, keys=keys, confusable=phase.get("confusable", 0.0))

    def alphabet(self, rng: np.random.Generator, phase: dict[str, Any]) -> np.ndarray:
        """Return the tokens to copy: all, or in a share of the cases a few digits or tokens."""
        tokens = np.arange(3, self.vocab)
        if rng.random() >= phase.get("few_symbols", 0.0):
            return tokens
        source = self.digits if rng.random() < 0.7 else tokens
        return rng.choice(source, int(rng.integers(3, 8)), replace=False)

    def positions(self, rng: np.random.Generator, phase: dict[str, Any]) -> np.ndarray:
        """Return position ids for one sequence, with jumps in the phase's share of the cases."""
        context = phase["context"]
        skip = rng.random() < phase["skip_share"]
        span = int(rng.integers(context, phase["span"] + 1)) if skip else context
        chunks = int(rng.integers(2, 6))
        if skip and "least_jump" in phase:
            span, chunks = phase["span"], min(chunks, 3)
        return tasks.skip_positions(rng, context, span, chunks, phase.get("least_jump", 0.0))

    def draw(self, rng: np.random.Generator, phase: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return ids, positions, targets and target weights of one batch."""
        samples = [self.sample(rng, phase) for _ in range(phase["batch"])]
        positions = [self.positions(rng, phase) for _ in samples]
        ids = torch.from_numpy(np.stack([s.ids for s in samples]))
        weights = torch.from_numpy(np.stack([s.weights for s in samples]))
        return ids[:, :-1], torch.from_numpy(np.stack(positions)), ids[:, 1:], weights[:, 1:]


def make_optimizers(model: torch.nn.Module, settings: dict[str, Any]) -> list[Any]:
    """Return Muon for the layers' matrices and AdamW for embedding, head and norms.

    Each parameter group carries ``scale``, its share of the phase's learning rate.
    """
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "layers" in n]
    scales = settings["adam_lr_scales"]
    groups = [
        {"params": [p for n, p in named if "embed" in n], "scale": scales["embedding"]},
        {"params": [p for n, p in named if "lm_head" in n], "scale": scales["head"]},
        {"params": [p for n, p in named if p.dim() == 1], "scale": scales["norms"]},
    ]
    muon = Muon(
        [{"params": matrices, "scale": 1.0}],
        momentum=settings["muon_momentum"],
        weight_decay=settings["muon_weight_decay"],
    )
    adam = torch.optim.AdamW(
        groups, lr=1.0, betas=tuple(settings["adam_betas"]), weight_decay=0.0, fused=True
    )
    return [muon, adam]


def train_step(
    model: Any, batch: tuple[Tensor, ...], exits: dict[int, float], keep: Tensor, layer_fn: Any
) -> tuple[float, float]:
    """Run forward and backward; return the last layer's loss and the total loss."""
    ids, positions, targets, weights = batch
    states = lab.forward_hidden(model, ids, positions, keep, layer_fn)
    picked = (weights.reshape(-1) > 0).nonzero().squeeze(1)
    flat_targets, flat_weights = targets.reshape(-1)[picked], weights.reshape(-1)[picked]
    total, last = torch.zeros(()), 0.0
    for index, weight in exits.items():
        hidden = states[index].reshape(-1, states[index].shape[-1])[picked]
        loss = lab.head_loss(model, hidden, flat_targets, flat_weights)
        total = total + weight * loss
        last = float(loss.detach())
    total.backward()
    return last, float(total.detach())


def locate(phases: list[dict[str, Any]], step: int) -> tuple[dict[str, Any], float] | None:
    """Return the phase a global step falls into and the progress within it."""
    for phase in phases:
        if step < phase["steps"]:
            return phase, step / phase["steps"]
        step -= phase["steps"]
    return None


class Trainer:
    """One training run: the model, its optimizers, and how far they have come."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build everything from the recipe and take up the checkpoint, if there is one."""
        self.args = args
        self.recipe = json.loads(args.recipe.read_text())
        self.tokenizer, self.corpus = prepare(args.work)
        self.phases: list[dict[str, Any]] = self.recipe["phases"]
        self.total_steps = sum(phase["steps"] for phase in self.phases)
        torch.manual_seed(self.recipe["seed"])
        self.model = lab.build_model(self.recipe["architecture"])
        self.optimizers = make_optimizers(self.model, self.recipe["optimizer"])
        vocab = self.recipe["architecture"]["vocab_size"]
        self.batches = Batches(self.tokenizer, self.corpus["train"], vocab)
        forward = lab.layer_forward
        self.layer_fn = torch.compile(forward, dynamic=False) if args.compile else forward
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.checkpoint = args.work / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        print(f"resumed at step {self.step} of {self.total_steps}", flush=True)

    def save(self) -> None:
        """Write the checkpoint; a stop at any moment leaves the old or the new one whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def update(self, phase: dict[str, Any], within: float) -> dict[str, Any]:
        """Take one optimizer step and return its log record.

        The step's number seeds all of its randomness, so a resumed run draws the same batches.
        """
        skip, settings = self.recipe["layerskip"], self.recipe["optimizer"]
        layers = self.recipe["architecture"]["layers"]
        rng = np.random.default_rng([self.recipe["seed"], self.step])
        start, end = phase["lr"]
        lr = (start + (end - start) * within) * min(1.0, (self.step + 1) / settings["warmup_steps"])
        for group in (group for o in self.optimizers for group in o.param_groups):
            group["lr"] = lr * group["scale"]
        rates = np.asarray(lab.layer_dropout(layers, skip["p_max"], self.step / self.total_steps))
        kept = rng.random((layers, phase["batch"])) >= rates[:, None]
        active = [1 + self.step % (layers - 2), layers - 1]
        exits = lab.exit_weights(layers, skip["exit_scale"], active)
        batch = self.batches.draw(rng, phase)
        keep = torch.from_numpy(kept.astype(np.float32))
        last, total = train_step(self.model, batch, exits, keep, self.layer_fn)
        if not math.isfinite(total):
            raise RuntimeError(f"the loss is {total} at step {self.step}: lower the learning rate")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings["clip_norm"])
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + batch[0].numel()
        return {
            "step": self.step, "phase": phase["name"], "tokens": self.tokens, "lr": round(lr, 6),
            "loss": round(last, 4), "total": round(total, 4), "norm": round(float(norm), 3),
        }  # fmt: skip

    def run(self) -> None:
        """Train until the phases are through, or until interrupted; log, evaluate and save."""
        args = self.args
        stopping: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, frame: stopping.append(received))
        last_eval = last_save = clock = time.time()
        with (args.work / "log.jsonl").open("a") as log:
            while not stopping and (found := locate(self.phases, self.step)) is not None:
                record = self.update(*found)
                now = time.time()
                self.seconds, clock = self.seconds + now - clock, now
                record["seconds"] = round(self.seconds, 1)
                finished = self.step == self.total_steps
                if now - last_eval > args.eval_minutes * 60 or finished:
                    heldout = self.corpus["heldout"]
                    record |= measure.quick(self.model, self.tokenizer, heldout, args.eval_lengths)
                    last_eval = time.time()
                if self.step % args.log_every == 0 or "passkey" in record:
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    print(json.dumps(record), flush=True)
                if time.time() - last_save > args.save_minutes * 60:
                    self.save()
                    last_save = time.time()
        self.save()
        print(f"stopped at step {self.step} of {self.total_steps}", flush=True)


def main() -> None:
    """Read the command line and train or export."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lab.train", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for checkpoint, caches and the log")
    add("--recipe", type=Path, default=HERE / "recipe.json", help="hyper-parameters and phases")
    add("--out", type=Path, default=HERE / "model", help="where --export writes the model")
    add("--export", action="store_true", help="write the model folder and stop")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--compile", action="store_true", help="compile the layer (needs a C++ compiler)")
    add("--log-every", type=int, default=20, metavar="N", help="log each N-th step (default 20)")
    add("--eval-minutes", type=float, default=5.0, help="minutes between quick evaluations")
    add("--eval-lengths", type=int, nargs="+", default=[512, 2048, 8192], metavar="TOKENS",
        help="prompt lengths of the quick passkey evaluation")  # fmt: skip
    add("--save-minutes", type=float, default=3.0, help="minutes between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.export:
        export(args.work, args.recipe, args.out)
    else:
        Trainer(args).run()


if __name__ == "__main__":
    main()
