"""Measures what the cost model of drafts promises: python -m bench.forced_drafts [--json OUT].

A Llama-3.2-1B-shaped model with random weights drafts with 4 of its 16 layers. How many drafts a
check accepts is forced, spread evenly as a share of right drafts would spread it, so that few
checks have that share. The model of `DraftLength.rate` is given the share and times from other
runs; what it promises is compared with the time that drafts and checks took. The same with
siblings, of which that of each rank is right at a given share of the wrong drafts. CPU time on one
thread.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

import adaptive
from adaptive.layers import hf_rows
from adaptive.layers.draft_length import DraftLength
from adaptive.layers.sibling_length import PRIOR, SiblingLength
from bench.llama import build
from bench.record import Recorder

EXIT, DRAFTS, SHARES = 4, (1, 2, 4, 8), (0.0, 0.25, 0.5, 0.75, 1.0)
TREE_DRAFTS, TREE_SHARES = (1, 2, 4), (0.25, 0.5, 0.75)
MOST, PAD, PROMPT = 15, 2, 8
STEPS = (5**0.5 - 1) / 2, 2**0.5 - 1
"""Multiples of these, without their whole part, are spread evenly, and independently."""


@dataclass
class KnownShare(DraftLength):
    """Knows how many drafts are right, and learns times alone."""

    share: float = 0.5

    @property
    def acceptance(self) -> float:
        """The share."""
        return self.share

    def accepts(self, confidence: float) -> float:
        """The share, whatever the confidence."""
        return self.share

    def learn(self, confidence: float, right: bool) -> None:
        """Leave it."""


@dataclass
class KnownShares(KnownShare, SiblingLength):
    """Knows the shares of siblings, too."""

    def learn_rank(self, rank: int | None) -> None:
        """Leave them."""

    def learn_siblings(self, right: float) -> None:
        """Leave them."""


@contextmanager
def forced(share: float) -> Iterator[None]:
    """Accept that share of drafts inside the block, and siblings at their shares of the others."""
    checks = 0

    def toss(drafts: int) -> tuple[int, int]:
        """Right drafts, and the rank of the right sibling, counted from 0, if one is wrong."""
        nonlocal checks
        checks += 1
        first, second = ((checks * step) % 1.0 for step in STEPS)
        right = drafts if share == 1 else 0
        if 0 < share < 1:
            right = min(int(math.log(max(first, 1e-9)) / math.log(share)), drafts)
        rank, left = 0, second
        while rank < len(PRIOR) and left >= PRIOR[rank]:
            left -= PRIOR[rank]
            rank += 1
        return right, rank

    def greedy(drafted: Tensor, choices: Tensor) -> tuple[Tensor, list[list[int]]]:
        right, _ = toss(drafted.shape[1])
        tokens = [*drafted[0, :right].tolist(), int(choices[0, right])]
        return torch.tensor([right]), [tokens]

    def tree(
        drafted: Tensor, choices: Tensor, parents: Tensor, lengths: Tensor
    ) -> tuple[list[list[int]], list[list[int]]]:
        before = parents[0].tolist()
        chain = sum(parent == node - 1 for node, parent in enumerate(before))
        right, rank = toss(chain)
        path = list(range(right))
        siblings = [n for n in range(chain, len(before)) if before[n] == right - 1]
        path += siblings[rank : rank + 1] if right < chain else []
        node = path[-1] + 1 if path else 0
        return [path], [[*drafted[0, path].tolist(), int(choices[0, node])]]

    stock = hf_rows.accept_greedy, hf_rows.accept_tree
    setattr(hf_rows, "accept_greedy", greedy)  # noqa: B010
    setattr(hf_rows, "accept_tree", tree)  # noqa: B010
    try:
        yield
    finally:
        setattr(hf_rows, "accept_greedy", stock[0])  # noqa: B010
        setattr(hf_rows, "accept_tree", stock[1])  # noqa: B010


class Enough(StoppingCriteria):
    """Ends a call after so many checks or plain steps."""

    def __init__(self, record: Any, steps: int) -> None:
        """Know where they are counted."""
        self.record, self.steps = record, steps

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Whether there were so many."""
        log = self.record.speculation
        done = log.steps + log.plain_steps >= self.steps
        return torch.full((len(input_ids),), done)


