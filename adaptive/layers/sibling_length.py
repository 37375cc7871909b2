"""How many tokens to draft, and which alternatives to them: those that pay for their row.

A draft's head ranks the whole vocabulary, so the tokens after the first cost no pass. Checked
beside the draft, as its siblings in a tree, each costs a row of the check. Where a draft is wrong,
the token that the model makes is often the draft's second or third: how often it is that of each
rank is counted at every wrong draft, whether or not that sibling was checked. A sibling of rank r
at some depth is then right with the chance that all drafts before are right, times that this one
is wrong, times that share of r. It is checked if that is more than the tokens that its row's time
brings otherwise: the marginal value rule of `draft_length`, for rows. What was expected of the
siblings of a check is compared with what came, since those chances are estimates that add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import NamedTuple

from adaptive.layers.draft_length import DECAY, DraftLength, Line

PRIOR = (0.3, 0.15, 0.1, 0.06, 0.05, 0.04, 0.03)
"""Share of wrong drafts whose second, third ... token is right, before any was seen."""

PRIOR_WEIGHT = 8.0
WIDTH = 1 + len(PRIOR)
"""Tokens that are ranked after each token of a draft: the draft and its siblings."""

PROBE_EVERY = 32
"""Every how many checks one has no siblings: two sizes are needed to tell what a row costs."""


EXPECTED = 2.0
"""Right siblings that were expected, and came, before any was checked."""

KEPT = 0.98
"""How much they count after one more check with siblings."""


class Sibling(NamedTuple):
    """A token besides the draft at some depth.

    Attributes:
        depth: From 0, the first draft's.
        rank: Among what the draft's head finds likely, from 1; 0 is the draft.
    """

    depth: int
    rank: int


@dataclass
class SiblingLength(DraftLength):
    """Decides how many drafts to make, and with which siblings to check them.

    Attributes:
        branches: Seconds of the pass that readies siblings and the last draft for the check, by
            their number; nothing where there is no such pass.
        misses: Wrong drafts by the rank of the right token, from 1.
        failed: Wrong drafts.
        expected: Right siblings, by their chances.
        found: Those that there were.
    """

    branches: Line = field(default_factory=Line)
    misses: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT * p for p in PRIOR])
    failed: float = PRIOR_WEIGHT
    expected: float = EXPECTED
    found: float = EXPECTED
    _hopes: float = 0.0
    _checks: int = 0
    _price: float = 0.0
    _known: float | None = None

    def wants(self, made: int, reach: float, most: int) -> bool:
        """As `DraftLength.wants`; looks once per step at what is known."""
        if made == 0:
            self._known = None
        return super().wants(made, reach, most)

    def keeps(self, made: int, reach: float) -> bool:
        """Always: `choose` decides on the last draft, together with its siblings."""
        return True

    def learn_rank(self, rank: int | None) -> None:
        """Take in which rank's token was right where the draft was wrong; None: of none."""
        self.failed = self.failed * DECAY + 1
        self.misses = [count * DECAY for count in self.misses]
        if rank is not None:
            self.misses[rank - 1] += 1

    def learn_siblings(self, right: float) -> None:
        """Take in how many siblings were right, of a row on average, in the last check with some.

        Where rows go together one may be right and yet bring nothing; then nothing is learned.
        """
        if self._hopes and self.together == 1:
            self.expected = self.expected * KEPT + self._hopes
            self.found = self.found * KEPT + right

    def choose(self, accepts: Sequence[Sequence[float]]) -> tuple[bool, list[Sibling]]:
        """Which tokens to check besides the drafts that have passed the layers of a draft.

        Those are all but the last.

        Args:
            accepts: The chance that each draft is right where those before it are, by rows.

        Returns:
            Whether to check the last draft, and the siblings to check, by depth and rank.
        """
        drafts = len(accepts)
        self._checks += 1
        probe = self._checks % PROBE_EVERY == 1
        offers, last = self._offers(accepts)
        must = self.fixed is not None or drafts == 1
        rate = self._rate() if self.verify.weight else 0.0
        price = rate * self._row_seconds()
        offers = [] if probe else offers[: self.most - drafts + (0 if must or last > price else 1)]
        chosen = [(gain, sibling) for gain, sibling in offers if gain > price]
        self._hopes = 0.0
        worth = sum(gain - price for gain, _ in chosen) + max(last - price, 0.0)
        if not must and worth <= rate * self._pass_seconds():
            return False, []
        self._hopes = sum(gain for gain, _ in chosen) / self._trust
        return must or last > price, sorted(sibling for _, sibling in chosen)

    def rate(self, acceptance: float, draft_s: float, lengths: Sequence[int]) -> float:
        """As `DraftLength.rate`, with the siblings that pay at the rate that was last found.

        Their price is from the last time and the rate from now, so that both find each other.
        """
        reach, tokens, rows, best = 1.0, 1.0, 1.0, 0.0
        known = self.verify.weight > 0
        for drafts in range(1, max(lengths, default=0) + 1):
            gain, more = self._level(reach, acceptance, self.most + 1 - rows)
            tokens, rows = tokens + gain, rows + more
            reach *= acceptance**self.together
            if drafts in lengths:
                check = self.verify.at(rows) if known else self.plain.value or 0.0
                ready = self._pass_seconds(rows - drafts)
                best = max(best, tokens / (drafts * draft_s + ready + check))
            if rows > self.most:
                break
        self._price = best * self._row_seconds()
        return best

    def _rate(self) -> float:
        if self._known is None:
            self._known = super()._rate()
        return self._known

    def _best(self, most: int, acceptance: float | None = None) -> float:
        if self.draft.value is None or self.verify.weight == 0:
            return 0.0
        most = min(most, self.most)
        lengths = range(1, most + 1) if self.fixed is None else [min(self.fixed, most)]
        share = self.acceptance if acceptance is None else acceptance
        return self.rate(share, self.draft.value, lengths)

    def _another(self, reach: float) -> tuple[float, float]:
        gain, rows = self._level(reach, self.acceptance, self.most)
        return gain, rows * self._row_seconds()

    def _level(self, reach: float, acceptance: float, room: float) -> tuple[float, float]:
        """Tokens that a draft and its siblings bring, and their rows, ``room`` at most."""
        held = gain = reach * acceptance**self.together
        rows, share = 1.0, acceptance
        for count in self.misses:
            share += (1 - acceptance) * count / self.failed
            more = reach * share**self.together
            brings = self._trust * (more - held)
            if brings <= self._price or rows + 1 > room:
                break
            gain, held, rows = gain + brings, more, rows + 1
        return gain, rows

    def _offers(
        self, accepts: Sequence[Sequence[float]]
    ) -> tuple[list[tuple[float, Sibling]], float]:
        """Expected tokens of each sibling, best first; and of the last draft."""
        join = prod if self.together > 1 else _mean
        reach = [1.0] * len(accepts[0])
        shares = list(accumulate(count / self.failed for count in self.misses))
        offers = []
        for depth, row_accepts in enumerate(accepts):
            pairs = list(zip(reach, row_accepts, strict=True))
            held = last = join([r * a for r, a in pairs])
            for rank, share in enumerate(shares, 1):
                more = join([r * (a + (1 - a) * share) for r, a in pairs])
                offers.append((self._trust * (more - held), Sibling(depth, rank)))
                held = more
            reach = [r * a for r, a in pairs]
        return sorted(offers, key=lambda offer: -offer[0]), last

    @property
    def _trust(self) -> float:
        """Right siblings of each that was expected."""
        return max(self.found / self.expected, 1e-3)

    def _row_seconds(self) -> float:
        """What one more sibling costs."""
        return self.verify.slope + self.branches.slope

    def _pass_seconds(self, rows: float = 0.0) -> float:
        """What the pass costs that readies so many tokens; without its rows, to begin with."""
        return self.branches.at(rows) if self.branches.weight else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
