"""BlockSparsePrefill: long prompts attend to chosen blocks of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._compose import begin, free_layers, why_fixed
from adaptive.policy._fields import (
    check_count,
    check_flag,
    check_layers_exist,
    check_share,
    is_share,
    refused,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.plan import BLOCKS, LOCAL, Plan

SELECTED = "selected"
A_SHAPE = "a_shape"
VERTICAL_SLASH = "vertical_slash"
PATTERNS = (SELECTED, A_SHAPE, VERTICAL_SLASH)
BLOCK_SIZES = (16, 32, 64, 128)
"""Blocks that `block_sparse_attention` reads."""
DEFAULT_MASS = 0.95
DEFAULT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class BlockSparsePrefill(Policy):
    """Blocks of a prompt's queries read the key blocks that promise the most softmax mass.

    Attention on the chosen blocks is exact. The diagonal, the sinks and all that the prompt's last
    queries see are always chosen. It concerns calls of more than 16 query tokens alone: decoding
    is left to the other policies.

    Attributes:
        mass: Choose the fewest blocks that hold this share of the estimated softmax mass. None: by
            ``budget``; without that, 0.95.
        budget: Instead of ``mass``: blocks that each block of queries reads, those always chosen
            included: a count, or as a float a share, above 0 and at most 1, of those it sees. For
            "a_shape" they are the sinks and the last blocks; a share is then one of the prompt,
            0.25 if nothing is said.
        block: Tokens of a block of queries or keys: 16, 32, 64 or 128.
        pattern: Where the estimate comes from. "selected": the product of the means of queries and
            keys, for each pair of blocks. "vertical_slash": the keys and the distances that the
            last 64 queries read (Jiang et al. 2024, arXiv:2407.02490). "a_shape": none, the same
            window for all (Han et al. 2023, arXiv:2308.16137).
        per_head: Each query head has its own blocks, instead of all that share a KV head.
        sinks: First tokens whose blocks are always read.
        recent: Tokens right before a block of queries whose blocks are always read, too: the mean
            of a block says little about its neighbours.
        dense_tail: Last queries of a call that read every key: where a prompt asks.
        min_context: Tokens in the cache below which a call is as without this policy.
        layers: Layers that do so; None: all that the model or `LocalAttention` gives no window.
        audit: Queries of each call whose true softmax mass is measured; None: none.
    """

    modes: ClassVar[tuple[str, ...]] = (BLOCKS,)

    mass: float | None = None
    budget: int | float | None = None
    block: int = 64
    pattern: str = SELECTED
    per_head: bool = False
    sinks: int = 4
    recent: int = 64
    dense_tail: int = 64
    min_context: int = 4096
    layers: tuple[int, ...] | None = None
    audit: int | None = 64

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise refused(self, "pattern", f"be one of {', '.join(PATTERNS)}", self.pattern)
        if type(self.block) is not int or self.block not in BLOCK_SIZES:
            raise refused(self, "block", "be 16, 32, 64 or 128", self.block)
        check_count(self, "sinks", 0)
        check_count(self, "recent", 0)
        check_count(self, "dense_tail", 0)
        check_share(self, "mass")
        if self.mass is not None and self.budget is not None:
            raise refused(self, "mass", "be None beside a budget", self.mass)
        if self.mass is not None and self.pattern == A_SHAPE:
            raise refused(self, "mass", "be None for a_shape, which estimates nothing", self.mass)
        if self.budget is None and self.mass is None:
            if self.pattern == A_SHAPE:
                object.__setattr__(self, "budget", DEFAULT_SHARE)
            else:
                object.__setattr__(self, "mass", DEFAULT_MASS)
        self._check_budget()
        check_flag(self, "per_head")
        check_count(self, "min_context", 1)
        set_layers(self, "layers", optional=True)
        if self.layers == ():
            raise refused(self, "layers", "name a layer, or be None", ())
        check_count(self, "audit", 1, optional=True)

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold the sinks where a sequence starts with a block."""
        return -(-self.sinks // self.block)

    @property
    def recent_blocks(self) -> int:
        """Blocks that hold the recent tokens."""
        return -(-self.recent // self.block)

    def window(self, tokens: int) -> int:
        """Last tokens that a query of an "a_shape" reads in a prompt of ``tokens``."""
        budget = self.budget
        if isinstance(budget, int):
            return (budget - self.sink_blocks) * self.block
        return max(self.block, round((budget or 0.0) * tokens) - self.sinks)

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with whatever was undecided dense: decoding is not changed otherwise.

        Raises:
            ValueError: A layer does not exist or cannot skip keys, no layer is left that could, or
                there is an earlier policy of this kind.
        """
        table = begin(self, table)
        check_layers_exist(self, "layers", self.layers or (), len(table.rows))
        for layer in self.layers or ():
            local = "some of its heads are local in prompts, too" * (LOCAL in table.rows[layer])
            why = why_fixed(table, layer) or local
            if why:
                raise refused(self, "layers", f"leave out a layer: {why}", layer)
        if not self.prefill_layers(table):
            rule = "find one that may skip keys; the model, Exact or LocalAttention leaves none"
            raise refused(self, "layers", rule, self.layers)
        return table

    def prefill_layers(self, table: Plan) -> tuple[int, ...]:
        """Layers of ``table`` whose prompts read chosen blocks."""
        chosen = free_layers(table, ()) if self.layers is None else self.layers
        return tuple(layer for layer in chosen if LOCAL not in table.rows[layer])

    def _check_budget(self) -> None:
        budget = self.budget
        if budget is None:
            return
        least = self.sink_blocks + self.recent_blocks + 1
        if type(budget) is float and is_share(budget):
            return
        if type(budget) is int and budget >= least:
            return
        raise refused(
            self,
            "budget",
            f"be a whole number of blocks from {least} on (sinks, recent ones, the diagonal), or a "
            "share above 0 and at most 1.0",
            budget,
        )
