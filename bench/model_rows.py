"""Rows of bench.models: what is fed, how results are compared, how a row prints."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from torch import Tensor

import adaptive

POLICIES: dict[str, tuple[adaptive.Policy, ...]] = {
    "TidalDecode": (adaptive.TidalDecode(budget=2048, min_context=1, audit_every=None),),
    "Quest": (adaptive.Quest(budget=2048, min_context=1, audit_every=None),),
    "StreamingLLM": (adaptive.StreamingLLM(window=2044, sinks=4),),
}
"""Variants that skip keys, with 2048 of them a step; their results are not those of the others."""


def token_at(number: int, vocabulary: int) -> int:
    """The token fed at a step: the same for all variants, so that their caches stay equal."""
    return (7919 * (number + 1)) % vocabulary


def agreement(seen: Sequence[Tensor], baseline: Sequence[Tensor]) -> dict[str, float | int]:
    """Largest logit difference from the baseline, and how often the best token is the same."""
    pairs = list(zip(seen, baseline, strict=False))
    return {
        "max_logit_difference": max(float((a.float() - b.float()).abs().max()) for a, b in pairs),
        "argmax_agreement": sum(bool(a.argmax() == b.argmax()) for a, b in pairs) / len(pairs),
        "steps_compared": len(pairs),
    }


def print_row(console: Console, row: dict[str, Any]) -> None:
    """One line per variant, the error beside the speed."""
    console.print(
        f"\n{row['model']} {row['dtype']} context={row['context']} batch={row['batch']} "
        f"threads={row['threads']}"
        f" KV {row['kv_bytes'] / 2**20:.0f} MiB",
        style="bold",
    )
    for name, v in row["variants"].items():
        console.print(
            f"  {name:18} {v['ms']:9.1f} ms/token (min {v['ms_min']:.1f}) "
            f"{v['tokens_per_s']:6.2f} tokens/s  logit error {v['error']:.1e} "
            f"against {row['error_against']}, same best token {v['argmax_agreement']:.0%} of "
            f"{v['steps_compared']} ({v['clean']} clean, {v['dropped']} dropped)",
            highlight=False,
            soft_wrap=True,
        )
        if "attention_ms" in v:
            console.print(f"  {'':18} of it {v['attention_ms']:.1f} ms attention", highlight=False)
    for name, ratios in row["policy_speedup"].items():
        text = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in ratios.items())
        console.print(f"  {name} is {text}", highlight=False)
    for stock, ratio in row["speedup_over"].items():
        console.print(f"  patched is {ratio:.2f}x {stock}", highlight=False)
