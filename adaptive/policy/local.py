"""LocalAttention: layers or heads that see near tokens and the first ones, in prompts as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._compose import begin, check_named, free_layers, why_fixed
from adaptive.policy._fields import (
    Heads,
    check_count,
    check_heads_exist,
    check_layers_exist,
    refused,
    set_heads,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.plan import LOCAL, RAZOR, SELECT, WINDOW, Plan


@dataclass(frozen=True, kw_only=True)
class LocalAttention(Policy):
    """Chosen layers or KV heads see a window and some first tokens, from the first token on.

    The pattern of StreamingLLM (Xiao et al. 2023, arXiv:2309.17453) as attention itself: the prompt
    is computed within it, too, so it costs O(tokens x window) in these heads, and what no later
    token sees is given back as soon as the prompt has been read. The policy `StreamingLLM` reads
    the whole prompt densely and drops afterwards.

    Attributes:
        window: Last tokens that a query sees, its own included.
        sinks: First tokens that it sees besides; at most ``window``.
        layers: Layers all of whose heads do so, ascending; None: all, unless ``heads`` are named.
        heads: KV heads that do so, as (layer, head) pairs or a mapping from layer to heads; not
            together with ``layers``.
        positions: "original": tokens keep their positions in the text. "rebased": they count within
            what is kept, as in the paper: the sinks move up to the window, and no query ever sees a
            key further away than ``sinks + window - 1`` positions.
    """

    modes: ClassVar[tuple[str, ...]] = (LOCAL,)

    window: int
    sinks: int = 0
    layers: tuple[int, ...] | None = None
    heads: Heads | None = None
    positions: str = "original"

    def __post_init__(self) -> None:
        check_count(self, "window", 1)
        check_count(self, "sinks", 0)
        if self.sinks > self.window:
            raise refused(self, "sinks", f"be at most window = {self.window}", self.sinks)
        set_layers(self, "layers", optional=True)
        set_heads(self, "heads")
        if self.layers is not None and self.heads is not None:
            raise refused(self, "heads", "be None where layers are named", self.heads)
        for name in ("layers", "heads"):
            if getattr(self, name) == ():
                raise refused(self, name, f"name one of the {name}, or be None", ())
        if self.positions not in ("original", "rebased"):
            raise refused(self, "positions", "be 'original' or 'rebased'", self.positions)

    @property
    def turns(self) -> bool:
        """Whether some tokens are seen at other positions than those of the text."""
        return self.positions == "rebased" and self.sinks > 0

    def window_tokens(self, length: int) -> int:
        """Recent tokens that a query sees at ``length`` tokens."""
        return self.window

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with local heads.

        Raises:
            ValueError: A layer or head does not exist or cannot skip keys, or the policy has no
                meaning with an earlier one.
        """
        table = begin(self, table)
        check_layers_exist(self, "layers", self.layers or (), len(table.rows))
        check_heads_exist(self, "heads", self.heads or (), table.shape.kv_heads)
        if self.layers is None and self.heads is None:
            check_named(self, table)
        field = "layers" if self.heads is None else "heads"
        chosen, before = self._chosen(table), table
        for layer in chosen:
            why = _why_not(table, layer)
            if why:
                raise refused(self, field, f"leave out a layer: {why}", layer)
        if not chosen:
            rule = "find one that may drop keys; the model or Exact leaves none"
            raise refused(self, "layers", rule, self.layers)
        for layer, heads in chosen.items():
            row = table.rows[layer]
            row = tuple(LOCAL if head in heads else old for head, old in enumerate(row))
            table = table.with_row(layer, row)
        _refuse_to_replace(self, field, before, table)
        return table

    def _chosen(self, table: Plan) -> dict[int, set[int]]:
        """The local heads of each layer that has some."""
        if self.heads is not None:
            layers = sorted({layer for layer, _ in self.heads})
            return {at: {head for layer, head in self.heads if layer == at} for at in layers}
        free = free_layers(table, ()) if self.layers is None else self.layers
        return {layer: set(range(table.shape.kv_heads[layer])) for layer in free}


def _refuse_to_replace(policy: LocalAttention, field: str, before: Plan, after: Plan) -> None:
    """Raise if an earlier policy for prompts loses a layer that it names, or its last one."""
    for earlier in before.policies:
        had, left = earlier.prefill_layers(before), earlier.prefill_layers(after)
        lost = sorted(set(had) - set(left))
        if lost and (not left or getattr(earlier, "layers", None) is not None):
            rule = f"leave out a layer: {type(earlier).__name__} reads blocks of its prompts"
            raise refused(policy, field, rule, lost[0])


def _why_not(table: Plan, layer: int) -> str | None:
    """Why no head of the layer may be local; None if one may."""
    row = table.rows[layer]
    if SELECT in row:
        return "it selects keys for later layers"
    if WINDOW in row or RAZOR in row:
        return "some of its heads keep another window"
    return why_fixed(table, layer)
