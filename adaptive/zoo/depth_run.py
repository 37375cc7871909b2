"""Decoding of a recursive transformer: rows in slots, each at its own recursion of its token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops import decode_attention
from adaptive.zoo.decoder import Layer
from adaptive.zoo.recursion_choice import check_logits, depth_of
from adaptive.zoo.run import PREFILL_POSITIONS, Run
from adaptive.zoo.slot_cache import PromptStore, SlotCache

if TYPE_CHECKING:
    from adaptive.zoo.recursion import Rotation
    from adaptive.zoo.recursive import RecursiveTransformer


class PromptStores:
    """Where the prompts of some slots go."""

    def __init__(self, slots: Slots, rows: Tensor) -> None:
        """Stand for the slots ``rows``."""
        self.slots, self.rows = slots, rows
        self.first, self.last = (
            [PromptStore(cache, number, rows) for number in range(len(cache.keys))]
            for cache in (slots.first, slots.last)
        )

    def store(self, turn: int, number: int) -> PromptStore:
        """The store of one layer of the block in recursion ``turn``."""
        return PromptStore(self.slots.block, number, self.slots.block_rows(self.rows, turn))

    def count(self, turn: int, counts: Tensor) -> None:
        """Note how many tokens of each row ran recursion ``turn``."""
        self.slots.block.lengths[self.slots.block_rows(self.rows, turn)] = counts


class Slots:
    """Rows that decode side by side; each has a token, and is somewhere on its way.

    A token enters (embedding, first layers), runs the block as often as the router says, all rows
    that are in it in one pass, whichever recursion they are at, and leaves (last layers, head).

    Attributes:
        turn: Recursions that each slot's token has behind it.
        gates: The router's weight of the next one, or of the last one.
        running: Which slots' tokens are in the block.
        passes: Passes of the block so far.
        row_passes: Rows of those passes.
        depths: How many tokens left after each number of recursions, from 0 on.
    """

    def __init__(
        self, model: RecursiveTransformer, count: int, capacity: int, kv_dtype: torch.dtype
    ) -> None:
        """Make empty slots for sequences of at most ``capacity`` tokens."""
        config, device = model.config, model.device
        self.model, self.config, self.count = model, config, count
        self.turns = 1 if config.kv == "shared" else config.recursions

        def cache(layers: int, rows: int) -> SlotCache:
            return SlotCache(config, layers, rows, capacity, kv_dtype, device)

        self.first = cache(config.first_layers, count)
        self.block = cache(config.block_layers, count * self.turns)
        self.last = cache(config.last_layers, count)
        self.hidden = torch.zeros(count, config.width, dtype=model.dtype, device=device)
        self.start = torch.zeros_like(self.hidden)
        self.places = torch.zeros(count, dtype=torch.int64, device=device)
        self.turn = torch.zeros_like(self.places)
        self.wanted = torch.zeros_like(self.places)
        self.gates = torch.zeros(count, device=device)
        self.running = torch.zeros(count, dtype=torch.bool, device=device)
        self.passes = self.row_passes = 0
        self.depths = torch.zeros(config.recursions + 1, dtype=torch.int64, device=device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the live keys and values."""
        return sum(cache.used_bytes for cache in (self.first, self.block, self.last))

    def block_rows(self, rows: Tensor, turn: Tensor | int) -> Tensor:
        """Rows of the block's cache of these slots in recursion ``turn``."""
        return rows if self.turns == 1 else rows * self.turns + turn

    def figures(self) -> dict[str, Any]:
        """What the report says of recursions."""
        possible = max(1, self.passes * self.count)
        return {
            "depths": tuple(self.depths.tolist()),
            "passes": self.passes,
            "occupancy": self.row_passes / possible,
        }

    def free(self, rows: Tensor) -> None:
        """Forget what these slots hold."""
        for cache in (self.first, self.last):
            cache.lengths[rows] = 0
        self.block.lengths.view(self.count, self.turns)[rows] = 0

    def fill(self, rows: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Run prompts into free slots; return the logits after them, ``[rows, vocab_size]``."""
        longest = max(len(prompt) for prompt in prompts)
        step = max(1, PREFILL_POSITIONS // longest)
        found = [
            self._fill(rows[at : at + step], prompts[at : at + step])
            for at in range(0, len(prompts), step)
        ]
        return torch.cat(found)

    def _fill(self, rows: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
        longest = int(lengths.max())
        ids = torch.stack([F.pad(prompt, (0, longest - len(prompt))) for prompt in prompts])
        valid = torch.arange(longest, device=rows.device) < lengths[:, None]
        held = PromptStores(self, rows)
        hidden, _ = self.model._whole(ids, "threshold", valid, held)
        self.first.lengths[rows] = self.last.lengths[rows] = self.places[rows] = lengths
        ends = hidden[torch.arange(len(rows), device=rows.device), lengths - 1]
        return self.model._told(ends)

    def enter(self, rows: Tensor, tokens: Tensor) -> None:
        """Take a token into each of these slots, up to the block."""
        x = self.model.embedding(tokens)[:, None]
        x = self._step(self.model.first_layers, x, self._rotation(rows), self.first, rows)[:, 0]
        self.hidden[rows], self.turn[rows] = x, 0
        if self.config.router == "token":
            self.start[rows] = x
            logits = F.linear(x, self._router()).float()
            self.wanted[rows], self.gates[rows] = depth_of(logits, self.config)
        self.running[rows] = self._goes_on(rows)

    def advance(self) -> Tensor:
        """Run the block once, for all rows that are in it; return the slots that left it."""
        rows = self.running.nonzero().flatten()
        if len(rows) == 0:
            return rows
        turn, x = self.turn[rows], self.hidden[rows]
        done = self._block(rows, x[:, None], turn)[:, 0]
        self.hidden[rows] = self._merged(rows, x, done, turn)
        self.turn[rows] = turn + 1
        self.passes += 1
        self.row_passes += len(rows)
        goes_on = self._goes_on(rows)
        self.running[rows] = goes_on
        return rows[~goes_on]

    def leave(self, rows: Tensor) -> Tensor:
        """Finish the tokens of these slots; return logits, ``[rows, vocab_size]``."""
        x = self.hidden[rows][:, None]
        x = self._step(self.model.last_layers, x, self._rotation(rows), self.last, rows)
        self.places[rows] += 1
        self.depths += self.turn[rows].bincount(minlength=len(self.depths))
        return self.model._told(x[:, 0])

    def _router(self) -> Tensor:
        assert self.model.router is not None
        return self.model.router.weight

    def _rotation(self, rows: Tensor) -> Rotation:
        return self.model._rotation(self.places[rows][:, None], self.hidden.dtype)

    def _goes_on(self, rows: Tensor) -> Tensor:
        """Whether the tokens of these slots run the block (once more); asks the router."""
        config, turn = self.config, self.turn[rows]
        more = turn < config.recursions
        if config.router == "token":
            return turn < self.wanted[rows]
        if config.router == "expert":
            left = rows[more]
            turn = self.turn[left]
            logits = (self.hidden[left].float() * self._router()[turn].float()).sum(-1)
            check_logits(logits)
            scores = logits.sigmoid()
            self.gates[left] = config.factor * scores
            free = torch.tensor(config.shares, device=rows.device)[turn] == 1
            more[more.clone()] = free | (scores >= config.threshold)
        return more

    def _merged(self, rows: Tensor, x: Tensor, done: Tensor, turn: Tensor) -> Tensor:
        if not self.config.weighted or self.config.router is None:
            return done
        token = self.config.router == "token"
        base = self.start[rows] if token else x
        added = (base.float() + self.gates[rows][:, None] * done.float()).to(x.dtype)
        if not token:
            return added
        return torch.where((turn + 1 == self.wanted[rows])[:, None], added, done)

    def _block(self, rows: Tensor, x: Tensor, turn: Tensor) -> Tensor:
        """One pass; with shared KV those alone append that are in the first recursion."""
        layers, rotation = self.model.block_layers, self._rotation(rows)
        cache_rows = self.block_rows(rows, turn)
        if self.config.kv == "recursion":
            return self._step(layers, x, rotation, self.block, cache_rows)
        return self._step(layers, x, rotation, self.block, cache_rows, turn == 0)

    def _step(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        rotation: Rotation,
        cache: SlotCache,
        rows: Tensor,
        writes: Tensor | None = None,
    ) -> Tensor:
        """One token of each row through a stack of layers; ``writes``: which append, None: all."""
        some = None if writes is None or bool(writes.all()) else writes.nonzero().flatten()
        into = rows if some is None else rows[some]
        place = cache.lengths[into]
        cache.lengths[into] = place + 1
        lengths = cache.lengths[rows].int()
        for number, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            keys, values = cache.keys[number], cache.values[number]
            if some is not None and len(some) == 0:
                query = layer.project_query(x, rotation)
            else:
                query, key, value = layer.project(x, rotation)
                if some is not None:
                    key, value = key[some], value[some]
                keys[into, :, place] = key[:, :, 0].to(keys.dtype)
                values[into, :, place] = value[:, :, 0].to(keys.dtype)
            query = query.to(keys.dtype)
            mixed = decode_attention(query, keys, values, lengths=lengths, cache_rows=rows)[0]
            x = layer.finish(x, mixed)
        return x


class DepthRun(Run):
    """All rows in step: a token is finished in every row before the next one begins."""

    def __init__(self, slots: Slots, prompts: Sequence[Tensor]) -> None:
        """Run the prompts."""
        self.slots = slots
        self.rows = torch.arange(slots.count, device=slots.hidden.device)
        self.scores = slots.fill(self.rows, prompts)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live KV entries."""
        return self.slots.used_bytes

    @property
    def kv_entries(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.slots.places[self.rows].max())

    def logits(self, previous: Tensor | None) -> Tensor:
        """Return the scores that the last token left."""
        return self.scores

    def advance(self, block: Tensor) -> None:
        """Run a token of every row."""
        self.slots.enter(self.rows, block[:, 0])
        while bool(self.slots.running.any()):
            self.slots.advance()
        self.scores = self.slots.leave(self.rows)

    def figures(self) -> dict[str, Any]:
        """What the report says of recursions."""
        return self.slots.figures()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        gone = torch.ones(len(self.rows), dtype=torch.bool, device=rows.device)
        gone[rows] = False
        self.slots.free(self.rows[gone])
        self.rows = self.rows[rows]
