"""What the demonstration found: a table to read, JSON to keep, a chart to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

MIB = 2**20


@dataclass(frozen=True)
class Variant:
    """The numbers of stock or patched: medians of times over the rounds.

    Attributes:
        prefill_s: Seconds to read the document and say the first token.
        token_ms: Milliseconds of each later token.
        kv_bytes_per_token: Bytes of keys and values of one token, all layers.
        kv_held_bytes: Bytes the cache has allocated at the end.
        peak_bytes: Peak memory of decoding above the loaded model; None where not measurable.
        max_error: Largest error of a logit against the model in float64.
        said: The beginning of the generated text.
        needle_found: Whether it begins with the planted key.
    """

    prefill_s: float
    token_ms: float
    kv_bytes_per_token: float
    kv_held_bytes: int
    peak_bytes: int | None
    max_error: float
    said: str
    needle_found: bool


@dataclass(frozen=True)
class Point:
    """Milliseconds per token of both variants at one context length in tokens."""

    tokens: int
    stock_ms: float
    patched_ms: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything the demonstration found."""

    model: str
    parameters: int
    dtype: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    key: str
    excerpt: str
    variants: dict[str, Variant]
    token_agreement: float
    max_logit_difference: float
    points: list[Point]
    report: Any
    out: Path

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, and write the chart."""
        chart = self._chart()
        values = {k: v for k, v in vars(self).items() if k not in ("report", "out")}
        values["variants"] = {name: asdict(v) for name, v in self.variants.items()}
        values["points"] = [asdict(p) for p in self.points]
        values["report"] = self.report.to_dict()
        values["chart"] = str(chart) if chart else None
        return values

    def show(self, console: Console) -> None:
        """Print the document, the answers, the table and the report; write the chart."""
        text = Text(f"...{self.excerpt}...")
        text.highlight_words([self.key], "bold black on yellow")
        title = f"a real document of {self.prompt_tokens} tokens, with one sentence planted in it"
        console.print(Panel(text, title=title, border_style="dim"))
        console.print(
            f"[bold]Stock against patched[/]: {self.parameters / 1e6:.1f} million parameters, "
            f"{self.dtype}, {self.threads} thread{'s' if self.threads != 1 else ''}, "
            f"{self.new_tokens} tokens generated after {self.prompt_tokens}",
            highlight=False,
        )
        console.print(self._table())
        console.print("\n[bold]What the patched model ran[/]")
        console.print(str(self.report), markup=False, highlight=False)
        chart = self._chart()
        if chart:
            console.print(f"chart: [bold]{escape(str(chart))}[/]", highlight=False)
        else:
            console.print("no chart: pip install 'adaptive[demo]' brings matplotlib", markup=False)

    def _table(self) -> Table:
        stock, patched = self.variants["stock"], self.variants["patched"]
        table = Table()
        table.add_column("")
        for name in ("stock", "patched", "gain"):
            table.add_column(name, justify="right")
        for label, a, b, form, gain in self._rows(stock, patched):
            table.add_row(label, form(a), form(b), gain)
        table.add_section()
        count = round(self.token_agreement * self.new_tokens)
        table.add_row("tokens equal to stock", "", f"{count} of {self.new_tokens}", "")
        table.add_row("largest logit difference", "", f"{self.max_logit_difference:.1e}", "")
        table.add_row(
            "largest logit error (float64)",
            f"{stock.max_error:.1e}",
            f"{patched.max_error:.1e}",
            "",
        )
        found = [f"{v.said.strip()[:5]} {'found' if v.needle_found else 'MISSED'}"
                 for v in (stock, patched)]  # fmt: skip
        table.add_row(f"needle {self.key}", *map(Text, found), "")
        return table

    def _rows(self, stock: Variant, patched: Variant) -> list[tuple[Any, ...]]:
        """Return label, both values, their format and the gain of every measured row."""

        def mib(value: int | None) -> str:
            return "not measurable here" if value is None else f"{value / MIB:.1f}"

        def gain(a: float | None, b: float | None) -> str:
            return f"{a / b:.2f}x" if a and b else ""

        rows: list[tuple[Any, ...]] = [
            ("prefill, s", stock.prefill_s, patched.prefill_s, "{:.2f}".format),
            ("decode, ms per token", stock.token_ms, patched.token_ms, "{:.2f}".format),
            ("KV bytes per token", stock.kv_bytes_per_token, patched.kv_bytes_per_token,
             "{:,.0f}".format),
            ("KV cache held, MiB", stock.kv_held_bytes, patched.kv_held_bytes, mib),
            ("peak memory of decoding, MiB", stock.peak_bytes, patched.peak_bytes, mib),
        ]  # fmt: skip
        out = [(*row, gain(row[1], row[2])) for row in rows]
        rates = (1e3 / stock.token_ms, 1e3 / patched.token_ms)
        out.insert(2, ("decode, tokens per s", *rates, "{:.1f}".format, gain(rates[1], rates[0])))
        return out

    def _chart(self) -> Path | None:
        """Write the chart and return its path, or None without matplotlib."""
        try:
            from adaptive.demo._chart import write
        except ImportError:
            return None
        self.out.mkdir(parents=True, exist_ok=True)
        return write(self, self.out / "stock_against_patched.png")
