"""RazorAttention: only heads that retrieve keep every key; the others keep a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaptive.policy import _head_files
from adaptive.policy._compose import begin, free_layers
from adaptive.policy._fields import (
    Heads,
    check_count,
    check_flag,
    check_heads_exist,
    check_layers_exist,
    check_rate,
    is_share,
    refused,
    set_heads,
    set_layers,
)
from adaptive.policy._policy import Policy
from adaptive.policy.plan import LOCAL, RAZOR, SELECT, WINDOW, Plan


@dataclass(frozen=True, kw_only=True)
class RazorAttention(Policy):
    """Retrieval heads keep every key; the others keep first and recent tokens and one for the rest.

    After Tang et al. 2024 (arXiv:2407.15891). What is dropped is dropped for good, and its memory
    given back. The token that stands for the dropped ones has their mean key and mean value and
    counts as many times as there are. A layer that a TidalDecode lets select keeps all its keys,
    and one some of whose heads are local by LocalAttention stays as it is.

    Attributes:
        heads: The KV heads that keep every key, as (layer, head) pairs, or a mapping from layer to
            heads. None: not known yet; `adaptive.calibrate` finds them, `from_duo` and `from_json`
            read them from files.
        induction: Share of the heads that `calibrate` keeps for looking at what followed earlier
            copies of a token.
        echo: Share of the heads that it keeps for looking at the earlier copies themselves.
        sinks: First tokens that the other heads keep.
        window: Last tokens that they keep: a count, or ("max", count, share) for the larger of a
            count and a share of the tokens.
        compensation: Whether one token stands for those dropped.
        dense_layers: Layers all of whose heads keep every key.
        of_layers: Layers of the model that ``heads`` are for, checked against the model; None: not
            known.
        of_heads: KV heads of its layers, likewise.
    """

    modes: ClassVar[tuple[str, ...]] = (RAZOR, WINDOW)

    heads: Heads | None = None
    induction: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    window: int | tuple[str, int, float] = ("max", 4000, 0.2)
    compensation: bool = True
    dense_layers: tuple[int, ...] = (0, 1)
    of_layers: int | None = None
    of_heads: int | None = None

    def __post_init__(self) -> None:
        set_heads(self, "heads")
        check_rate(self, "induction")
        check_rate(self, "echo")
        if self.induction == self.echo == 0:
            raise refused(self, "induction", "be above 0 where echo is 0", self.induction)
        check_count(self, "sinks", 0)
        self._check_window()
        check_flag(self, "compensation")
        set_layers(self, "dense_layers")
        check_count(self, "of_layers", 1, optional=True)
        check_count(self, "of_heads", 1, optional=True)

    @classmethod
    def from_duo(cls, path: str | Path, sparsity: float = 0.5, **fields: Any) -> RazorAttention:
        """Return the policy of a DuoAttention pattern directory.

        Args:
            path: A directory with ``full_attention_heads.tsv`` (a row per layer, a number per KV
                head) and ``config.json`` ("sink_size", "recent_size").
            sparsity: Share of the heads that keep a window: those with the lowest numbers.
            fields: Of the policy, over those of the files; ``dense_layers`` is empty otherwise.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is not what it should be: names file, line and value.
        """
        pattern = _head_files.read_duo(Path(path), sparsity)
        found = {"sinks": pattern.sinks, "window": pattern.recent, "dense_layers": ()}
        return cls(**{**found, **pattern.heads(), **fields})

    @classmethod
    def from_json(cls, path: str | Path, **fields: Any) -> RazorAttention:
        """Return the policy of a JSON head list, ``{"0": [kv heads], "1": [], ...}``.

        Args:
            path: The file. Every layer must be named, also those without a retrieval head.
            fields: Of the policy; ``dense_layers`` is empty otherwise.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not such a list: names file, layer and value.
        """
        pattern = _head_files.read_json(Path(path))
        return cls(**{"dense_layers": (), **pattern.heads(), **fields})

    @classmethod
    def for_alibi(
        cls, windows: Sequence[Sequence[int]], most: int, **fields: Any
    ) -> RazorAttention:
        """Return the policy of a model with linear biases (ALiBi), which needs no calibration.

        A head whose window is longer than ``most`` keeps every key; the others keep ``most``, which
        is at least what each of them can see, so nothing has to stand for what they drop.
        No family that is known today has such biases; the rule is here for those that users add.

        Args:
            windows: For each layer, the tokens that each KV head can see: `alibi_windows`, the
                largest of the query heads that share it.
            most: Tokens that heads with shorter windows keep.
            fields: Of the policy.
        """
        heads = {
            layer: [head for head, window in enumerate(row) if window > most]
            for layer, row in enumerate(windows)
        }
        found = {"sinks": 0, "window": most, "compensation": False, "dense_layers": ()}
        return cls(**{**found, "heads": heads, "of_layers": len(windows), **fields})

    def window_tokens(self, length: int) -> int:
        """Recent tokens that windowed heads keep at ``length`` tokens."""
        if isinstance(self.window, int):
            return self.window
        _, count, share = self.window
        return max(count, int(length * share))

    def plan(self, table: Plan) -> Plan:
        """Return ``table`` with windows for all heads but the retrieval heads.

        Raises:
            ValueError: The heads are not known, or are not those of such a model; a layer does not
                exist; or the policy has no meaning with an earlier one.
        """
        if self.heads is None:
            raise ValueError(
                "adaptive: RazorAttention.heads must be known, got None; calibrate first: "
                "adaptive.calibrate(model, RazorAttention(...))"
            )
        table = begin(self, table)
        kv_heads = table.shape.kv_heads
        check_layers_exist(self, "dense_layers", self.dense_layers, len(kv_heads))
        for ours, theirs, what in (
            (self.of_layers, {len(kv_heads)}, "layers"),
            (self.of_heads, set(kv_heads), "KV heads"),
        ):
            if ours is not None and theirs != {ours}:
                numbers = ", ".join(map(str, sorted(theirs)))
                rule = f"be for a model with {numbers} {what}"
                raise ValueError(f"adaptive: RazorAttention.heads must {rule}, got {ours} {what}")
        check_heads_exist(self, "heads", self.heads, kv_heads)
        mode = RAZOR if self.compensation else WINDOW
        free = free_layers(table, self.dense_layers)
        if not free:
            raise refused(self, "dense_layers", "leave a layer that may drop", self.dense_layers)
        for layer in free:
            row = table.rows[layer]
            if SELECT not in row and LOCAL not in row:
                keep = {head for at, head in self.heads if at == layer}
                row = tuple(old if head in keep else mode for head, old in enumerate(row))
                table = table.with_row(layer, row)
        return table

    def may_drop(self, table: Plan) -> list[tuple[int, int]]:
        """(layer, KV head) pairs of ``table`` that could keep a window: not in a dense layer."""
        free = free_layers(table, self.dense_layers)
        return [(layer, head) for layer in free for head in range(table.shape.kv_heads[layer])]

    def _check_window(self) -> None:
        window = self.window
        if type(window) is int and window >= 1:
            return
        if isinstance(window, list):
            window = tuple(window)
            object.__setattr__(self, "window", window)
        if isinstance(window, tuple) and len(window) == len(("max", "count", "share")):
            rule, count, share = window
            if rule == "max" and type(count) is int and count >= 1 and is_share(share):
                return
        raise refused(
            self, "window", "be a count from 1 on, or ('max', count, share up to 1)", window
        )
