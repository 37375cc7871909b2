"""Train the models of the zoo, and vanilla ones to compare with, on equal text."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from adaptive.zoo import (
    BlockTransformer,
    BlockTransformerConfig,
    RecursiveTransformer,
    RecursiveTransformerConfig,
    VanillaTransformer,
    VanillaTransformerConfig,
)
from adaptive.zoo.model import ZooModel
from bench.lab.data import encode_corpus, heldout_texts, training_texts
from bench.lab.muon import Muon
from bench.lab.tokenizer import EOS, decode_bytes

HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "lab" / "model" / "tokenizer.json"
SIZES = {"vocab_size": 1024, "width": 128, "heads": 4}
LAYERS = {
    "vanilla": (6,),
    "vanilla-4": (4,),
    "block": (3, 3),
    "block-deep": (5, 5),
    "expert": (1, 2, 1),
    "token": (1, 2, 1),
}
"""By model; of a Block Transformer those of the block decoder and of the token decoder. ``block``
has the parameters of ``vanilla``; ``block-deep`` takes about its time to train. Of a recursive one,
by its router, those before the block, in it, and behind it: it has the parameters of ``vanilla-4``
and, when a token runs the block twice, the work of ``vanilla``."""
RECURSIONS = 3
CONTEXT, BATCH = 512, 4
LR, WARMUP_STEPS, CLIP_NORM = 3e-3, 40, 1.0
EVAL_WINDOWS, EVAL_SEED = 48, 7
SEED = 20
EXAMPLES = """examples:
  python -m bench.zoo.train --work /tmp/zoo --model block       train, or go on after a stop
  python -m bench.zoo.train --work /tmp/zoo --model vanilla     the same text in the same order
  python -m bench.zoo.train --work /tmp/zoo --model expert      recursive; compare --group recursive
  python -m bench.zoo.compare --work /tmp/zoo                   table, JSON and picture
"""


def build(name: str) -> ZooModel:
    """A fresh model."""
    torch.manual_seed(SEED)
    if name.startswith("vanilla"):
        return VanillaTransformer(VanillaTransformerConfig(**SIZES, layers=LAYERS[name][0]))
    if name in ("expert", "token"):
        first, shared, last = LAYERS[name]
        return RecursiveTransformer(
            RecursiveTransformerConfig(
                **SIZES,
                first_layers=first,
                block_layers=shared,
                last_layers=last,
                recursions=RECURSIONS,
                router=name,
            )
        )
    blocks, tokens = LAYERS[name]
    sizes = BlockTransformerConfig(**SIZES, block_layers=blocks, token_layers=tokens)
    return BlockTransformer(sizes)


def corpus(work: Path) -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """The lab model's tokenizer and the encoded splits, cached in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    cache = work / "corpus.npz"
    if not cache.exists():
        eos = tokenizer.token_to_id(EOS)
        splits = {"train": training_texts(), "heldout": heldout_texts()}
        arrays = {name: encode_corpus(tokenizer, texts, eos) for name, texts in splits.items()}
        partial = work / f"corpus.{time.time_ns()}.npz"
        np.savez(partial, **arrays)
        partial.replace(cache)
    return tokenizer, dict(np.load(cache))


