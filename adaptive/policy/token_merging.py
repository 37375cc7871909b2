"""TokenMerging: the tokens of an encoder that are most alike become one, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaptive.ops.merge_tokens import most_pairs
from adaptive.policy._compose import begin
from adaptive.policy._fields import check_count, refused
from adaptive.policy._policy import Policy
from adaptive.policy.encoder_gate import POOLS
from adaptive.policy.plan import Plan


@dataclass(frozen=True, kw_only=True)
class TokenMerging(Policy):
    """After a layer, tokens of a sequence whose keys are most alike become their mean.

    Token Merging (Bolya et al. 2023, arXiv:2210.09461): bipartite matching by the cosine of the
    layer's keys, averaged over its heads; means weighted by how many tokens each one stands for;
    attention that adds the logarithm of that number to the scores of a key. Two things differ from
    the paper: tokens merge behind a layer's MLP, not before it, so that layers are run as they are;
    and tokens keep their order. What follows the layers sees all tokens: each one has the state of
    that which it became part of.

    Exactly one of ``r`` and ``keep`` is given.

    Attributes:
        r: Tokens fewer after each layer; fewer where a sequence has not that many pairs.
        keep: Share of its tokens that each sequence keeps after each layer, rounded up; 0.5..1.
        layers: Layers after which tokens merge, ascending; None: all but the last, after which
            there is nothing to save.
        pool: What audits compare: "mean" of a sequence's tokens without padding, or the "first".
        audit_every: Every n-th call also runs in full, and the cosine of the pooled outputs is
            measured; None: never.
    """

    r: int | None = None
    keep: float | None = None
    layers: tuple[int, ...] | None = None
    pool: str = "mean"
    audit_every: int | None = 64

    def __post_init__(self) -> None:
        check_count(self, "r", 0, optional=True)
        check_count(self, "audit_every", 1, optional=True)
        keep = self.keep
        if (self.r is None) == (keep is None):
            raise refused(self, "r", "be given, or keep, and not both", self.r)
        if keep is not None and not (type(keep) in (int, float) and 0.5 <= keep <= 1):  # noqa: PLR2004
            raise refused(self, "keep", "be a number in 0.5..1", keep)
        if self.pool not in POOLS:
            raise refused(self, "pool", f"be one of {', '.join(POOLS)}", self.pool)
        layers = self.layers
        if layers is None:
            return
        whole = isinstance(layers, list | tuple) and all(type(layer) is int for layer in layers)
        if not whole or not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise refused(self, "layers", "be ascending numbers of layers, or None", layers)
        object.__setattr__(self, "layers", tuple(layers))

    def reducing_layers(self, layers: int) -> tuple[int, ...]:
        """Numbers of the layers after which tokens of a model of so many ``layers`` merge."""
        return tuple(range(layers - 1)) if self.layers is None else self.layers

    def removed(self, tokens: int, protect: int) -> int:
        """How many tokens fewer a sequence of so many real ``tokens`` has after a merge.

        Args:
            tokens: Before it.
            protect: Tokens at the start that never merge.
        """
        if self.r is not None:
            wanted = self.r
        else:
            assert self.keep is not None
            # 0.55 * 20 is 11.000000000000002, of which 12 would be kept
            wanted = tokens - math.ceil(round(self.keep * tokens, 9))
        return min(wanted, most_pairs(tokens, protect))

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A layer is not one of the model, or its last.
        """
        table = begin(self, table)
        last = len(table.rows) - 1
        for layer in self.layers or ():
            if layer >= last:
                rule = f"be below {last}, the last layer, after which there is nothing to save"
                raise refused(self, "layers", rule, layer)
        return table
