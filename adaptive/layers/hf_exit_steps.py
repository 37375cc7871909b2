"""The steps of decoding with early exits: each makes a token per row and may leave at any exit."""

from abc import ABC, abstractmethod
from time import perf_counter

import torch
from torch import Tensor

from adaptive.layers.exit_criterion import Judge
from adaptive.layers.exit_head import Outlook
from adaptive.layers.exit_log import ExitLog
from adaptive.layers.hf_exit_passes import AT_ONCE, ExitPasses
from adaptive.layers.hf_row_passes import Left, RowPasses
from adaptive.layers.hf_rows import Rows
from adaptive.layers.state import PatchRecord
from adaptive.policy import EarlyExit
from adaptive.policy.early_exit import COPY, DEFERRED

WINDOW_BACKLOG = 4 * AT_ONCE
"""Tokens after which all rows catch up where layers have windows: until then those drop nothing."""


class ExitSteps(ABC):
    """One call of `generate`."""

    passes: ExitPasses | RowPasses

    def __init__(self, policy: EarlyExit, record: PatchRecord, rows: Rows, log: ExitLog) -> None:
        """Know what to do, for which rows, and where to count."""
        self.policy = policy
        self.rows = rows
        self.log = log
        layers = range(log.layers)
        self.sources: dict[int, dict[int, int]] = {}
        if policy.kv == COPY:
            for left in policy.layers:
                later = {i: policy.source(record.plan, i, left) for i in layers[left:]}
                self.sources[left] = later

    def run(self, chunk: int | None, keeps_cache: bool) -> None:
        """Read the prompt, then step until every row is finished."""
        rows, passes, log = self.rows, self.passes, self.log
        log.begin_call(rows.batch)
        logits = passes.prompt(rows.prompt, chunk)
        start = perf_counter()
        try:
            if passes.head is not None:
                passes.head.summarises = rows.searches  # nobody else needs logits
            log.tokens += rows.keep(rows.choose(logits, []))
            while not rows.all_finished():
                log.steps += 1
                self.step()
            if keeps_cache:
                passes.catch_up()
        except BaseException:
            passes.abandon()  # Ctrl-C leaves no layer ahead of another
            raise
        finally:
            log.seconds += perf_counter() - start
        passes.finish(passes.slots)
        rows.end()

    @abstractmethod
    def step(self) -> None:
        """Make a token per row."""

    def align(self) -> None:
        """Let every layer hold every token, so that rows may come and go."""
        self.passes.catch_up()

    def is_audited(self) -> bool:
        """Whether the exit of this step is one of those that are audited."""
        self.log.exit_steps += 1
        return self.policy.audit is not None and self.log.exit_steps % self.policy.audit == 0

    def compare(self, early: Tensor, whole: Outlook | None, rows: Tensor | None = None) -> None:
        """Count where exits and the whole model have the same best token, in some rows."""
        assert whole is not None  # a token just left, so some layers had not seen it
        best = whole.best if rows is None else whole.best[rows]
        same = early == best
        self.log.audited += len(same)
        self.log.agreed += int(same.sum())


class TogetherSteps(ExitSteps):
    """The batch leaves where each unfinished row meets the criterion."""

    passes: ExitPasses

    def __init__(
        self,
        policy: EarlyExit,
        record: PatchRecord,
        passes: ExitPasses,
        rows: Rows,
        log: ExitLog,
    ) -> None:
        """As `ExitSteps`, with the passes to make."""
        super().__init__(policy, record, rows, log)
        self.passes = passes

    def step(self) -> None:
        """Make a token per row, all after as many layers."""
        rows, passes, log = self.rows, self.passes, self.log
        ids, judge = rows.last(), Judge(self.policy)
        whole = passes.ends[-1]
        for ran in passes.ends:
            begin = passes.ends[passes.ends.index(ran) - 1]
            said = passes.first(ids) if ran == passes.ends[0] else passes.onward(begin)
            if ran == whole or self._all_leave(judge, said):
                break
        if rows.searches:
            chosen = said.best[:, None].tolist()
        else:
            chosen = rows.choose(said.logits[:, None], [])
        log.count_exits(ran, rows.alive.nonzero().flatten().tolist())
        if ran < whole:
            self._leave(ran, ids, said)
        log.tokens += rows.keep(chosen)

    def _all_leave(self, judge: Judge, said: Outlook) -> bool:
        """Whether each unfinished row meets the criterion."""
        leaves = judge.leaves(said, *self.passes.moved)
        return bool((leaves | ~self.rows.alive_on(leaves.device)).all())

    def _leave(self, ran: int, ids: Tensor, said: Outlook) -> None:
        """Give the later layers what they get of tokens that left after ``ran`` layers."""
        passes, alive = self.passes, self.rows.alive_on(ids.device)
        audited = self.is_audited()
        if self.policy.kv == DEFERRED:
            if audited:
                self.compare(said.best[alive], passes.catch_up(head=True), alive)
            elif passes.backlog == AT_ONCE:
                passes.catch_up()
            return
        if audited:
            self.compare(said.best[alive], passes.audit(ran), alive)
        if self.policy.kv == COPY:
            passes.copy_keys(ran, self.sources[ran])
        else:
            passes.project_keys(ran, ids)