class Runs:
    """A patched model that shares the weights of another."""

    def __init__(self, model: Any, tree: bool) -> None:
        """Patch it; ``tree``: with siblings."""
        self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self.model.generation_config.eos_token_id = None
        policy = adaptive.SelfSpeculative(exit_layer=EXIT, draft=1, tree=tree)
        self.patched = adaptive.patch(self.model, policy)
        self.tree = tree
        known = KnownShares if tree else KnownShare
        self.length: Any = known(fixed=1, most=MOST)
        self.patched._record.draft_sizes[1] = self.length

    def run(self, share: float, draft: int, checks: int) -> Any:
        """Make so many checks of that many drafts, none: plain steps; the log."""
        self.length.share, self.length.fixed = share, draft
        self.length.most = MOST if draft else 0
        self.patched.reset_stats()
        ids = torch.arange(3, 3 + PROMPT)[None]
        with forced(share):
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=500,
                do_sample=False,
                pad_token_id=PAD,
                stopping_criteria=[Enough(self.patched._record, checks)],
            )
        return self.patched.report().speculation

    def calibrate(self, lengths: tuple[int, ...], checks: int) -> Any:
        """Learn what passes cost; a copy of what was learned."""
        self.run(0.5, 0, checks)
        for draft in lengths:
            self.run(0.5, draft, checks)
        return copy.deepcopy(self.length)


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """One row for each share, number of drafts and form."""
    model = build("llama-3.2-1b", torch.bfloat16)
    for tree in (False, True):
        runs = Runs(model, tree)
        costs = runs.calibrate(TREE_DRAFTS if tree else DRAFTS, 3)
        for share in TREE_SHARES if tree else SHARES:
            log = runs.run(share, 0, options.checks)
            plain = log.plain_seconds / log.plain_steps
            for draft in TREE_DRAFTS if tree else DRAFTS:
                log = runs.run(share, draft, options.checks)
                seconds = log.draft_seconds + log.verify_seconds
                made = (log.steps + log.accepted) / log.steps
                promise = copy.deepcopy(costs)
                promise.share, promise.fixed, promise.most = share, draft, MOST
                for _ in range(3):  # the price of a row and the rate find each other
                    promised = promise.rate(share, promise.draft.value, [draft])
                row = {
                    "accepted": share,
                    "draft": draft,
                    "siblings": tree,
                    "nodes": round(log.drafted / log.steps, 2),
                    "tokens_per_check": round(made, 3),
                    "measured": round(made * log.steps / seconds * plain, 3),
                    "promised": round(promised * costs.plain.value, 3),
                    "draft_ms": round(1e3 * log.draft_seconds / (log.steps * draft), 1),
                    "verify_ms": round(1e3 * log.verify_seconds / log.steps, 1),
                    "plain_ms": round(1e3 * plain, 1),
                    "checks": log.steps,
                }
                recorder.add(row)
                print(row, flush=True)
        runs.patched.unpatch()


def main() -> int:
    """Measure, print, write; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.forced_drafts", description=__doc__)
    add = parser.add_argument
    add("--checks", type=int, default=4, help="checks of each row")
    add("--json", type=Path, help="result file, written after every row")
    add("--chart", type=Path, help="PNG of promised and measured speeds to draw")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"checks": options.checks, "threads": 1, "exit_layer": EXIT, "rank_shares": PRIOR}
    recorder = Recorder("forced_drafts", options.json, settings)
    try:
        measure(options, recorder)
    except (RuntimeError, ValueError, MemoryError) as error:
        recorder.fail("shape", error)
        print(error, file=sys.stderr)
    recorder.save()
    if options.chart:
        from bench.forced_drafts_chart import draw

        draw(recorder.document, options.chart)
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
