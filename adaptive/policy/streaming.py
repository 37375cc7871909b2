"""StreamingLLM: the first and the last tokens, and nothing between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._compose import begin, check_named, free_layers, why_fixed
from adaptive.policy._fields import check_count, check_layers_exist, refused, set_layers
from adaptive.policy._policy import Policy
from adaptive.policy.plan import LOCAL, SELECT, WINDOW, Plan


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Every head keeps some first tokens and a window of recent ones; the rest is dropped for good.

    After Xiao et al. 2023 (arXiv:2309.17453). Positions stay those of the text. The baseline that
    others are measured against: what lies outside the window is forgotten.

    Attributes:
        sinks: First tokens that are kept.
        window: Last tokens that are kept.
        layers: Layers that do so, ascending; None: all. Needed beside a policy that chooses keys.
    """

    modes: ClassVar[tuple[str, ...]] = (WINDOW,)

    sinks: int = 4
    window: int = 1024
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count(self, "sinks", 0)
        check_count(self, "window", 1)
        set_layers(self, "layers", optional=True)
        if self.layers == ():
            raise refused(self, "layers", "name a layer, or be None", ())

    def window_tokens(self, length: int) -> int:
        """Recent tokens kept at ``length`` tokens."""
        return self.window

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with windows for all heads of the layers.

        Raises:
            ValueError: A layer does not exist or cannot skip keys, or the policy has no meaning
                with an earlier one.
        """
        table = begin(self, table)
        check_layers_exist(self, "layers", self.layers or (), len(table.rows))
        if self.layers is None:
            check_named(self, table)
        for layer in self.layers or ():
            why = why_fixed(table, layer)
            if SELECT in table.rows[layer]:
                why = "it selects keys for later layers"
            if LOCAL in table.rows[layer]:
                why = "LocalAttention gives its heads another window"
            if why:
                raise refused(self, "layers", f"leave out a layer: {why}", layer)
        free = free_layers(table, ())
        if not free:
            rule = "find one that may drop keys; the model or Exact leaves none"
            raise refused(self, "layers", rule, self.layers)
        for layer in free if self.layers is None else self.layers:
            table = table.with_layer(layer, WINDOW)
        return table