def windows(ids: np.ndarray, count: int, rng: np.random.Generator) -> Tensor:
    """Random pieces of the text, ``[count, CONTEXT + 1]``."""
    starts = rng.integers(0, len(ids) - CONTEXT - 1, count)
    return torch.from_numpy(np.stack([ids[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))


def make_optimizers(model: ZooModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; ``scale`` is of the learning rate.

    Of the rest, head and prefix take less, as in the recipe of the lab model.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers." in n]
    heads = [p for n, p in model.named_parameters() if n.startswith(("head", "prefix"))]
    taken = {id(p) for p in matrices + heads}
    others = [p for p in model.parameters() if id(p) not in taken]
    adam = [{"params": heads, "scale": 0.3}, {"params": others, "scale": 0.5}]
    return [
        Muon([{"params": matrices, "scale": 1.0}], momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(adam, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def bits_per_byte(model: ZooModel, tokenizer: Tokenizer, ids: np.ndarray) -> float:
    """Of held-out text, in the same pieces for every model."""
    text = windows(ids, EVAL_WINDOWS, np.random.default_rng(EVAL_SEED))
    training = model.training
    model.eval()  # a recursive model then chooses by threshold: no token looks at later ones
    nats = sum(float(model.loss(part)) * part[:, 1:].numel() for part in text.split(8))
    model.train(training)
    count = sum(len(decode_bytes(tokenizer, row)) for row in text[:, 1:].tolist())
    return nats / math.log(2) / count


@torch.no_grad()
def mean_layers(model: ZooModel, name: str, ids: np.ndarray) -> float:
    """Layers that a token of held-out text passes, chosen as in decoding."""
    if not isinstance(model, RecursiveTransformer):
        return float(sum(LAYERS[name]))
    text = windows(ids, EVAL_WINDOWS, np.random.default_rng(EVAL_SEED))
    depths = [model.depths(part[:, :-1], select="threshold").flatten() for part in text.split(8)]
    first, shared, last = LAYERS[name]
    return first + shared * float(torch.cat(depths).float().mean()) + last


class Training:
    """One run: a model, its optimizers, and how far they have come."""

    def __init__(self, name: str, work: Path, tokens: int) -> None:
        """Build everything, and take up the checkpoint, if there is one."""
        self.name, self.work = name, work
        self.steps = tokens // (CONTEXT * BATCH)
        self.tokenizer, self.corpus = corpus(work)
        self.model = build(name)
        self.optimizers = make_optimizers(self.model)
        self.step, self.seconds = 0, 0.0
        self.checkpoint = work / f"{name}.pt"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint; a stop at any moment leaves the old or the new one whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def update(self) -> float:
        """Take one step; its number seeds what it draws, so that both models read the same."""
        rng = np.random.default_rng([SEED, self.step])
        ids = windows(self.corpus["train"], BATCH, rng)
        options = {}
        if isinstance(self.model, BlockTransformer):
            # Prompts begin at any place of a block, so training does, too.
            options["padding"] = int(rng.integers(self.model.block_length))
        loss = self.model.loss(ids, **options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        left = 1 - self.step / self.steps
        lr = LR * min(1.0, (self.step + 1) / WARMUP_STEPS) * min(1.0, left / 0.6)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def run(self, eval_every: int, save_every: int) -> None:
        """Train to the end; log and save on the way."""
        print(f"{self.name}: {self.model.report()}, step {self.step} of {self.steps}", flush=True)
        with (self.work / f"{self.name}.jsonl").open("a") as log:
            while self.step < self.steps:
                began = time.thread_time()
                loss = self.update()
                self.seconds += time.thread_time() - began
                record: dict[str, Any] = {"step": self.step, "loss": round(loss, 4)}
                record["tokens"] = self.step * BATCH * CONTEXT
                record["seconds"] = round(self.seconds, 1)
                if self.step % eval_every == 0 or self.step == self.steps:
                    heldout = self.corpus["heldout"]
                    found = bits_per_byte(self.model, self.tokenizer, heldout)
                    record["bits_per_byte"] = round(found, 4)
                    layers = mean_layers(self.model, self.name, heldout)
                    record["mean_layers"] = round(layers, 3)
                    print(json.dumps(record), flush=True)
                log.write(json.dumps(record) + "\n")
                log.flush()
                if self.step % save_every == 0 or self.step == self.steps:
                    self.save()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.zoo.train", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for checkpoints, caches and logs")
    add("--model", choices=sorted(LAYERS), required=True)
    add("--tokens", type=int, default=3_000_000, help="to train on (default %(default)s)")
    add("--eval-every", type=int, default=50, metavar="STEPS")
    add("--save-every", type=int, default=50, metavar="STEPS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Training(options.model, options.work, options.tokens).run(
        options.eval_every, options.save_every
    )


if __name__ == "__main__":
    main()
