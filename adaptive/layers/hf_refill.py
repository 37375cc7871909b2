"""Decoding of many prompts in one batch, whose finished rows make place for the next prompt.

Rows of a batch end at different lengths. In a batch that stays together, a row that has ended is
computed until the longest one ends. Here the next prompt takes its place at once.

All rows end at the same slot of one cache, so a step appends one slot to all of them. A prompt is
read into a cache of its own, which short ones share; then its keys and values are copied to the
last slots of the row that has become free. A prompt that is longer than the cache makes it grow at
the front; slots in front that no row uses any more are given back. A mask says where each row
begins, and positions count its own tokens. When no prompt waits, rows that end leave the batch.

Rows that accept different numbers of drafts leave gaps behind the fewer ones, which the mask leaves
out; when they are as many as slots that are given back in front, tokens are moved together.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from adaptive.errors import PatchConflict
from adaptive.layers.depth import Depth
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_exit_passes import StretchPasses
from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_refill_steps import Steps, passes_and_steps
from adaptive.layers.hf_requests import NAME, Request, RequestRows
from adaptive.layers.refill_log import RefillLog
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import EarlyExit

UNUSED = 8
"""Slots more than the longest row has tokens are given back when they are one in so many, ..."""
UNUSED_LEAST = 16
"""... and at least so many: each time, all others are copied."""

READ_AT_ONCE = 256
"""Tokens, padding included, up to which prompts are read together, before rows are free for them:
so far a pass costs hardly more than one on a few."""

Ended = Callable[[Request], None]
Waiting = tuple[Request, Cache]
Ready = tuple[Request, Passes, int]
"""A prompt that was read, and the row of which cache it is in."""


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
        self.held: Tensor  # which slots hold tokens of each row, while rows come and go
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
            elif self._wastes():
                self.held = self.passes.held(0)
                self._align()

    def _step(self) -> None:
        log, exits, rows = self.log, self.exits, self.rows
        start, before = perf_counter(), rows.kept
        self.steps.step()
        log.steps += 1
        log.rows += rows.batch
        log.places += self.batch
        log.tokens += rows.kept - before
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
        if self.record.speculation is not None:
            self.record.speculation.tokens += kept
        if self.record.successors is not None:
            for each in requests:
                self.record.successors.read(each.ids)
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
        self.passes, self.steps = passes_and_steps(
            lambda kind, *more: self._passes(kind, cache, *more), read, rows, self.record
        )
        self.passes.mask = self._places(request).long().repeat(batch, 1)

    def _fill(self, free: list[int]) -> int:
        """Give free rows to the next prompts, or up if there are none; return how many were filled.

        Args:
            free: Numbers of the rows.
        """
        requests, filled = self.rows.requests, 0
        self.held = self.passes.held(0)
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
            left = [row for row in range(self.rows.batch) if row not in gone]
            kept = torch.tensor(left, dtype=torch.long)
            self.held = self.held[left]
            for layer in self._layers() if requests else ():
                layer.batch_select_indices(kept.to(layer.device))
        self.rows.seat(requests)
        if requests:
            self._align()
        return filled

    def _layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.passes.cache.layers
        return layers

    def _places(self, request: Request) -> Tensor:
        """Which slots a prompt fills that comes to the batch, ``[slots]``: the last ones."""
        slots = torch.arange(self.passes.slots, device=request.device)
        return slots >= self.passes.slots - (len(request.ids) - 1)

    def _put(self, row: int, request: Request, read: Passes, place: int) -> None:
        """Copy what was read of a prompt, in row ``place`` of a cache, into a row of the batch."""
        self._shift(max(len(request.ids) - 1 - self.passes.slots, 0))
        fresh: Sequence[Any] = read.cache.layers
        self._note_held(sum(layer.held_bytes() for layer in fresh))
        for layer, one in zip(self._layers(), fresh, strict=True):
            layer.put(row, one, place)
        self.held[row] = self._places(request)

    def _shift(self, slots: int) -> None:
        """Put so many slots in front of the cache; fewer if negative."""
        if slots:
            for layer in self._layers():
                layer.shift(slots)
            self.held = torch.nn.functional.pad(self.held, (slots, 0))
            self.passes.slots += slots
            self.log.shifts += 1

    def _pack(self, slots: int) -> None:
        """Move the tokens of each row together, so that the longest row fills so many slots."""
        index = self.held.long().argsort(dim=1, stable=True)[:, -slots:]  # empty slots first
        for layer in self._layers():
            layer.pack(index)
        self.held = self.held.gather(1, index)
        self.passes.slots = slots
        self.log.shifts += 1

    def _wastes(self) -> bool:
        """Whether so many slots more are in use than the longest row has tokens."""
        slots = self.passes.slots
        return slots - max(self.rows.held()) >= max(UNUSED_LEAST, slots // UNUSED)

    def _note_held(self, more: int = 0) -> None:
        held = more + sum(layer.held_bytes() for layer in self._layers())
        self.log.held_bytes = max(self.log.held_bytes, held)

    def _align(self) -> None:
        """Give back slots that nobody needs; say which hold tokens, and what comes next."""
        self._note_held()
        passes, longest = self.passes, max(self.rows.held())
        if self._wastes():
            if self.held[:, : passes.slots - longest].any():
                self._pack(longest)
            else:
                self._shift(longest - passes.slots)
        passes.positions = self.held.sum(1, keepdim=True)
        passes.mask = None if bool(self.held.all()) else self.held.long()
        passes.restart()
        if self.exits is not None:
            rows = [self.exits_of.setdefault(each.index, {}) for each in self.rows.requests]
            self.exits.row_exits = rows
