"""How many tokens to draft: until the next one would be slower than the average.

Speculation is a renewal process: a step costs the time of its drafts and of one verification, and
yields the drafted tokens that were right and one more. The rate of tokens is highest if drafting
goes on exactly while the next draft's expected tokens per second are above that rate (the marginal
value rule; SpecDec++ 2024, arXiv:2405.19715, has the threshold form of it for one cost ratio). Both
sides are measured while decoding: how often a draft of a given confidence was right, and how long
passes take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log, sqrt

BINS = 8
PRIOR_TRIALS = 4.0
"""How many trials count what the other confidences say of one."""

FIRST_RIGHT, FIRST_CHECKED = 2.0, 3.0
"""Drafts that were right, of so many, before any was checked; and the sum of their confidences."""

RENEWED, TRIED = 8.0, 2
"""How many checked drafts of earlier calls count in a new one, whose text may be another, and how
many it begins by checking whatever they say: of one row in two steps, of many rows in one."""

HOPE = 1.0
"""By how many standard errors the acceptance is thought to be better than it looks."""

ADOPTED_TRIALS = 8.0
"""How many trials the expected acceptance of other drafts counts."""

DECAY = 0.995
"""How much a trial of acceptance counts after one more."""

SMOOTHING = 0.1
OUTLIER = 5.0
"""A time that many times the average is the machine's, not the model's, unless it keeps coming."""

MOST_OUTLIERS = 2
"""Outliers in a row that are left out: the next one says that passes take longer now."""

OFF_STEPS, MOST_OFF_STEPS = 16, 256
SETTLED = 2.0
"""Values after which an average is trusted enough to call another value an outlier."""

PLAIN_FIRST, PLAIN_EVERY = 2, 64
"""Steps without drafts before the first with some, and every how many steps one is timed anew.

