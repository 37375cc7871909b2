"""temporary stub, never committed"""

from dataclasses import dataclass, replace

from adaptive.policy._policy import Policy


@dataclass(frozen=True, kw_only=True)
class TidalDecode(Policy):
    budget: int | float = 1024
    mass: float | None = None
    select_layers: tuple | None = None
    dense_layers: tuple = (0, 1)
    sinks: int = 4
    recent: int = 64
    group: str = "sum"
    shared: bool = False
    min_context: int = 8192
    compensate: bool = False
    correct_every: int | None = None
    audit_every: int | None = 64
    min_mass: float | None = None

    def tokens(self, length):
        return max(
            int(self.budget if self.budget > 1 else self.budget * length),
            self.sinks + self.recent + 1,
        )

    def plan(self, table):
        sel = self.select_layers or (2,)
        for i in range(len(table.rows)):
            table = table.with_layer(
                i, "select" if i in sel else "dense" if i < min(sel) else "reuse"
            )
        return table


@dataclass(frozen=True, kw_only=True)
class Quest(Policy):
    budget: int = 1024
    page_size: int = 16
    dense_layers: tuple = (0, 1)
    sinks: int = 4
    recent: int = 64
    min_context: int = 8192
    audit_every: int | None = 64

    def tokens(self, length):
        return int(self.budget if self.budget > 1 else self.budget * length)

    def plan(self, table):
        for i in range(len(table.rows)):
            table = table.with_layer(i, "dense" if i in self.dense_layers else "pages")
        return table


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    sinks: int = 4
    window: int = 1024
    layers: tuple | None = None

    def window_tokens(self, length):
        return self.window

    def plan(self, table):
        for i in range(len(table.rows)):
            table = table.with_layer(i, "window")
        return table


@dataclass(frozen=True, kw_only=True)
class RazorAttention(Policy):
    heads: tuple | None = None
    sinks: int = 4
    window: int = 1024
    compensation: bool = True
    dense_layers: tuple = (0, 1)

    def window_tokens(self, length):
        return self.window

    def plan(self, table):
        rows = list(table.rows)
        for i, r in enumerate(rows):
            if i in self.dense_layers or r[0] == "select":
                rows[i] = tuple(m if m != "stock" else "dense" for m in r)
                continue
            rows[i] = tuple(
                (m if m != "stock" else "dense") if (i, h) in self.heads else "razor"
                for h, m in enumerate(r)
            )
        return replace(table, rows=tuple(rows))
