"""Finds the modules that drafts leave out: draws candidates, models their scores, keeps the best.

After SWIFT (Xia et al. 2024, arXiv:2410.06916): a candidate is scored by its matchness, the share
of the latest tokens that the model makes without those modules; most candidates are drawn, some are
proposed by Bayesian optimisation. Three things differ. What is compared is not matchness but what
it is for, the expected tokens per second, for which a set's cost is known and its matchness is
modelled by a Gaussian process; so sets of different sizes can be compared. The process also says
which tried set is best: a score over few tokens is luck to a part, and its largest one more so. And
drafts that were checked count as further evidence on the set that made them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptive.layers.depth import Skips
from adaptive.layers.draft_length import GAIN
from adaptive.layers.gaussian_process import GaussianProcess
from adaptive.layers.speculation_log import SkipSearchLog

Rate = Callable[[float, float], float]
"""Expected speed over plain decoding, from matchness and the cost of a draft in plain passes."""

TIME_SHARE = 0.1
"""Of the time of decoding that a search takes at most."""

BAYES_EVERY = 2
"""Every so manieth candidate is proposed by the process; SWIFT's 25th is for hundreds of them."""

OPTIMISM = 1.0
"""Standard deviations that an upper confidence bound is above the mean."""

FIRST_DRAWS = 4
"""Candidates before the first one that the process proposes."""

POOL = 48
"""Sets that the process chooses from: so many drawn, so many neighbours of the best one."""

ENOUGH, ENOUGH_TOKENS = 0.95, 64
"""Matchness at which a set is good enough, and the tokens it must have been seen on."""

SWIFT_RATIO = 0.45
RATIOS = (0.15, 0.7)
"""Shares of the modules that candidates leave out, where none is given."""

PATIENCE, MOST_TRIALS = 40, 120
"""Candidates without a better one, and in all, after which the search ends."""

LEAST_COST = 0.05
"""Of a draft, in plain passes."""

GOOD, SETTLED, SPENT = "good enough", "nothing better found", "all candidates tried"
NONE_PAYS = "no set pays, so there are no drafts"

Chosen = frozenset[int]
"""Members of a set: places in `SkipSearch.modules`."""


@dataclass
class Trial:
    """What is known of a set: tokens that its drafts got right, of those that were compared."""

    right: float = 0.0
    seen: float = 0.0

    @property
    def matchness(self) -> float:
        """Share of right tokens."""
        return self.right / self.seen if self.seen else 0.0


