"""Result files: one JSON document per run, written after every row: a crash loses one row."""

import json
import os
from pathlib import Path
from typing import Any

from bench.machine import facts

SCHEMA = 1
ROW_FIELDS: dict[str, frozenset[str]] = {
    "ops": frozenset({"op", "sizes", "dtype", "threads", "moved_bytes", "variants"}),
    "modules": frozenset({"what", "memory", "dtype", "threads", "variants", "speedup"}),
    "token_routing": frozenset({"model", "tokens", "dtype", "threads", "variants"}),
    "token_widths": frozenset({"model", "tokens", "dtype", "threads", "variants"}),
    "ffn_experts": frozenset({"model", "tokens", "dtype", "threads", "variants"}),
    "ffn_experts_quality": frozenset({"what", "top_k", "share", "bits_per_byte", "more_bits"}),
    "head_routing": frozenset({"model", "tokens", "past", "dtype", "threads", "variants"}),
    "head_quality": frozenset({"what", "share", "layers", "bits_per_byte", "more_bits"}),
    "ffn_encoders": frozenset({"what", "top_k", "share", "ms", "time_saved", "cosine_mean"}),
    "sparse_ffn": frozenset({"model", "rows", "dtype", "threads", "active_share", "variants"}),
    "encoders": frozenset({"model", "layers", "tokens", "batch", "padded", "dtype", "threads"}),
    "encoder_exit": frozenset(
        {"rule", "setting", "sentences", "skipped_share", "ms", "time_saved", "cosine_mean"}
    ),
    "token_merging": frozenset({"model", "rule", "setting", "kept_share", "ms", "of_ideal"}),
    "token_pruning": frozenset({"model", "setting", "kept_share", "ms", "of_ideal"}),
    "models": frozenset({"model", "context", "dtype", "threads", "kv_bytes", "variants"}),
    "prefill": frozenset({"heads", "tokens", "dtype", "threads", "variants", "split_ms"}),
    "early_exit": frozenset({"criterion", "threshold", "exits", "mean_depth", "tasks"}),
    "early_exit_rows": frozenset({"model", "criterion", "threshold", "exits", "variants"}),
    "refill": frozenset({"model", "threads", "prompts", "batch", "new_tokens", "variants"}),
    "quality_prefill": frozenset({"policy", "choice", "context", "scores_share", "tasks"}),
    "local_gradient": frozenset({"tokens", "window", "dtype", "threads", "variants"}),
    "routing": frozenset({"capacity", "dtype", "threads", "tokens", "variants", "ops_share"}),
    "prompts": frozenset({"model", "tokens", "dtype", "threads", "layers", "variants"}),
    "speculation_shape": frozenset({"what", "text", "exit_layer", "variants"}),
    "speculation_head": frozenset({"what", "text", "draft", "exit_layer", "variants"}),
    "speculation": frozenset({"what", "text", "batch", "variants"}),
    "sequence_groups": frozenset({"what", "sequences", "batch", "share", "ms"}),
    "siblings": frozenset({"what", "text", "batch", "rank_shares", "variants"}),
    "forced_drafts": frozenset({"accepted", "draft", "siblings", "measured", "promised"}),
    "skip_search": frozenset({"what", "text", "batch", "found", "variants"}),
    "static_speculation": frozenset(
        {"model", "device", "captured", "batch", "context", "exit_layer", "accepted", "variants"}
    ),
    "mixture_of_depths": frozenset({"what", "tokens", "batch", "share", "ms"}),
    "depths_quality": frozenset({"part", "policy", "share", "bits_per_byte", "tokens"}),
    "quality": frozenset({"policy", "budget", "context", "kv_read_share", "tasks"}),
    "block_transformer": frozenset(
        {"model", "batch", "prompt_tokens", "new_tokens", "threads", "variants", "speedup"}
    ),
    "depth_batching": frozenset(
        {"model", "router", "batch", "new_tokens", "depths", "threads", "variants", "speedup"}
    ),
}
VARIANT_FIELDS: dict[str, frozenset[str]] = {
    "prefill": frozenset({"us", "us_min", "clean", "dropped", "error"}),
    "ops": frozenset({"kind", "us", "us_min", "clean", "dropped", "gb_s", "error"}),
    "modules": frozenset({"us", "us_min", "clean", "dropped", "error"}),
    "token_routing": frozenset({"us", "us_min", "clean", "dropped", "error", "speedup"}),
    "token_widths": frozenset({"us", "us_min", "clean", "dropped", "speedup", "share", "of_ideal"}),
    "ffn_experts": frozenset({"us", "us_min", "clean", "dropped", "error", "speedup", "of_ideal"}),
    "head_routing": frozenset({"us", "us_min", "clean", "dropped", "error", "share", "of_ideal"}),
    "sparse_ffn": frozenset({"us", "us_min", "clean", "dropped", "error", "speedup"}),
    "local_gradient": frozenset({"us", "us_min", "clean", "dropped", "error", "ours_is_faster"}),
    "encoders": frozenset({"ms", "ms_min", "clean", "dropped", "error", "computed_share"}),
    "models": frozenset({"ms", "ms_min", "clean", "dropped", "error", "argmax_agreement"}),
    "speculation_shape": frozenset({"ms", "clean", "speedup", "by_bytes"}),
    "speculation_head": frozenset({"ms", "clean", "speedup", "against_whole", "head_bytes"}),
    "speculation": frozenset({"ms", "clean", "speedup", "same_tokens"}),
    "siblings": frozenset({"ms", "clean", "speedup", "same_tokens"}),
    "skip_search": frozenset({"ms", "clean", "speedup", "same_tokens"}),
    "static_speculation": frozenset({"us_per_step", "tokens_per_step", "speedup", "by_bytes"}),
    "refill": frozenset({"tokens_per_s", "speedup", "speedup_range"}),
    "routing": frozenset({"us", "us_min", "clean", "dropped", "error"}),
    "prompts": frozenset({"ms", "ms_min", "clean", "dropped", "error", "speedup"}),
    "block_transformer": frozenset(
        {"batch", "kv_bytes", "prefill_s", "decode_tokens_per_s", "tokens_per_s", "error"}
    ),
    "depth_batching": frozenset({"tokens_per_s", "rounds_s", "same_tokens"}),
}