class AloneSteps(ExitSteps):
    """Each row leaves where it meets the criterion, and the others go on without it.

    Finished rows leave with the first row that does, so where none does the passes are stock's.
    """

    passes: RowPasses

    def __init__(
        self,
        policy: EarlyExit,
        record: PatchRecord,
        passes: RowPasses,
        rows: Rows,
        log: ExitLog,
    ) -> None:
        """As `ExitSteps`, with the passes to make."""
        super().__init__(policy, record, rows, log)
        self.passes = passes

    def step(self) -> None:
        """Make a token per row, each after its own number of layers."""
        rows, passes, log, alive = self.rows, self.passes, self.log, self.rows.alive
        judge = Judge(self.policy)
        left: Left = []
        passes.begin(rows.last())
        going, everyone = torch.arange(rows.batch), True
        made: Tensor | None = None
        for stretch, ran in enumerate(passes.ends):
            said = passes.advance(stretch, None if everyone else going)
            assert said is not None  # the head was asked
            if ran == passes.ends[-1]:
                made = self._taken(made, said, going, torch.ones_like(going, dtype=torch.bool))
                log.count_exits(ran, going[alive[going]].tolist())
                break
            leaves = judge.leaves(said, *passes.moved).cpu() & alive[going]
            if not leaves.any():
                continue
            log.count_exits(ran, going[leaves].tolist())
            stays = alive[going] & ~leaves
            left.append((stretch, going[~stays]))
            made = self._taken(made, said, going, ~stays)
            going, everyone = going[stays], False
            judge.keep(stays)
            if not len(going):
                break
        assert made is not None  # each row left somewhere
        chosen = made[:, None].tolist() if rows.searches else rows.choose(made[:, None], [])
        if left:
            self._leave(left, made if rows.searches else made.argmax(-1))
        passes.settle()
        log.tokens += rows.keep(chosen)

    def align(self) -> None:
        """As `ExitSteps.align`; windows drop what nobody needs any more."""
        super().align()
        self.passes.settle()

    def _taken(self, made: Tensor | None, said: Outlook, going: Tensor, which: Tensor) -> Tensor:
        """What tokens are chosen from, with some of the rows ``going`` in it.

        That is the tokens themselves, ``[batch]``, where the best are taken and nothing more is
        asked; else logits, ``[batch, vocabulary]``.
        """
        new = said.best if self.rows.searches else said.logits
        if made is None:
            made = new.new_zeros(self.rows.batch, *new.shape[1:])
        made[going[which].to(made.device)] = new[which.to(new.device)]
        return made

    def _leave(self, left: Left, best: Tensor) -> None:
        """Give the later layers what they get of tokens that left."""
        passes, alive = self.passes, self.rows.alive
        deferred = self.policy.kv == DEFERRED
        if self.is_audited():
            for stretch, rows in left:
                asked = rows[alive[rows]]
                whole = (
                    passes.catch_up(asked, head=True) if deferred else passes.audit(stretch, asked)
                )
                self.compare(best[asked.to(best.device)], whole)
        if deferred:
            held = passes.unsettled >= WINDOW_BACKLOG and passes.windowed
            if passes.backlog == AT_ONCE or held:
                passes.catch_up()
        elif self.policy.kv == COPY:
            passes.copy_keys(left, self.sources)
        else:
            passes.project_keys(left)