One time is not enough: the first pass of a process is slow, and drafts that are compared with it
would seem to pay for ever.
"""

FIRST_DRAFTS = 2
"""Drafts of the first step, which tells what passes cost."""

GAIN = 1.02
"""Speculation must promise to be that much faster than one token per pass."""


@dataclass
class Average:
    """An exponential average that starts at the first value and is not moved by outliers."""

    value: float | None = None
    weight: float = 0.0
    outliers: int = 0

    def add(self, value: float) -> None:
        """Take in a value."""
        if self.value is None:
            self.value, self.weight = value, 1.0
            return
        if self.weight > SETTLED and value > OUTLIER * self.value:
            self.outliers += 1
            if self.outliers <= MOST_OUTLIERS:
                return
            self.weight = 0.0
        self.outliers = 0
        self.weight += 1.0
        share = max(SMOOTHING, 1.0 / self.weight)
        self.value += share * (value - self.value)


@dataclass
class Line:
    """Seconds of a pass over a number of rows: a straight line through what was measured."""

    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_squared: float = 0.0
    product: float = 0.0
    outliers: int = 0

    def add(self, rows: int, seconds: float) -> None:
        """Take in the time of one pass."""
        if self.weight > SETTLED and seconds > OUTLIER * self.at(rows):
            self.outliers += 1
            if self.outliers <= MOST_OUTLIERS:
                return
            self.weight = self.rows = self.seconds = self.rows_squared = self.product = 0.0
        self.outliers = 0
        for name, value in (
            ("weight", 1.0),
            ("rows", rows),
            ("seconds", seconds),
            ("rows_squared", rows * rows),
            ("product", rows * seconds),
        ):
            setattr(self, name, getattr(self, name) * (1 - SMOOTHING) + value)

    @property
    def slope(self) -> float:
        """Seconds per further row; 0 while only one number of rows was seen, and never below."""
        spread = self.weight * self.rows_squared - self.rows**2
        if spread <= 1e-6 * self.weight * self.rows_squared:
            return 0.0
        return max((self.weight * self.product - self.rows * self.seconds) / spread, 0.0)

    def at(self, rows: float) -> float:
        """Expected seconds of a pass over ``rows`` rows."""
        mean = self.seconds / self.weight
        return max(mean + self.slope * (rows - self.rows / self.weight), 0.25 * mean)


@dataclass
class DraftLength:
    """Decides, before each draft, whether to make it.

    Attributes:
        fixed: Drafts in every step; None: as many as pay.
        most: The most drafts of a step.
        together: Rows that go as far as the slowest of them: a draft counts if it is right in all.
        draft: Seconds of one drafted token.
        closing: Seconds of the pass that readies the last draft for verification.
        verify: Seconds of a verification.
        plain: Seconds of a step without drafts.
        hits: Right drafts, by confidence.
        trials: Drafts that were checked, by confidence.
        off: Steps still to be made without drafts, because those do not pay.
        turned_off: How often that was decided.
    """

    fixed: int | None
    most: int
    together: int = 1
    draft: Average = field(default_factory=Average)
    closing: Average = field(default_factory=Average)
    verify: Line = field(default_factory=Line)
    plain: Average = field(default_factory=Average)
    hits: list[float] = field(default_factory=lambda: [0.0] * BINS)
    trials: list[float] = field(default_factory=lambda: [0.0] * BINS)
    off: int = 0
    turned_off: int = 0
    _pause: int = OFF_STEPS
    _since: int = 0
    _untried: int = 0
    _right: float = FIRST_RIGHT
    _checked: float = FIRST_CHECKED
    _confident: float = FIRST_RIGHT

    def begin(self) -> None:
        """Keep what was learned for another call, whose text may be easier, and try anew."""
        self.off, self._pause, self._untried = 0, OFF_STEPS, TRIED
        share = min(1.0, RENEWED / self._checked)
        for name in ("_right", "_checked", "_confident"):
            setattr(self, name, getattr(self, name) * share)

    def accepts(self, confidence: float) -> float:
        """Expected share of right drafts among those with this confidence.

        Others complete what few drafts of this confidence tell: where those are right more often
        than they seem, this is likelier. Else drafts too unlikely to be checked would stay so.
        """
        b = _bin(confidence)
        shares = (self.acceptance, self._confident / self._checked)
        seen, said = (log(min(max(share, 0.01), 0.99)) for share in shares)
        expected = float(((b + 0.5) / BINS) ** (seen / said))
        return (self.hits[b] + PRIOR_TRIALS * expected) / (self.trials[b] + PRIOR_TRIALS)

    @property
    def acceptance(self) -> float:
        """Share of right drafts among those that were checked of late."""
        return self._right / self._checked

    @property
    def hoped(self) -> float:
        """The acceptance that there may be: few checks leave much to hope for."""
        share = self.acceptance
        return min(share + HOPE * sqrt(share * (1 - share) / self._checked), 1.0)

    def learn(self, confidence: float, right: bool) -> None:
        """Take in whether a checked draft was right."""
        b = _bin(confidence)
        self._untried -= 1
        self.hits[b] = self.hits[b] * DECAY + right
        self.trials[b] = self.trials[b] * DECAY + 1
        self._right = self._right * DECAY + right
        self._checked = self._checked * DECAY + 1
        self._confident = self._confident * DECAY + (b + 0.5) / BINS

    def adopt(self, acceptance: float, draft_s: float) -> None:
        """Begin anew with other drafts, of which that acceptance and time are expected."""
        self.hits = [ADOPTED_TRIALS * acceptance] * BINS
        self.trials = [ADOPTED_TRIALS] * BINS
        self._right, self._checked = ADOPTED_TRIALS * acceptance, ADOPTED_TRIALS
        self._confident = ADOPTED_TRIALS * acceptance
        self.draft = Average()
        self.draft.add(draft_s)
        self.off, self._pause = 0, OFF_STEPS

    def wants(self, made: int, reach: float, most: int) -> bool:
        """Whether to make one more draft.

        Args:
            made: Drafts made in this step.
            reach: Expected share of rows in which all of them are right; with rows that go
                together, the chance that they are in all of those.
            most: The most drafts that this step may have.
        """
        if made >= min(most, self.most):
            return False
        if self.fixed is not None:
            return made < self.fixed
        if made == 0:
            return self._begins(most)
        if self.draft.value is None or self.verify.weight == 0:
            return made < FIRST_DRAFTS
        gain, seconds = self._another(reach)
        return gain > self._rate() * (self.draft.value + seconds)

    def _another(self, reach: float) -> tuple[float, float]:
        """Expected tokens of one more draft, and the seconds that checking it takes."""
        return reach * self.acceptance**self.together, self.verify.slope

    def keeps(self, made: int, reach: float) -> bool:
        """Whether to verify the last of ``made`` drafts, which needs a pass of its own."""
        if self.fixed is not None or made == 1 or self.verify.weight == 0:
            return True
        closing = self.closing.value or 0.0
        return reach > self._rate() * (closing + self.verify.slope)

    def _begins(self, most: int) -> bool:
        """Whether this step speculates at all."""
        self._since += 1
        if self.plain.value is None or self.plain.weight < PLAIN_FIRST or self._since > PLAIN_EVERY:
            self._since = 0
            return False
        if self.off:
            self.off -= 1
            return self.off == 0  # then look again whether it pays by now
        if self._untried > 0 or self.draft.value is None or self.verify.weight == 0:
            return True
        hope = self._best(most, self.hoped)
        if hope * self.plain.value > GAIN:
            self._pause = OFF_STEPS
            return True
        self.off = self._pause
        self._pause = min(2 * self._pause, MOST_OFF_STEPS)
        self.turned_off += 1
        return False

    def _rate(self) -> float:
        """Tokens per second of the best that is known."""
        plain = 1.0 / self.plain.value if self.plain.value else 0.0
        return max(plain, self._best(self.most))

    def _best(self, most: int, acceptance: float | None = None) -> float:
        """Expected tokens per second with the best constant number of drafts."""
        if self.draft.value is None or self.verify.weight == 0:
            return 0.0
        share = self.acceptance if acceptance is None else acceptance
        return self.rate(share, self.draft.value, range(1, min(most, self.most) + 1))

    def promise(self, acceptance: float, draft_s: float) -> float:
        """Expected tokens per second with drafts of that acceptance and time."""
        lengths = range(1, self.most + 1) if self.fixed is None else [self.fixed]
        return self.rate(acceptance, draft_s, lengths)

    def rate(self, acceptance: float, draft_s: float, lengths: Sequence[int]) -> float:
        """Expected tokens per second with the best of some numbers of drafts.

        Until a check was measured it is thought to take as long as a step without drafts.
        """
        share, tokens, best = 1.0, 1.0, 0.0
        known = self.verify.weight > 0
        for drafts in range(1, max(lengths, default=0) + 1):
            share *= acceptance**self.together
            tokens += share
            if drafts in lengths:
                check = self.verify.at(drafts + 1) if known else self.plain.value or 0.0
                seconds = drafts * draft_s + (self.closing.value or 0.0) + check
                best = max(best, tokens / seconds)
        return best


def _bin(confidence: float) -> int:
    """Where a confidence is counted; with the least of all, if logits of NaN left none."""
    return min(int(confidence * BINS), BINS - 1) if confidence > 0 else 0
