"""The steps of self-speculative decoding: a plain one, or drafts and their check."""

import copy

import torch
from torch import Tensor

from adaptive.layers.clock import clock_for
from adaptive.layers.depth import Skips
from adaptive.layers.draft_head import draft_head
from adaptive.layers.draft_length import Average, DraftLength
from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_rows import Rows
from adaptive.layers.speculation_log import SpeculationLog
from adaptive.layers.state import PatchRecord
from adaptive.policy import SelfSpeculative
from adaptive.policy.self_speculative import MAX_DRAFT


class Steps:
    """One call of `generate`: the prompt, then steps until every row is finished."""

    def __init__(self, passes: Passes, rows: Rows, log: SpeculationLog) -> None:
        """Know the model's passes, the rows, and where to count."""
        self.passes = passes
        self.rows = rows
        self.log = log
        self.clock = clock_for(rows.device)
        self.together = False

    def run(self, chunk: int | None) -> None:
        """Read the prompt, ``chunk`` tokens at a time, and decode."""
        rows, passes = self.rows, self.passes
        self.log.calls += 1
        turned_off = self.turned_off()
        logits = passes.prompt(rows.prompt, chunk)
        try:
            self.keep(rows.choose(logits, []))
            self.begin()
            while not rows.all_finished():
                self.step()
        except BaseException:
            passes.finish(self._kept_slots())  # Ctrl-C in a draft leaves no trace of it
            raise
        finally:
            self.log.turned_off += self.turned_off() - turned_off
        passes.finish(self._kept_slots())
        rows.end()

    def _kept_slots(self) -> int:
        """Slots of the tokens that rows have, as after plain decoding: the last was seen by none.

        Rows that end, or are interrupted, inside of what a check accepted have fewer tokens than
        slots.
        """
        rows, slots = self.rows, self.passes.slots
        if rows.batch > 1 and not self.together:
            return slots  # there are gaps, and slots are not places of tokens
        return min(slots, max(rows.longest() - 1, rows.prompt.shape[1]))

    def begin(self) -> None:
        """Look at what the cache turned out to be."""

    def fit(self) -> None:
        """Go by the number of rows that the batch has now."""

    def step(self) -> None:
        """Make at least one token per row."""
        raise NotImplementedError

    def turned_off(self) -> int:
        """How often drafting was given up, in all calls."""
        raise NotImplementedError

    def plain(self, seconds: Average) -> Tensor:
        """Make one token per row by a pass of the whole model; its logits."""
        start = self.clock()
        last = self.rows.last()
        logits = self.passes.plain(last)
        chosen = self.rows.choose(logits, [])
        self.passes.accept(torch.ones(len(last), dtype=torch.long, device=last.device), 1)
        self.keep(chosen)
        spent = self.clock() - start
        seconds.add(spent)
        self.log.plain_steps += 1
        self.log.plain_seconds += spent
        return logits

    def keep(self, chosen: list[list[int]]) -> None:
        """Append tokens to the rows, and count them."""
        self.log.tokens += self.rows.keep(chosen)