class Recorder:
    """Collects the rows of one run and keeps the file on disk up to date."""

    def __init__(self, benchmark: str, path: Path | None, settings: dict[str, Any]) -> None:
        """Start a document of kind ``benchmark`` (``ops`` or ``models``); no path: memory only."""
        self.path = path
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "machine": facts(),
            "settings": settings,
            "rows": [],
            "failures": [],
        }

    def add(self, row: dict[str, Any], section: str = "rows") -> None:
        """Append ``row`` to a section and write the file."""
        self.document.setdefault(section, []).append(row)
        self.save()

    def fail(self, what: str, error: BaseException) -> None:
        """Note that ``what`` could not be measured, and why."""
        self.add({"what": what, "error": f"{type(error).__name__}: {error}"}, "failures")

    def save(self) -> None:
        """Write the document; a reader never sees half of one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(temporary, self.path)


def load(path: Path) -> dict[str, Any]:
    """Read a result file and check it.

    Raises:
        ValueError: Not a result file of this schema, or a speed in it has no error beside it.
    """
    document: dict[str, Any] = json.loads(path.read_text())
    validate(document)
    return document


def validate(document: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, unless ``document`` is a whole result document."""
    if document.get("schema") != SCHEMA:
        raise ValueError(f"bench: schema must be {SCHEMA}, got {document.get('schema')!r}")
    kind = document.get("benchmark")
    if kind not in ROW_FIELDS:
        raise ValueError(f"bench: benchmark must be one of {sorted(ROW_FIELDS)}, got {kind!r}")
    for field in ("machine", "settings", "rows", "failures"):
        if field not in document:
            raise ValueError(f"bench: {field} must be in a result document, got {list(document)}")
    for number, row in enumerate(document["rows"]):
        _require(row, ROW_FIELDS[kind], f"rows[{number}]")
        for name, variant in row.get("variants", {}).items():
            _require(variant, VARIANT_FIELDS[kind], f"rows[{number}].variants[{name!r}]")


def _require(found: dict[str, Any], fields: frozenset[str], where: str) -> None:
    missing = sorted(fields - found.keys())
    if missing:
        raise ValueError(f"bench: {where} must have {', '.join(missing)}, got {sorted(found)}")
