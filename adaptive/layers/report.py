"""What a patched model did, as data and as a table that a person reads."""

from __future__ import annotations

import copy
import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adaptive.layers.encoder_exit_log import EncoderExitLog
from adaptive.layers.exit_log import ExitLog
from adaptive.layers.expert_log import ExpertLog
from adaptive.layers.expert_weights import held_log
from adaptive.layers.head_log import HeadLog
from adaptive.layers.refill_log import RefillLog
from adaptive.layers.report_rows import PERCENTILES, groups, scores, skipped, skips
from adaptive.layers.routing_log import RoutingLog
from adaptive.layers.sparse_ffn import SparseFfnLog, held_bytes
from adaptive.layers.speculation_log import SpeculationLog
from adaptive.layers.state import LayerState, PatchRecord
from adaptive.layers.token_reduction_log import TokenReductionLog, copy_of
from adaptive.layers.units import in_bytes
from adaptive.layers.width_log import WidthLog

_ENCODER_LOGS = ("encoder_exit", "token_merging", "token_pruning")
_FFN_LOGS = ("widths", "sparse_ffn", "experts")
_LOGS = ("speculation", "exits", *_ENCODER_LOGS, "routing", *_FFN_LOGS, "heads", "refill")
WIDTH = 100
"""Columns that the printed table fits in."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What one layer did; the counters of `LayerState`.

    Where keys were skipped, ``mass_*`` tell the share of the softmax mass that the keys read had,
    over all measured queries and query heads: on every call of a layer that selects, on audited
    calls elsewhere. The output of a query with mass m is within ``2 (1 - m) max|v|`` of the dense.
    None: nothing was measured. ``mass_of_heads`` has the least and the mean of each query head.

    ``scores`` counts the pairs of query and key, per head, that native calls on many query tokens
    computed, ``dense_scores`` those of dense attention on the same tokens: causal in a decoder.
    """

    layer: int
    name: str
    mode: str
    native_calls: int
    torch_calls: int
    stock_calls: dict[str, int]
    query_tokens: int
    kv_tokens: int
    kv_bytes: int
    held_bytes: int
    used_bytes: int
    cache: str
    seconds: float
    paths: dict[str, int]
    dense_bytes: int
    scores: int
    dense_scores: int
    dropped_bytes: int
    mass_measured: int
    mass_mean: float | None
    mass_of_heads: tuple[tuple[float, float] | None, ...]
    mass_min: float | None
    mass_p01: float | None
    mass_p10: float | None
    mass_p50: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a patched model did since the counters were reset.

    ``str()`` is a table of 100 columns; ``to_dict()`` is JSON. Rich prints it in colour.

    Attributes:
        model: Class of the model.
        family: Its family.
        policies: The policies in force.
        exact: Whether all of them compute the same mathematics as the stock model.
        plan: The plan, as a map.
        layers: In execution order.
        forward_calls: Passes of the model.
        forward_seconds: Time in them; None where it was not measured, as on CUDA.
        native_calls: Calls of each native kernel in this process meanwhile, counted by the native
            module itself: the proof that they ran.
        notes: What else happened, and how often.
        speculation: What self-speculation did; None without it.
        exits: What early exit did; None without it.
        encoder_exit: After how many layers sequences left an encoder; None where they may not.
        routing: How much of which layer ran; None where no policy routes.
        widths: How much of which FFN tokens used, and how far off; None where no policy narrows.
        sparse_ffn: Neurons computed where the model leaves most at 0; None where it does not.
        token_merging: How many tokens of an encoder were left; None where none merge.
        token_pruning: The same of pruning.
        refill: How full batches of `generate_many` were; None without a call of it.
        experts: What the experts of FFNs did; None where no policy splits FFNs.
        heads: How many heads tokens ran, and how far off; None where no policy routes heads.
    """

    model: str
    family: str
    policies: tuple[str, ...]
    exact: bool
    plan: str
    layers: tuple[LayerReport, ...]
    forward_calls: int
    forward_seconds: float | None
    native_calls: dict[str, int]
    notes: dict[str, int]
    speculation: SpeculationLog | None = None
    exits: ExitLog | None = None
    encoder_exit: EncoderExitLog | None = None
    routing: RoutingLog | None = None
    widths: WidthLog | None = None
    sparse_ffn: SparseFfnLog | None = None
    token_merging: TokenReductionLog | None = None
    token_pruning: TokenReductionLog | None = None
    refill: RefillLog | None = None
    experts: ExpertLog | None = None
    heads: HeadLog | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = asdict(self)
        for name in _LOGS:
            log = getattr(self, name)
            values[name] = None if log is None else log.to_dict()
        return {**values, "policies": list(self.policies), "layers": list(values["layers"])}

    def __str__(self) -> str:
        """Return the table as plain text."""
        console = Console(width=WIDTH, file=io.StringIO(), color_system=None)
        console.print(self.__rich__())
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.rstrip().splitlines())

    def __rich__(self) -> Table:
        """Return the table, layers that did the same in one row."""
        exact = "exact" if self.exact else "approximate"
        title = f"{self.model} ({self.family}), {exact}: {', '.join(self.policies)}"
        table = Table(title=title, title_justify="left", caption=self._caption(), box=SIMPLE_HEAD)
        table.caption_justify = "left"
        skipping = any(skips(layer) for layer in self.layers)
        headings = ["layers", "native", "stock, why", "queries", "KV read", "KV held", "time"]
        if skipping:
            headings += ["of dense", "mass min", "mean"]
        local = not skipping and any(layer.scores < layer.dense_scores for layer in self.layers)
        if local:
            headings += ["scores"]
        for heading in headings:
            left = heading in ("layers", "stock, why")
            table.add_column(heading, justify="left" if left else "right")
        for group in groups(self.layers):
            one = group[0]
            first, last = one.layer, group[-1].layer
            why = ", ".join(f"{count} {reason}" for reason, count in one.stock_calls.items())
            spared = f" + {one.torch_calls} torch" if one.torch_calls else ""
            table.add_row(
                str(first) if first == last else f"{first}-{last}",
                str(one.native_calls) + spared,
                why or "-",
                str(one.query_tokens),
                in_bytes(sum(layer.kv_bytes for layer in group)),
                in_bytes(sum(layer.held_bytes for layer in group)),
                self._share(sum(layer.seconds for layer in group)),
                *(skipped(group) if skipping else ()),
                *((scores(group),) if local else ()),
            )
        return table

    def _share(self, seconds: float) -> str:
        return f"{seconds / self.forward_seconds:.0%}" if self.forward_seconds else "-"

    def _caption(self) -> str:
        kernels = ", ".join(f"{name} x{n}" for name, n in self.native_calls.items()) or "none"
        lines = [f"{self.forward_calls} passes; native kernels run: {kernels}"]
        if caches := {layer.cache for layer in self.layers if layer.cache}:
            lines.append(f"cache: {', '.join(sorted(caches))}")
        paths: dict[str, int] = {}
        for layer in self.layers:
            for path, count in layer.paths.items():
                paths[path] = paths.get(path, 0) + count
        if paths:
            lines.append("calls: " + ", ".join(f"{n} {path}" for path, n in sorted(paths.items())))
        if dropped := sum(layer.dropped_bytes for layer in self.layers):
            lines.append(f"KV dropped for good: {in_bytes(dropped)}")
        if dense := sum(layer.dense_scores for layer in self.layers):
            computed = sum(layer.scores for layer in self.layers)
            lines.append(f"scores computed in long native calls: {computed / dense:.1%} of dense")
        logs = [getattr(self, name) for name in _LOGS]
        lines += [str(log) for log in logs if log is not None]
        lines += [f"{count} x {note}" for note, count in self.notes.items()]
        return "\n".join(lines)


def report(model: str, record: PatchRecord, native_calls: dict[str, int]) -> Report:
    """Make the report of one patched model.

    Args:
        model: Class of the model.
        record: What patch() left in it.
        native_calls: What `adaptive._native.calls()` says now.
    """
    start = record.native_start
    return Report(
        model=model,
        family=record.family,
        policies=tuple(str(policy) for policy in record.policies),
        exact=all(policy.exact for policy in record.policies),
        plan=str(record.plan),
        layers=tuple(_layer(state) for state in record.states),
        forward_calls=record.forward_calls,
        forward_seconds=record.forward_seconds if record.timed and record.forward_calls else None,
        native_calls={
            n: c - start.get(n, 0) for n, c in native_calls.items() if c > start.get(n, 0)
        },
        notes=dict(record.notes),
        speculation=copy.deepcopy(record.speculation),
        exits=copy.deepcopy(record.exits),
        encoder_exit=copy.deepcopy(record.encoder_exit_log),
        routing=copy.deepcopy(record.routing_log),
        widths=copy.deepcopy(record.switch.widths),
        sparse_ffn=held_bytes(record.switch.sparse_ffn, record.log),
        token_merging=copy_of(record.token_reduction_log, "merge"),
        token_pruning=copy_of(record.token_reduction_log, "prune"),
        refill=copy.copy(record.switch.refill),
        experts=held_log(record.switch.experts, record.log),
        heads=record.switch.heads and record.switch.heads.copy(),
    )


def _layer(state: LayerState) -> LayerReport:
    tokens, read_bytes = state.gathered.totals()
    values = state.mass.values()
    marks: list[float | None] = [None] * len(PERCENTILES)
    marks = [*(state.mass.percentiles(tuple(PERCENTILES.values())) or marks)]
    heads = state.mass.heads()
    return LayerReport(
        **dict(zip(PERCENTILES, marks, strict=True)),
        mass_measured=0 if values is None else len(values),
        mass_mean=None if values is None else float(values.nanmean()),
        mass_of_heads=tuple(heads),
        paths=dict(state.paths),
        dense_bytes=state.dense_bytes,
        scores=state.scores,
        dense_scores=state.dense_scores,
        dropped_bytes=state.dropped_bytes,
        layer=state.site.layer,
        name=state.site.name,
        mode=", ".join(sorted({*state.row, *(state.prefill.modes if state.prefill else ())})),
        native_calls=state.native_calls,
        torch_calls=state.torch_calls,
        stock_calls=dict(state.stock_calls),
        query_tokens=state.query_tokens,
        kv_tokens=state.kv_tokens + tokens // max(state.site.kv_heads, 1),
        kv_bytes=state.kv_bytes + read_bytes,
        held_bytes=state.held_bytes,
        used_bytes=state.used_bytes,
        cache=state.cache,
        seconds=state.seconds,
    )
