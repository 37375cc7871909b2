"""Decoding of many prompts in one batch, whose finished rows make place for the next prompt.

Rows of a batch end at different lengths. In a batch that stays together, a row that has ended is
computed until the longest one ends. Here the next prompt takes its place at once.

All rows end at the same slot of one cache, so a step appends one slot to all of them. A prompt is
read into a cache of its own, which short ones share; then its keys and values are copied to the
last slots of the row that has become free. A prompt that is longer than the cache makes it grow at
the front; slots in front that no row uses any more are given back. A mask says where each row
begins, and positions count its own tokens. When no prompt waits, rows that end leave the batch.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from time import perf_counter
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from adaptive.errors import PatchConflict
from adaptive.layers.depth import Depth
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_exit_passes import ExitPasses, StretchPasses
from adaptive.layers.hf_exit_steps import AloneSteps, TogetherSteps
from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_requests import NAME, Request, RequestRows
from adaptive.layers.hf_row_passes import RowPasses
from adaptive.layers.refill_log import RefillLog
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import EarlyExit
from adaptive.policy.early_exit import ALONE

UNUSED = 8
"""Slots in front that no row uses are given back when they are one in so many, ..."""
UNUSED_LEAST = 16
"""... and at least so many: each time, all others are copied."""

READ_AT_ONCE = 256
"""Tokens, padding included, up to which prompts are read together, before rows are free for them:
so far a pass costs hardly more than one on a few."""

Ended = Callable[[Request], None]
Waiting = tuple[Request, Cache]
Ready = tuple[Request, Passes, int]
"""A prompt that was read, and the row of which cache it is in."""


class Steps(Protocol):
    """What makes a token per row."""

    def step(self) -> None:
        """Make it."""

    def align(self) -> None:
        """Let every layer hold every token."""


class PlainSteps:
    """Each a pass of the whole model."""

    def __init__(self, passes: Passes, rows: RequestRows) -> None:
        """Know the model's passes and the rows."""
        self.passes = passes
        self.rows = rows

    def step(self) -> None:
        """Make a token per row."""
        passes, rows = self.passes, self.rows
        logits = passes.plain(rows.last())
        passes.slots += 1
        passes.positions = passes.positions + 1
        rows.keep(rows.choose(logits, []))

    def align(self) -> None:
        """Do nothing: all layers have run."""


