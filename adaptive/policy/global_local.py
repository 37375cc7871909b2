"""GlobalLocalAttention: near tokens on both sides, and a few global tokens, for encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._compose import begin, free_layers, why_fixed
from adaptive.policy._fields import check_count, check_layers_exist, refused, set_layers
from adaptive.policy._policy import Policy
from adaptive.policy.plan import GLOBAL_LOCAL, Plan


@dataclass(frozen=True, kw_only=True)
class GlobalLocalAttention(Policy):
    """Each token of an encoder attends to near tokens and to global ones; those attend to all.

    The pattern of Longformer (Beltagy et al. 2020, arXiv:2004.05150) and of BigBird without its
    random blocks (Zaheer et al. 2020, arXiv:2007.14062), by the name that ETC gave it, global-local
    attention (Ainslie et al. 2020, arXiv:2004.08483). No new weights: global tokens use the same
    projections as the others, as in ETC and BigBird.

    Attributes:
        window: Tokens less than this away are seen, on both sides; at least 1. Images are read row
            by row, so ``rows * grid_width`` sees that many rows of patches up and down.
        globals: First tokens of each sequence, without padding, that all see and that see all:
            class token, distillation token, registers.
        layers: Layers that do so, ascending; None: all but those that have a window of their own.
        audit_every: On every n-th call of a layer measure, for up to 16 of its tokens, the softmax
            mass that they kept; None: never.
    """

    modes: ClassVar[tuple[str, ...]] = (GLOBAL_LOCAL,)

    window: int
    globals: int = 1
    layers: tuple[int, ...] | None = None
    audit_every: int | None = 16

    def __post_init__(self) -> None:
        check_count(self, "window", 1)
        check_count(self, "globals", 0)
        set_layers(self, "layers", optional=True)
        if self.layers == ():
            raise refused(self, "layers", "name a layer, or be None", ())
        check_count(self, "audit_every", 1, optional=True)

    def pairs(self, tokens: int) -> int:
        """Pairs of query and key that are computed, per head, in a sequence of ``tokens``."""
        return pairs_seen(tokens, self.window, self.globals)

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with global and local attention in the layers.

        Raises:
            ValueError: A layer does not exist or cannot skip keys, or the policy has no meaning
                with an earlier one.
        """
        table = begin(self, table)
        check_layers_exist(self, "layers", self.layers or (), len(table.rows))
        for layer in self.layers or ():
            why = why_fixed(table, layer)
            if why:
                raise refused(self, "layers", f"leave out a layer: {why}", layer)
        free = free_layers(table, ())
        if not free:
            rule = "find one that may skip keys; the model or Exact leaves none"
            raise refused(self, "layers", rule, self.layers)
        for layer in free if self.layers is None else self.layers:
            table = table.with_layer(layer, GLOBAL_LOCAL)
        return table


def pairs_seen(tokens: int, window: int | None, first: int = 0) -> int:
    """Pairs of query and key of one sequence that are near each other or have a global member.

    Args:
        tokens: Of the sequence.
        window: Pairs less than this apart are near; None: all.
        first: Tokens at its start that are global.
    """
    reach = max(tokens - 1, 0) if window is None else min(window - 1, max(tokens - 1, 0))
    near = tokens + 2 * (reach * tokens - reach * (reach + 1) // 2)
    # Token i of the global ones has tokens - 1 - reach - i later ones that are too far to be near.
    far = tokens - 1 - reach
    counted = max(min(first, far), 0)
    return near + 2 * (counted * far - counted * (counted - 1) // 2)
