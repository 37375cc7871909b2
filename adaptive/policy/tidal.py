"""TidalDecode: exact top keys in a few layers, reused by the layers after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._compose import begin, free_layers, why_fixed, with_whole
from adaptive.policy._fields import (
    check_budget,
    check_count,
    check_flag,
    check_layers_exist,
    check_share,
    refused,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.plan import LOCAL, REUSE, SELECT, WINDOW, Plan
from adaptive.policy.streaming import StreamingLLM

SECOND = 0.4
"""Share of the depth near which the second select layer lies by default: 13 of 32 in the paper."""


@dataclass(frozen=True, kw_only=True)
class TidalDecode(Policy):
    """Few layers read every key and choose the best; the layers after them read only those.

    After Yang et al. 2024 (arXiv:2410.05076), per KV head: a set is chosen by the softmax weights
    of all query heads that share the head. Each select layer attends to every key itself, so its
    own output is exact.

    Attributes:
        budget: Keys of each KV head that later layers read, sinks and recent ones included: a
            count, or as a float a share of the tokens, above 0 and at most 1.
        mass: Choose the fewest keys that hold this share of the softmax weight at the select layer,
            ``budget`` at most; None: always ``budget`` keys.
        select_layers: Layers that choose, ascending; None: the first layer after ``dense_layers``
            and one near two fifths of the depth. `adaptive.calibrate` chooses better ones.
        dense_layers: Layers that always read every key. Those before the first select layer do
            anyway, and so do layers with a sliding window of their own.
        sinks: First tokens that are always in the set.
        recent: Last tokens that are always in the set.
        group: Whether the weights of the query heads of one KV head are added ("sum") or the
            largest counts ("max").
        shared: One set for all KV heads, instead of one each.
        min_context: Tokens in the cache below which every layer is dense, bit for bit as without
            this policy.
        compensate: One more token stands for all that are not in the set: their mean key and value,
            weighed by their number.
        correct_every: After this many sparsely decoded tokens, run them again densely and overwrite
            their keys and values; None: never.
        audit_every: On every n-th call of a reusing layer measure the softmax mass that its keys
            really have, at the cost of reading all keys once; None: never.
        min_mass: Least softmax mass of the chosen keys at the select layer; for a token where a
            head has less, the layers after it read every key, and the report counts it. On CUDA
            every select layer then waits for the device.
    """

    modes: ClassVar[tuple[str, ...]] = (SELECT, REUSE)

    budget: int | float = 1024
    mass: float | None = None
    select_layers: tuple[int, ...] | None = None
    dense_layers: tuple[int, ...] = (0, 1)
    sinks: int = 4
    recent: int = 64
    group: str = "sum"
    shared: bool = False
    min_context: int = 8192
    compensate: bool = False
    correct_every: int | None = None
    audit_every: int | None = 64
    min_mass: float | None = None

    def __post_init__(self) -> None:
        check_count(self, "sinks", 0)
        check_count(self, "recent", 1)
        check_budget(self, share=True)
        check_share(self, "mass")
        check_share(self, "min_mass")
        set_layers(self, "select_layers", optional=True)
        set_layers(self, "dense_layers")
        if self.select_layers == ():
            raise refused(self, "select_layers", "name a layer, or be None", ())
        both = set(self.select_layers or ()) & set(self.dense_layers)
        if both:
            raise refused(self, "select_layers", "have no layer of dense_layers", min(both))
        if self.group not in ("sum", "max"):
            raise refused(self, "group", "be 'sum' or 'max'", self.group)
        for name in ("shared", "compensate"):
            check_flag(self, name)
        check_count(self, "min_context", 1)
        check_count(self, "correct_every", 1, optional=True)
        check_count(self, "audit_every", 1, optional=True)

    def tokens(self, length: int) -> int:
        """Keys per KV head at ``length`` tokens: the budget, above sinks and recent tokens."""
        count = self.budget if type(self.budget) is int else round(self.budget * length)
        return max(int(count), self.sinks + self.recent + 1)

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with the select layers, and reuse after the first of them.

        Raises:
            ValueError: A layer does not exist or cannot skip keys, no layer is left that could, or
                the policy has no meaning with an earlier one.
        """
        table = begin(self, table)
        layers = len(table.rows)
        check_layers_exist(self, "dense_layers", self.dense_layers, layers)
        check_layers_exist(self, "select_layers", self.select_layers or (), layers)
        if self.correct_every is not None and any(table.shape.windows):
            raise refused(
                self,
                "correct_every",
                "be None for a model with layers of their own window, whose cache forgets",
                self.correct_every,
            )
        free = self.may_select(table)
        for layer in self.select_layers or ():
            dropper = "LocalAttention" if LOCAL in table.rows[layer] else "StreamingLLM"
            why = why_fixed(table, layer) or (f"{dropper} drops its keys" * (layer not in free))
            if why:
                raise refused(self, "select_layers", f"leave out a layer: {why}", layer)
        chosen = self.select_layers or self._default(free, layers)
        if not any(layer > chosen[0] and layer not in chosen for layer in free):
            rule = "leave a layer after the first that may reuse its keys"
            raise refused(self, "select_layers", rule, self.select_layers)
        for layer in free_layers(table, self.dense_layers):
            if layer >= chosen[0]:
                table = with_whole(table, layer, SELECT if layer in chosen else REUSE)
        return table

    def may_select(self, table: Plan) -> list[int]:
        """Layers of ``table`` that could select: not dense, no window of the model or a policy."""
        free = free_layers(table, self.dense_layers)
        kept = {LOCAL}
        if any(isinstance(policy, StreamingLLM) for policy in table.policies):
            kept.add(WINDOW)
        return [layer for layer in free if not kept & set(table.rows[layer])]

    def _default(self, free: list[int], layers: int) -> tuple[int, ...]:
        if len(free) < 2:  # noqa: PLR2004  (one to select and one to reuse)
            raise refused(
                self,
                "dense_layers",
                f"leave one layer that selects and one that reuses, of the model's {layers}",
                self.dense_layers,
            )
        first = free[0]
        later = [layer for layer in free if layer > first + 1]
        second = min(later, key=lambda layer: abs(layer - SECOND * layers), default=None)
        near = second is not None and second < layers - 1 and SECOND * layers > first + 1
        reused = len(free) > len((first, second))
        return (first, second) if near and reused and second is not None else (first,)