@dataclass
class SkipSearch:
    """The state of one model's search; survives calls of `generate`.

    Attributes:
        attention: Layers whose attention may be left out.
        mlp: Layers whose MLP may.
        ratio: Share of these modules that a candidate leaves out; None: any that may pay.
        seed: Of the draws.
        bayes_every: Every so manieth candidate is proposed by the process; None: none is.
        trials: What is known, by set.
        tried: Candidates scored; a set that came twice counts twice.
        best: The tried set that promises most; None before the first.
        finished: Why the search is over; "" while it goes on.
        seconds: Time in the search.
        spent: Time of decoding, with the search.
        shares: Time of an attention and of an MLP, in plain passes.
        overhead: Time of a draft over what its set says.
        adopted: The set that a number of rows last drafted with, by that number.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    ratio: float | None = None
    seed: int = 0
    bayes_every: int | None = BAYES_EVERY
    trials: dict[Chosen, Trial] = field(default_factory=dict)
    tried: int = 0
    best: Chosen | None = None
    finished: str = ""
    seconds: float = 0.0
    spent: float = 0.0
    shares: tuple[float, float] = (0.0, 0.0)
    overhead: float = 1.0
    adopted: dict[int, Chosen] = field(default_factory=dict)
    _since_better: int = 0
    _speedup: float = 0.0
    _expected: float = 0.0
    _fitted: GaussianProcess | None = None

    def __post_init__(self) -> None:
        self.modules = [*((0, i) for i in self.attention), *((1, i) for i in self.mlp)]
        self._rng = random.Random(self.seed)

    @property
    def due(self) -> bool:
        """Whether there is time for a candidate."""
        return not self.finished and self.seconds <= TIME_SHARE * self.spent

    @property
    def drafts(self) -> bool:
        """Whether there is a set to draft with."""
        return self.best is not None and self.finished != NONE_PAYS

    @property
    def matchness(self) -> float:
        """Expected matchness of the best set."""
        return self._expected

    def sets(self, chosen: Chosen | None) -> Skips:
        """The layers whose attention, and whose MLP, a candidate leaves out."""
        taken = [self.modules[place] for place in chosen or ()]
        return (
            frozenset(layer for kind, layer in taken if kind == 0),
            frozenset(layer for kind, layer in taken if kind == 1),
        )

    def cost(self, chosen: Chosen) -> float:
        """Time of a draft, in plain passes."""
        attention, mlp = self.sets(chosen)
        saved = len(attention) * self.shares[0] + len(mlp) * self.shares[1]
        return max(1.0 - saved, LEAST_COST) * self.overhead

    def propose(self, rate: Rate) -> Chosen:
        """The next candidate; one that seems good enough comes again until that is sure."""
        if self.tried == 0:
            return self._every_second()
        if self.best is not None and self._seems_enough(self.best):
            return self.best
        if self.bayes_every and self.tried >= FIRST_DRAWS and self.tried % self.bayes_every == 0:
            return self._bayesian(rate)
        return self._draw()

    def score(self, chosen: Chosen, right: int, seen: int, rate: Rate) -> None:
        """Take in how many of the latest tokens a candidate got right."""
        self.tried += 1
        self._since_better += 1
        self.confirm(chosen, right, seen)
        if not self.trials:
            return
        before = self.best
        self._choose(rate)
        if self.best != before:
            self._since_better = 0
        self._stop()

    def confirm(self, chosen: Chosen | None, right: int, seen: int) -> None:
        """Take in what drafts that a set made, or would have made, were worth."""
        if seen and chosen is not None:
            trial = self.trials.setdefault(chosen, Trial())
            trial.right += right
            trial.seen += seen

    def log(self) -> SkipSearchLog:
        """What the report says."""
        attention, mlp = self.sets(self.best)
        return SkipSearchLog(
            skip=None if self.best is None else (tuple(sorted(attention)), tuple(sorted(mlp))),
            matchness=None if self.best is None else round(self.matchness, 4),
            speedup=None if self.best is None else round(self._speedup, 4),
            finished=self.finished,
        )

    def _choose(self, rate: Rate) -> None:
        """Find the tried set that promises most."""
        known = list(self.trials)
        self._fitted = self._process()
        means, _ = self._fitted.at(self._rows(known))
        values = [
            rate(min(max(mean, 0.0), 1.0), self.cost(chosen))
            for mean, chosen in zip(means, known, strict=True)
        ]
        self._speedup, place = max((value, -place) for place, value in enumerate(values))
        self.best, self._expected = known[-place], min(max(means[-place], 0.0), 1.0)

    def _stop(self) -> None:
        assert self.best is not None
        sure = self.trials[self.best].seen >= ENOUGH_TOKENS
        if sure and self._seems_enough(self.best):
            self.finished = GOOD
        elif self._since_better >= PATIENCE:
            self.finished = SETTLED
        elif self.tried >= MOST_TRIALS:
            self.finished = SPENT
        if self.finished and self._speedup <= GAIN:
            self.finished = NONE_PAYS

    def _seems_enough(self, chosen: Chosen) -> bool:
        """Whether the best set is right so often, and so large, that a search can end with it."""
        ratio = SWIFT_RATIO if self.ratio is None else self.ratio
        return self.matchness >= ENOUGH and len(chosen) >= self._count(ratio)

    def _count(self, ratio: float) -> int:
        return min(max(round(ratio * len(self.modules)), 1), len(self.modules))

    def _every_second(self) -> Chosen:
        """Where SWIFT begins: both modules of every second layer, or as many as the ratio says."""
        order = sorted(range(len(self.modules)), key=lambda m: (self.modules[m][1] % 2 == 0, m))
        ratio = SWIFT_RATIO if self.ratio is None else self.ratio
        return frozenset(order[: self._count(ratio)])

    def _draw(self) -> Chosen:
        ratio = self._rng.uniform(*RATIOS) if self.ratio is None else self.ratio
        return frozenset(self._rng.sample(range(len(self.modules)), self._count(ratio)))

    def _near(self, chosen: Chosen) -> Chosen:
        """A set that differs in one or two members, as large where the ratio is given."""
        outside = [m for m in range(len(self.modules)) if m not in chosen]
        same = self.ratio is not None
        move = "both" if same else self._rng.choice(("add", "drop", "both"))
        gone, come = set(), set()
        if outside and move != "drop":
            come = {self._rng.choice(outside)}
        if move != "add" and (come if same else len(chosen) > 1):
            gone = {self._rng.choice(sorted(chosen))}
        return frozenset(chosen - gone | come)

    def _bayesian(self, rate: Rate) -> Chosen:
        """The untried set of a pool with the largest upper confidence bound of its speed."""
        assert self.best is not None
        pool = [self._draw() for _ in range(POOL)]
        pool += [self._near(self.best) for _ in range(POOL)]
        pool = [chosen for chosen in dict.fromkeys(pool) if chosen not in self.trials]
        if not pool:
            return self._draw()
        assert self._fitted is not None
        means, deviations = self._fitted.at(self._rows(pool))
        bounds = [
            rate(min(max(mean + OPTIMISM * deviation, 0.0), 1.0), self.cost(chosen))
            for mean, deviation, chosen in zip(means, deviations, pool, strict=True)
        ]
        return pool[bounds.index(max(bounds))]

    def _process(self) -> GaussianProcess:
        """What the trials say; a share of n tokens has the variance of n tosses of a coin."""
        trials = list(self.trials.values())
        right = torch.tensor([trial.right for trial in trials], dtype=torch.float64)
        seen = torch.tensor([trial.seen for trial in trials], dtype=torch.float64)
        mean = float((right.sum() + 1) / (seen.sum() + 2))
        return GaussianProcess(
            self._rows(list(self.trials)), right / seen, mean * (1 - mean) / seen
        )

    def _rows(self, chosen: list[Chosen]) -> Tensor:
        rows = torch.zeros(len(chosen), len(self.modules), dtype=torch.float64)
        for row, members in enumerate(chosen):
            rows[row, sorted(members)] = 1.0
        return rows
