"""How policies that skip keys build on what earlier policies decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptive.policy._fields import refused
from adaptive.policy._policy import Policy
from adaptive.policy.exact import Exact
from adaptive.policy.plan import DENSE, LOCAL, PREFILL, SELECT, STOCK, WINDOW, WINDOWED, Plan

_WHY = {
    frozenset({"EarlyExit", "SelfSpeculative"}): "both decode by passes of their own",
    frozenset({"EarlyExit", "MixtureOfDepths"}): "both choose the layers that a token runs",
    frozenset({"HeadRouting", "MixtureOfDepths"}): "both decide what of a layer a token runs",
    frozenset({"HeadRouting", "SelfSpeculative"}): "attention sees drafts as trees, head by head",
    frozenset({"MixtureOfDepths", "SelfSpeculative"}): "both choose the layers that a token runs",
    frozenset({"MixtureOfDepths", "TokenRouting"}): "both decide what of an FFN runs",
    frozenset({"EncoderExit", "TokenMerging"}): "both decide what states a layer gets",
    frozenset({"FeedForwardExperts", "MixtureOfDepths"}): "both decide what of an FFN runs",
    frozenset({"FeedForwardExperts", "SelfSpeculative"}): "both decide what of an FFN runs",
    frozenset({"FeedForwardExperts", "TokenRouting"}): "both decide what of an FFN runs",
    frozenset({"GlobalLocalAttention", "TokenMerging"}): (
        "a window counts places, and merged tokens have none"
    ),
    frozenset({"EncoderExit", "TokenPruning"}): "both decide what states a layer gets",
    frozenset({"GlobalLocalAttention", "TokenPruning"}): (
        "a window counts places, and tokens that stay move to others"
    ),
    frozenset({"TokenMerging", "TokenPruning"}): "both decide what tokens a layer gets",
    frozenset({"Quest", "TidalDecode"}): "both choose the keys of the same heads",
    frozenset({"RazorAttention", "StreamingLLM"}): "both choose the window of the same heads",
    frozenset({"SelfSpeculative", "TokenRouting"}): "both decide what of an FFN runs",
}


def begin(policy: Policy, table: Plan) -> Plan:
    """Return the table that ``policy`` starts from: whatever was undecided is dense.

    Raises:
        ValueError: An earlier policy and this one have no meaning together.
    """
    ours = type(policy).__name__
    for earlier in table.policies:
        theirs = type(earlier).__name__
        why = _WHY.get(frozenset({ours, theirs}))
        if theirs == ours:
            why = "its fields would contradict each other"
        if why is not None:
            both = f"a second {ours}" if theirs == ours else f"{ours} and {theirs}"
            raise ValueError(f"adaptive: {both} cannot be combined: {why}")
        refuse_correction(policy, earlier)
        refuse_correction(earlier, policy)
        for one, other in ((policy, earlier), (earlier, policy)):
            if one.generates and not other.exact and not set(other.modes) <= set(PREFILL):
                raise ValueError(
                    f"adaptive: {type(one).__name__} and {type(other).__name__} cannot be "
                    "combined: several tokens go through layers in one pass, and some are taken "
                    "back, while the other chooses or drops keys token by token"
                )
            if one.splits_heads and other.modes:
                raise ValueError(
                    f"adaptive: {type(one).__name__} and {type(other).__name__} cannot be "
                    "combined: both decide what heads read"
                )
            if one.routes and not set(other.modes) <= set(PREFILL):
                raise ValueError(
                    f"adaptive: {type(one).__name__} and {type(other).__name__} cannot be "
                    "combined: a routed layer holds keys of some rows or tokens alone, and the "
                    "other chooses or drops keys of all"
                )
    stock = stock_layers(table)
    rows = [
        (DENSE,) * len(row) if set(row) == {STOCK} and layer not in stock else row
        for layer, row in enumerate(table.rows)
    ]
    return replace(table, rows=tuple(rows))


def check_named(policy: Policy, table: Plan) -> None:
    """Raise if a policy would take all layers that an earlier one decides about.

    Those that read nothing of the cache differently, and those for prompts, leave them to it.
    """
    others = [p for p in table.policies if p.modes and not p.prefill_layers(table)]
    if others:
        rule = f"name the layers that {type(others[0]).__name__} shall leave to it"
        raise refused(policy, "layers", rule, None)


def refuse_correction(first: Policy, second: Policy) -> None:
    """Raise if the first corrects cache entries that the second drops for good."""
    drops = WINDOW in second.modes or LOCAL in second.modes
    if drops and getattr(first, "correct_every", None) is not None:
        raise ValueError(
            f"adaptive: {type(first).__name__}.correct_every must be None together with "
            f"{type(second).__name__}, which drops the tokens that a correction reads, "
            f"got {first.correct_every}"  # type: ignore[attr-defined]
        )


def stock_layers(table: Plan) -> set[int]:
    """Layers that an earlier Exact leaves to the model's own attention."""
    exact = [policy for policy in table.policies if isinstance(policy, Exact)]
    return {layer for policy in exact for layer in policy.stock_layers}


def why_fixed(table: Plan, layer: int) -> str | None:
    """Why no policy may skip keys in ``layer``; None if one may."""
    window = table.shape.windows[layer]
    if window is not None:
        return f"the model itself gives that layer a window of {window} tokens"
    if layer in stock_layers(table):
        return "Exact leaves that layer to the model's own attention"
    return None


def free_layers(table: Plan, dense_layers: Sequence[int]) -> list[int]:
    """Layers in which keys may be skipped: not fixed, and not to stay dense."""
    layers = range(len(table.rows))
    return [i for i in layers if i not in dense_layers and why_fixed(table, i) is None]


def with_whole(table: Plan, layer: int, mode: str) -> Plan:
    """Return ``table`` with ``mode`` for the heads of ``layer`` that keep every key.

    For SELECT those are all of them: later layers take their sets head by head.
    """
    kept = () if mode == SELECT else WINDOWED
    row = tuple(old if old in kept else mode for old in table.rows[layer])
    return table.with_row(layer, row)