class Refill:
    """One call of `generate_many`."""

    def __init__(
        self,
        model: Any,
        record: PatchRecord,
        waiting: Iterable[Waiting],
        batch: int,
        ended: Ended,
        log: RefillLog,
    ) -> None:
        """Know the model, what waits, rows of a full batch, whom to tell, and where to count."""
        self.model = model
        self.record = record
        self.waiting = iter(waiting)
        self.ready: deque[Ready] = deque()
        self.together = not any(policy.modes for policy in record.policies)
        self.batch = batch
        self.ended = ended
        self.log = log
        self.rows: RequestRows
        self.passes: Passes
        self.steps: Steps
        self.exits = record.exits
        self.exiting = next((p for p in record.policies if isinstance(p, EarlyExit)), None)
        self.exits_of: dict[int, dict[int, int]] = {}

    def run(self) -> None:
        """Generate until every prompt has ended."""
        first = self._next()
        if first is None:
            return
        self._open(*first)
        self._fill(list(range(1, self.rows.batch)))
        while self.rows.batch:
            self._step()
            free = (~self.rows.alive).nonzero().flatten().tolist()
            if free:
                self.steps.align()
                for row in free:
                    self._end(self.rows.requests[row])
                self.log.refills += self._fill(free)

    def _step(self) -> None:
        log, exits, rows = self.log, self.exits, self.rows
        start = perf_counter()
        self.steps.step()
        log.steps += 1
        log.rows += rows.batch
        log.places += self.batch
        log.tokens += rows.batch
        if exits is not None:
            exits.steps += 1
            exits.seconds += perf_counter() - start

    def _next(self) -> Ready | None:
        """The next prompt that goes on after its first token; None: none is left."""
        while not self.ready:
            group = self._group()
            if not group:
                return None
            self._read(group)
        return self.ready.popleft()

    def _group(self) -> list[Waiting]:
        """The prompts to read next: one, or several that are short."""
        group: list[Waiting] = []
        longest = 0
        for request, cache in self.waiting:
            longest = max(longest, len(request.ids))
            if group and (not self.together or (len(group) + 1) * longest > READ_AT_ONCE):
                self.waiting = chain([(request, cache)], self.waiting)
                break
            group.append((request, cache))
        return group

    def _read(self, group: list[Waiting]) -> None:
        """Read prompts, choose the first token of each, and note those that go on."""
        requests, cache = [request for request, _ in group], group[0][1]
        longest = max(len(request.ids) for request in requests)
        padded = [[0] * (longest - len(each.ids)) + each.ids for each in requests]
        ids = torch.tensor(padded, device=requests[0].device)
        policy = self.exiting
        more = () if policy is None else (policy.layers, self.exits)
        passes: Passes = self._passes(StretchPasses if more else Passes, cache, *more)
        lengths = torch.tensor([[len(each.ids)] for each in requests], device=ids.device)
        if int(lengths.min()) < longest:
            places = torch.arange(longest, device=ids.device)
            passes.mask = (places >= longest - lengths).long()
        logits = passes.prompt(ids, requests[0].config.prefill_chunk_size)
        layers: Sequence[Any] = cache.layers
        for layer in layers:
            if not isinstance(layer, AdaptiveCacheLayer):
                raise NotImplementedError(
                    f"adaptive::{NAME}: rows cannot come to and leave a {type(layer).__name__}"
                )
        self.log.prompts += len(requests)
        self.log.prompt_tokens += int(lengths.sum())
        rows = RequestRows(requests[0])
        rows.seat(requests)
        kept = rows.keep(rows.choose(logits, []))
        self.log.tokens += kept
        if self.exits is not None:
            self.exits.tokens += kept
        for row, (request, alive) in enumerate(zip(requests, rows.alive.tolist(), strict=True)):
            if alive:
                self.ready.append((request, passes, row))
            else:
                self._end(request)

    def _end(self, request: Request) -> None:
        """Hand a finished request over; whoever gets it may do anything, short of unpatching."""
        self.ended(request)
        if self.model.__dict__.get(RECORD) is not self.record or not self.record.enabled:
            raise PatchConflict(
                f"adaptive: {NAME} cannot go on: the patch was taken away meanwhile"
            )

    def _passes(self, kind: type[Passes], cache: Any, *more: Any) -> Any:
        record, model = self.record, self.model
        depth = record.depth or Depth(layers=len(record.states))
        return kind(model, model.get_submodule(record.base), depth, cache, None, *more)

    def _open(self, request: Request, read: Passes, row: int) -> None:
        """Make the batch: rows like the first one, each to be overwritten or to leave."""
        cache, batch = copy.copy(read.cache), self.batch
        layers: list[Any] = [copy.copy(layer) for layer in read.cache.layers]
        cache.layers = layers  # copies: other rows of what was read are to come
        for layer in layers:
            layer.batch_select_indices(torch.full((batch,), row, device=layer.device))
        self.rows = rows = RequestRows(request)
        rows.seat([request] * batch)
        policy = self.exiting
        if policy is None:
            self.passes = self._passes(Passes, cache)
            self.passes.finish(self.passes.slots)  # nothing will be taken back from windows
            self.steps = PlainSteps(self.passes, rows)
            return
        log = self.exits
        assert log is not None  # the policy has made it
        alone = policy.rows == ALONE and batch > 1
        kind = RowPasses if alone else ExitPasses
        self.passes = passes = self._passes(kind, cache, policy.layers, log)
        assert isinstance(read, StretchPasses)  # as `_read` makes it
        passes.head = read.head
        if passes.head is not None:
            passes.head.summarises = rows.searches  # as in `ExitSteps.run`
        steps = AloneSteps if alone else TogetherSteps
        self.steps = steps(policy, self.record, passes, rows, log)

    def _fill(self, free: list[int]) -> int:
        """Give free rows to the next prompts, or up if there are none; return how many were filled.

        Args:
            free: Numbers of the rows.
        """
        requests, filled = self.rows.requests, 0
        for row in free:
            ready = self._next()
            if ready is None:
                break
            requests[row] = ready[0]
            self._put(row, *ready)
            filled += 1
        gone = set(free[filled:])
        if gone:
            requests = [each for row, each in enumerate(requests) if row not in gone]
            kept = torch.tensor([row for row in range(self.rows.batch) if row not in gone])
            for layer in self._layers() if requests else ():
                layer.batch_select_indices(kept.to(layer.device))
        self.rows.seat(requests)
        if requests:
            self._align()
        return filled

    def _layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.passes.cache.layers
        return layers

    def _put(self, row: int, request: Request, read: Passes, place: int) -> None:
        """Copy what was read of a prompt, in row ``place`` of a cache, into a row of the batch."""
        self._shift(max(len(request.ids) - 1 - self.passes.slots, 0))
        fresh: Sequence[Any] = read.cache.layers
        self._note_held(sum(layer.held_bytes() for layer in fresh))
        for layer, one in zip(self._layers(), fresh, strict=True):
            layer.put(row, one, place)

    def _shift(self, slots: int) -> None:
        """Put so many slots in front of the cache; fewer if negative."""
        if slots:
            for layer in self._layers():
                layer.shift(slots)
            self.passes.slots += slots
            self.log.shifts += 1

    def _note_held(self, more: int = 0) -> None:
        held = more + sum(layer.held_bytes() for layer in self._layers())
        self.log.held_bytes = max(self.log.held_bytes, held)

    def _align(self) -> None:
        """Give back slots that no row uses; say where each row begins and what comes next."""
        self._note_held()
        passes, held = self.passes, self.rows.held()
        unused = passes.slots - max(held)
        if unused >= max(UNUSED_LEAST, passes.slots // UNUSED):
            self._shift(-unused)
        lengths = torch.tensor(held, device=self.rows.requests[0].device)[:, None]
        passes.positions = lengths
        passes.mask = None
        if min(held) < passes.slots:
            slots = torch.arange(passes.slots, device=lengths.device)
            passes.mask = (slots >= passes.slots - lengths).long()
        passes.restart()
        if self.exits is not None:
            rows = [self.exits_of.setdefault(each.index, {}) for each in self.rows.requests]
            self.exits.row_exits = rows
