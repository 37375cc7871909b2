"""Steps that look for the modules to skip while they decode: between two steps, a candidate."""

from torch import Tensor

from adaptive.layers.draft_length import Average
from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_rows import Rows
from adaptive.layers.hf_steps import DraftSteps
from adaptive.layers.skip_search import SkipSearch
from adaptive.layers.state import PatchRecord
from adaptive.policy import SelfSpeculative

WINDOW = 16
"""Latest tokens that a candidate is scored on: as many rows as the kernels of a check take."""

LEAST = 8
"""Tokens that must have been made before the first candidate."""


class SearchSteps(DraftSteps):
    """Drafts by the best set of modules known so far; see `skip_search`."""

    def __init__(
        self,
        policy: SelfSpeculative,
        passes: Passes,
        rows: Rows,
        record: PatchRecord,
        keeps_cache: bool,
    ) -> None:
        """Go on with what earlier calls found."""
        super().__init__(policy, passes, rows, record, keeps_cache)
        self.search: SkipSearch = record.skip_search
        self.first = 0
        self._shares = (Average(), Average())
        self._adopted = False

    def begin(self) -> None:
        """Note where the tokens begin that are made here."""
        super().begin()
        self.first = self.passes.slots
        self.passes.recall(0 if self.search.finished else WINDOW)
        self.log.search = self.search.log()

    def step(self) -> None:
        """Score a candidate if there is time for it; then make tokens."""
        search, start = self.search, self.clock()
        known = self.length.plain.value is not None
        if search.due and known and self.passes.slots - self.first >= LEAST:
            self._score()
        if search.drafts and known and not self._adopted:
            self._adopt()
        if search.drafts and self._adopted:
            super().step()
        else:
            self.plain(self.length.plain)
        if not search.finished:
            search.spent += self.clock() - start

    def plain(self, seconds: Average) -> Tensor:
        """Make one token per row, and measure what attention and MLPs take."""
        search, layers = self.search, self.passes.depth.layers
        if search.finished:
            return super().plain(seconds)
        before = self.log.plain_seconds
        with self.passes.depth.timing(self.clock) as spent:
            logits = super().plain(seconds)
        whole = max(self.log.plain_seconds - before, 1e-9)
        for average, part in zip(self._shares, spent, strict=True):
            average.add(part / whole / layers)
        search.shares = (self._shares[0].value or 0.0, self._shares[1].value or 0.0)
        return logits

    def _rate(self, matchness: float, cost: float) -> float:
        """Expected speed over plain decoding."""
        plain = self.length.plain.value or 0.0
        return self.length.promise(matchness, cost * plain) * plain

    def _score(self) -> None:
        """Have the model make the latest tokens again, without a candidate's modules."""
        start, search, passes = self.clock(), self.search, self.passes
        self._calibrate()
        before, chosen = search.best, search.propose(self._rate)
        tokens = min(WINDOW, passes.slots - self.first)
        held = passes.held(self.first)
        places = (held.long().cumsum(1) - 1)[:, -tokens:].clamp(min=0) + self.first
        with passes.depth.skipping(search.sets(chosen)):
            made = passes.again(self.rows.tokens_at(places)).argmax(-1)
        alive = self.rows.alive_on(held.device)[:, None]
        compared = held[:, -tokens:] & alive
        right = compared & (made == self.rows.tokens_at(places + 1))
        search.score(chosen, int(right.sum()), int(compared.sum()), self._rate)
        if search.best != before:
            self._adopted = False
        spent = self.clock() - start
        search.seconds += spent
        self.log.candidates += 1
        self.log.search_seconds += spent
        self.log.search = search.log()
        if search.finished:
            passes.recall(0)

    def _calibrate(self) -> None:
        """Learn what a draft takes beyond what its set says."""
        search, plain, draft = self.search, self.length.plain.value, self.length.draft
        if self._adopted and plain and draft.value and draft.weight > 2 and search.best:  # noqa: PLR2004
            search.overhead *= draft.value / (search.cost(search.best) * plain)

    def _adopt(self) -> None:
        """Draft with the best set from now on."""
        search, plain = self.search, self.length.plain.value
        assert search.best is not None
        assert plain is not None
        self.skips = search.sets(search.best)
        if search.adopted.get(self.rows.batch) != search.best:
            self.length.adopt(search.matchness, search.cost(search.best) * plain)
            search.adopted[self.rows.batch] = search.best
        self._adopted = True

    def _learn(self, right: list[int], accepted: list[int], drafts: int) -> None:
        """Count a check, as evidence on the set, too.

        Where the number of drafts follows their confidence only the first of a step counts: the
        others were made because they were likely right.
        """
        super()._learn(right, accepted, drafts)
        alive = self.rows.alive.tolist()
        most = drafts if self.policy.draft is not None else min(drafts, 1)
        found = [min(n, most) for n, on in zip(right, alive, strict=True) if on]
        checked = sum(min(n + 1, most) for n in found)
        self.search.confirm(self.search.best, sum(found), checked)
