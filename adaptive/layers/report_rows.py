"""How the table of a report makes rows of layers: which share one, and what they skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive.layers.report import LayerReport

PERCENTILES = {"mass_min": 0.0, "mass_p01": 0.01, "mass_p10": 0.1, "mass_p50": 0.5}
"""Fields of a LayerReport, and the share of the measured masses that lie below each."""


def groups(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """Runs of neighbours that differ in nothing but name and time."""
    found: list[list[LayerReport]] = []
    for layer in layers:
        if not found or _alike(found[-1][-1]) != _alike(layer):
            found.append([])
        found[-1].append(layer)
    return found


def _alike(layer: LayerReport) -> dict[str, Any]:
    own = ["layer", "name", "seconds", "kv_tokens", "kv_bytes", "scores"]
    own += ["mass_mean", "mass_of_heads", *PERCENTILES]
    return {k: v for k, v in asdict(layer).items() if k not in own[: None if skips(layer) else 3]}


def skips(layer: LayerReport) -> bool:
    """Whether a layer skipped keys by a policy: decoding, or on all tokens of an encoder."""
    return bool(layer.dense_bytes or layer.mass_measured)


def skipped(group: Sequence[LayerReport]) -> tuple[str, str, str]:
    """Share of the dense work that was done, and the least and the mean mass, of like layers.

    The work is the bytes that were read, or else the pairs of query and key that were computed.
    """
    dense = sum(layer.dense_bytes for layer in group)
    done = sum(layer.kv_bytes for layer in group)
    if not dense:
        dense = sum(layer.dense_scores for layer in group)
        done = sum(layer.scores for layer in group)
    share = f"{done / dense:.1%}" if dense else "-"
    if not (measured := [layer for layer in group if layer.mass_min is not None]):
        return share, "-", "-"
    least = min(layer.mass_min or 0.0 for layer in measured)
    mean = sum(layer.mass_mean or 0.0 for layer in measured) / len(measured)
    return share, f"{least:.3f}", f"{mean:.3f}"


def scores(group: Sequence[LayerReport]) -> str:
    """Share of the pairs of query and key of dense attention which long calls computed."""
    dense = sum(layer.dense_scores for layer in group)
    return f"{sum(layer.scores for layer in group) / dense:.1%}" if dense else "-"
