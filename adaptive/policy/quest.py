"""Quest: whole pages of keys, ranked by what their bounds promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._compose import begin, free_layers, with_whole
from adaptive.policy._fields import (
    check_budget,
    check_count,
    check_layers_exist,
    refused,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.plan import PAGES, Plan

PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Pages that `gather_attention` reads."""


@dataclass(frozen=True, kw_only=True)
class Quest(Policy):
    """Every layer reads the pages of keys whose bounds promise the largest scores.

    Tang et al. 2024 (arXiv:2406.10774), per KV head: a page is known by the least and the largest
    of each coordinate of its keys, from which follows the most that a query can score in it.

    Attributes:
        budget: Keys of each KV head that are read, sinks and recent ones included; rounded up to
            whole pages.
        page_size: Tokens of a page, a power of two up to 64.
        dense_layers: Layers that read every key.
        sinks: First tokens whose pages are always read.
        recent: Last tokens whose pages are always read.
        min_context: Tokens in the cache below which every layer is dense, bit for bit.
        audit_every: On every n-th call of a layer measure the softmax mass that its pages really
            have, at the cost of reading all keys once; None: never.
    """

    modes: ClassVar[tuple[str, ...]] = (PAGES,)

    budget: int = 1024
    page_size: int = 16
    dense_layers: tuple[int, ...] = (0, 1)
    sinks: int = 4
    recent: int = 64
    min_context: int = 8192
    audit_every: int | None = 64

    def __post_init__(self) -> None:
        check_count(self, "sinks", 0)
        check_count(self, "recent", 1)
        check_count(self, "page_size", 1)
        if self.page_size not in PAGE_SIZES:
            raise refused(self, "page_size", "be a power of two up to 64", self.page_size)
        check_budget(self, share=False)
        set_layers(self, "dense_layers")
        check_count(self, "min_context", 1)
        check_count(self, "audit_every", 1, optional=True)

    def tokens(self, length: int) -> int:
        """Keys per KV head at ``length`` tokens."""
        return self.budget

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with pages for every head that keeps its keys, but in dense layers.

        Raises:
            ValueError: A layer does not exist, no layer is left that could skip keys, or the policy
                has no meaning with an earlier one.
        """
        table = begin(self, table)
        check_layers_exist(self, "dense_layers", self.dense_layers, len(table.rows))
        free = free_layers(table, self.dense_layers)
        if not free:
            raise refused(self, "dense_layers", "leave a layer that may skip", self.dense_layers)
        for layer in free:
            table = with_whole(table, layer, PAGES)
        return table
