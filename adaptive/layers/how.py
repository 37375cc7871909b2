"""What the rows of a plan mean for the layers that run them, resolved once per patch."""

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive.layers.state import PatchRecord
from adaptive.policy import (
    LocalAttention,
    Policy,
    Quest,
    RazorAttention,
    StreamingLLM,
    TidalDecode,
)
from adaptive.policy.plan import DENSE, LOCAL, PAGES, RAZOR, STOCK, WINDOWED


@dataclass(frozen=True)
class How:
    """What a row of the plan means for one layer, resolved once.

    Attributes:
        mode: Of the heads that keep every key: DENSE, SELECT, REUSE or PAGES.
        policy: The TidalDecode or Quest behind ``mode``; None for DENSE.
        window: The policy of the heads that keep a window; None if there are none.
        whole: KV heads that keep every key.
        windowed: The others.
        compensation: Whether one token stands for what the others dropped.
        local: Whether the others see no more than their window in prompts, either.
    """

    mode: str
    policy: TidalDecode | Quest | None
    window: LocalAttention | RazorAttention | StreamingLLM | None
    whole: tuple[int, ...]
    windowed: tuple[int, ...]
    compensation: bool
    local: bool


def resolve(row: Sequence[str], policies: Sequence[Policy]) -> How | None:
    """What a row of the plan means; None if no head of it skips anything.

    Raises:
        ValueError: No policy has the numbers that a mode of the row needs.
    """
    if set(row) <= {DENSE, STOCK}:
        return None
    windowed = tuple(head for head, mode in enumerate(row) if mode in WINDOWED)
    whole = tuple(head for head in range(len(row)) if head not in windowed)
    mode = row[whole[0]] if whole else DENSE
    kind = Quest if mode == PAGES else TidalDecode
    policy = next((p for p in policies if isinstance(p, kind)), None) if mode != DENSE else None
    local = LOCAL in row
    keeps = (LocalAttention,) if local else (RazorAttention, StreamingLLM)
    window = next((p for p in policies if isinstance(p, keeps)), None)
    for need, found, kinds in (
        (mode != DENSE, policy, kind.__name__),
        (bool(windowed), window, " or ".join(kept.__name__ for kept in keeps)),
    ):
        if need and found is None:
            given = ", ".join(type(p).__name__ for p in policies)
            raise ValueError(
                f"adaptive: policies must have a {kinds}, or a class derived from it, to run "
                f"{', '.join(sorted(set(row)))}, got {given}"
            )
    return How(
        mode=mode,
        policy=policy,
        window=window if windowed else None,
        whole=whole,
        windowed=windowed,
        compensation=RAZOR in row,
        local=local,
    )


def set_up(record: PatchRecord) -> None:
    """Tell every layer how to run its row of the plan."""
    for state in record.states:
        state.how = resolve(state.row, record.policies)
        state.prefill = record.plan.prefill(state.site.layer)
    every = (getattr(policy, "correct_every", None) for policy in record.policies)
    record.correct_every = next(filter(None, every), None)
    record.eager_only = _eager_only(record)


def _eager_only(record: PatchRecord) -> str:
    hows: list[How] = [state.how for state in record.states if state.how is not None]
    if any(how.windowed for how in hows):
        return "layers whose heads drop keys"
    if any(how.mode == PAGES for how in hows):
        return "selection of pages"
    if any(getattr(how.policy, "compensate", False) for how in hows):
        return "TidalDecode(compensate=True)"
    return "TidalDecode(correct_every=...)" if record.correct_every else ""