class DraftSteps(Steps):
    """Drafts by a part of the layers."""

    def __init__(
        self,
        policy: SelfSpeculative,
        passes: Passes,
        rows: Rows,
        record: PatchRecord,
        keeps_cache: bool,
    ) -> None:
        """Know the policy, what earlier calls learned, and whether the cache outlives this one."""
        assert record.speculation is not None  # the policy has made it
        super().__init__(passes, rows, record.speculation)
        self.policy = policy
        self.keeps_cache = keeps_cache
        self.learned = record.draft_sizes
        self.length: DraftLength = self.learned.setdefault(rows.batch, self.new_length(policy))
        self.length.begin()
        self._sized = rows.batch
        self._must = False
        skip = policy.given or ((), ())
        self.skips: Skips = (frozenset(skip[0]), frozenset(skip[1]))
        self.confidences: list[Tensor] = []
        self.head = draft_head(passes.model, policy.draft_vocabulary, record.head_copy)

    @staticmethod
    def new_length(policy: SelfSpeculative) -> DraftLength:
        """What decides how much to draft, before anything was learned."""
        return DraftLength(fixed=policy.draft, most=MAX_DRAFT)

    def turned_off(self) -> int:
        """How often drafting was given up, in all calls."""
        return self.length.turned_off

    def begin(self) -> None:
        """Decide whether rows go together.

        Rows that accept different numbers of drafts leave gaps in the cache, and every later pass
        has a mask for them. That pays for who asks for drafts, not for who leaves it to us; and
        windows count slots, so that there must be no gaps. Nor may a caller get a cache with gaps,
        who does not know where they are. Rows that come and go have a mask anyway, and their gaps
        are closed.
        """
        rows, left = self.rows, self.policy.draft is None and not self.rows.refilled
        self._must = rows.even or self.passes.windowed or self.keeps_cache or left
        self.fit()

    def fit(self) -> None:
        """As `Steps.fit`; what is known of other numbers of rows is where a new one begins."""
        rows = self.rows
        if rows.batch != self._sized:
            if rows.batch in self.learned:
                self.learned[rows.batch].begin()
            self.length = self.learned.setdefault(rows.batch, copy.deepcopy(self.length))
            self._sized = rows.batch
        self.together = rows.batch > 1 and self._must
        self.length.together = rows.batch if self.together else 1

    def step(self) -> None:
        """Draft, check and keep; or a plain step where drafts do not pay."""
        most = self.rows.room() - 1
        if not self.length.wants(0, 1.0, most):
            self.plain(self.length.plain)
            return
        ids, chances = self._draft(self.rows.last(), most)
        self._check(ids, chances)

    def _draft(self, last: Tensor, most: int) -> tuple[Tensor, list[Tensor]]:
        """Draft tokens; return ``[batch, 1 + drafts]`` and the distributions they came from.

        All but the last of those tokens have passed the layers of a draft.
        """
        rows, length = self.rows, self.length
        ids, drawn = [last], []
        reach = torch.ones(rows.batch)
        while True:
            start = self.clock()
            token, confidence, chances = self._draft_pass(ids[-1], ids[1:])
            expected = [length.accepts(c) for c in confidence.tolist()]
            seconds = self.clock() - start
            length.draft.add(seconds)
            self.log.draft_seconds += seconds
            ids.append(token)
            drawn.append((confidence, chances))
            reach = reach * torch.tensor(expected)
            alive = reach[rows.alive]
            average = float(alive.prod() if self.together else alive.mean())
            if not length.wants(len(drawn), average, most):
                break
        # A drawn token is always checked: to drop it for its confidence would favour others.
        if not rows.samples and not length.keeps(len(drawn), average):
            self.log.dropped += 1
            ids.pop()
            drawn.pop()
        self.confidences = [confidence for confidence, _ in drawn]
        return torch.cat(ids, 1), [chances for _, chances in drawn]

    def _draft_pass(self, ids: Tensor, before: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The draft after ``ids``, ``[batch, 1]``, as `Rows.draft`."""
        exit_layer, head = self.policy.exit_layer, self.head
        if exit_layer is None or head is None or not self.rows.searches:
            return self.rows.draft(self._draft_logits(ids), before)
        token, confidence = head.best(self.passes.hidden(ids, exit_layer)[:, -1])
        self.log.draft_head_bytes = head.held_bytes
        return token, confidence, confidence[:, None]

    def _draft_logits(self, ids: Tensor) -> Tensor:
        """What the layers of a draft give after ``ids``, ``[batch, 1, vocabulary]``."""
        passes, exit_layer, head = self.passes, self.policy.exit_layer, self.head
        if exit_layer is None:
            with passes.depth.skipping(self.skips):
                return passes.skipping(ids)
        if head is None or not head.reduced:
            return passes.shallow(ids, exit_layer)
        logits = head.logits(passes.hidden(ids, exit_layer)[:, -1])
        self.log.draft_head_bytes = head.held_bytes
        return logits

    def _check(self, ids: Tensor, chances: list[Tensor]) -> None:
        """Check the drafts and keep what was right."""
        rows, passes, length = self.rows, self.passes, self.length
        drafts = ids.shape[1] - 1
        start = begun = self.clock()
        if self.policy.exit_layer is None:
            logits = passes.whole(ids)
        else:
            if passes.behind(ids.shape[1]):
                passes.hidden(ids[:, -1:], self.policy.exit_layer)  # what follows is not asked
                begun = self.clock()
                length.closing.add(begun - start)
            logits = passes.deep(ids, self.policy.exit_layer)
        accepted, chosen = rows.verify(logits, ids[:, 1:], chances)
        length.verify.add(drafts + 1, self.clock() - begun)
        self.log.verify_seconds += self.clock() - start
        right = accepted
        if self.together:
            accepted = accepted.clamp(max=int(accepted[rows.alive_on(accepted.device)].min()))
            chosen = [row[:n] for row, n in zip(chosen, (accepted + 1).tolist(), strict=True)]
        kept = torch.where(rows.alive_on(accepted.device), accepted + 1, 1)
        passes.accept(kept, int(kept.max()))
        self._learn(right.tolist(), accepted.tolist(), drafts)
        self.keep(chosen)

    def _learn(self, right: list[int], accepted: list[int], drafts: int) -> None:
        """Count a check: drafts that were right, and those that were kept, of each row."""
        log, alive = self.log, self.rows.alive.tolist()
        log.steps += 1
        log.lengths[drafts] = log.lengths.get(drafts, 0) + 1
        for row, (first, kept) in enumerate(zip(right, accepted, strict=True)):
            if not alive[row]:
                continue
            log.drafted += drafts
            log.accepted += kept
            for i in range(min(first + 1, drafts)):
                self.length.learn(float(self.confidences[i][row]), i < first)
