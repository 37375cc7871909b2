"""What skipped keys cost: the share of the softmax mass that was kept, and the bytes not read.

At a query with log-sum-exp ``full`` over all keys and ``kept`` over the keys that were read, the
retained mass is ``m = exp(kept - full)``. The output is then within ``2 (1 - m) max|v|`` of the
dense one in every coordinate: it is ``m`` times an average over the kept keys plus ``1 - m`` times
one over the dropped, and both averages lie within ``max|v|``.

Both logs take tensors as they come and read them when someone asks, so that counting never waits
for a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SETTLE_AFTER = 256
"""Steps after which tensors that were only kept are summed up or moved to the CPU."""

MOST_STEPS = 65536
"""Steps whose masses are kept; of more, every other one."""


def retained_mass(kept: Tensor, full: Tensor) -> Tensor:
    """Share of the softmax mass that the kept keys have.

    Args:
        kept: Log-sum-exp over the kept keys, any shape, float32.
        full: Log-sum-exp over all keys, the same shape.

    Returns:
        ``exp(kept - full)``, at most 1; 1 where there is no key at all.
    """
    mass = torch.exp(kept - full).clamp(max=1.0)
    return torch.where(full == -torch.inf, torch.ones_like(mass), mass)


def error_bound(mass: Tensor | float, largest_value: Tensor | float) -> Tensor | float:
    """Most that any coordinate of an attention output can differ from the dense one.

    Args:
        mass: Retained mass, 0..1.
        largest_value: Largest absolute coordinate of the values.
    """
    return 2 * (1 - mass) * largest_value


class MassLog:
    """Retained masses of one layer, one row of query heads per measured query."""

    def __init__(self) -> None:
        """Start with no measurement."""
        self._new: list[Tensor] = []
        self._old: Tensor | None = None

    def add(self, mass: Tensor) -> None:
        """Keep one measurement.

        Args:
            mass: ``[batch, heads, query_tokens]``; NaN for heads that were not measured, and for
                all heads of a query that was not.
        """
        if torch.compiler.is_compiling():
            return
        self._new.append(mass)
        if len(self._new) >= SETTLE_AFTER:
            self.values()

    def values(self) -> Tensor | None:
        """All measurements, ``[queries, heads]`` on the CPU; None if there are none."""
        if self._new:
            rows = [mass.transpose(1, 2).flatten(0, 1).float().cpu() for mass in self._new]
            self._new = []
            found = torch.cat(rows if self._old is None else [self._old, *rows])
            self._old = found[~found.isnan().all(1)]
            if len(self._old) > MOST_STEPS:
                self._old = self._old[::2].clone()
        return None if self._old is None or not len(self._old) else self._old

    def percentiles(self, shares: Sequence[float]) -> list[float] | None:
        """Masses below which these shares of all measurements lie; None if there are none."""
        values = self.values()
        if values is None:
            return None
        flat = values[~values.isnan()].sort().values
        return [float(flat[round(share * (len(flat) - 1))]) for share in shares]

    def heads(self) -> list[tuple[float, float] | None]:
        """Least and mean mass of each query head; None for one that was not measured."""
        values = self.values()
        found: list[tuple[float, float] | None] = []
        for head in () if values is None else values.unbind(1):
            measured = head[~head.isnan()]
            one = (float(measured.min()), float(measured.mean())) if len(measured) else None
            found.append(one)
        return found


class ReadLog:
    """Keys that were read in calls that skip some, where only a tensor knows how many."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self._new: list[tuple[Tensor, int, int]] = []
        self._tokens = 0
        self._bytes = 0

    def add(self, counts: Tensor, tokens_each: int, bytes_each: int) -> None:
        """Keep one call.

        Args:
            counts: Tokens or pages read, ``[batch, kv_heads]``.
            tokens_each: Tokens in one of them.
            bytes_each: Bytes of the key and value of one token of one head.
        """
        if torch.compiler.is_compiling():
            return
        self._new.append((counts, tokens_each, bytes_each))
        if len(self._new) >= SETTLE_AFTER:
            self.totals()

    def totals(self) -> tuple[int, int]:
        """Tokens so far, summed over rows and KV heads, and bytes so far."""
        for counts, tokens_each, bytes_each in self._new:
            tokens = int(counts.sum()) * tokens_each
            self._tokens += tokens
            self._bytes += tokens * bytes_each
        self._new = []
        return self._tokens, self._bytes
