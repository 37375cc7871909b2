"""Exact acceleration: the same mathematics, read from the cache in place."""

from dataclasses import dataclass
from typing import ClassVar

from adaptive.policy._policy import Policy
from adaptive.policy.plan import DENSE, Plan


@dataclass(frozen=True, kw_only=True)
class Exact(Policy):
    """Every head reads every key, through the native decode kernel. What patch() does by default.

    Attributes:
        stock_layers: Layers that keep the model's own attention, ascending, counted from 0.
    """

    exact: ClassVar[bool] = True
    stock_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        layers = self.stock_layers
        whole = isinstance(layers, tuple) and all(type(index) is int for index in layers)
        if not whole or list(layers) != sorted(set(layers)) or any(index < 0 for index in layers):
            raise ValueError(
                f"Exact: stock_layers must be ascending layer numbers from 0, got {layers!r}"
            )

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with every layer dense but the stock ones."""
        layers = len(table.rows)
        undone = [type(policy).__name__ for policy in table.policies if policy.modes]
        if undone:
            raise ValueError(
                f"adaptive: Exact must come before {undone[0]}, whose layers it would make dense"
            )
        if self.stock_layers and self.stock_layers[-1] >= layers:
            raise ValueError(
                f"Exact: stock_layers must be below the model's {layers} layers, "
                f"got {self.stock_layers[-1]}"
            )
        for index in range(layers):
            if index not in self.stock_layers:
                table = table.with_layer(index, DENSE)
        return table
