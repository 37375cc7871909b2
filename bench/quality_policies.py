"""The policies that bench.quality compares, each at every budget that makes sense for it."""

from collections.abc import Sequence
from typing import Any

import adaptive

BUDGETS = (64, 128, 256, 512, 1024)
SINKS, RECENT = 4, 16


def policies(model: Any, budgets: Sequence[int]) -> dict[str, tuple[Any, ...]]:
    """Policies by "NAME K=BUDGET"; the budget of a window is the window.

    Args:
        model: Calibrated where a policy wants that: on random tokens, as a user without data would.
        budgets: Keys per step and KV head.
    """
    razor = adaptive.RazorAttention(dense_layers=(), window=RECENT, sinks=SINKS)
    heads = adaptive.calibrate(model, razor, progress=False).policies[0].heads
    tidal = adaptive.TidalDecode(min_context=1, dense_layers=(0, 1), sinks=SINKS, recent=RECENT)
    layers = adaptive.calibrate(model, tidal, progress=False).policies[0].select_layers
    found: dict[str, tuple[Any, ...]] = {}
    for budget in budgets:
        common = {"budget": budget, "sinks": SINKS, "recent": RECENT, "min_context": 1}
        kept = adaptive.RazorAttention(
            heads=heads, dense_layers=(), window=budget - SINKS, sinks=SINKS
        )
        found |= {
            f"TidalDecode K={budget}": (adaptive.TidalDecode(**common),),
            f"TidalDecode, calibrated K={budget}": (
                adaptive.TidalDecode(**common, select_layers=layers),
            ),
            f"TidalDecode x RazorAttention K={budget}": (
                adaptive.TidalDecode(**common, select_layers=layers),
                kept,
            ),
            f"RazorAttention K={budget}": (kept,),
            f"Quest K={budget}": (adaptive.Quest(**common),),
            f"StreamingLLM K={budget}": (
                adaptive.StreamingLLM(window=budget - SINKS, sinks=SINKS),
            ),
        }
    return found
