"""Drafts without a model: a tree of the tokens that lately followed each token.

Token Recycling (Luo et al. 2024, arXiv:2408.08696): a table holds, for every token, the tokens that
the model thought most likely after it when it was last seen. A tree of such successors, several
deep, is checked in one pass of the model, and the checked logits refresh the table.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from adaptive.layers.draft_length import (
    GAIN,
    MOST_OFF_STEPS,
    OFF_STEPS,
    PLAIN_EVERY,
    PLAIN_FIRST,
    Average,
    Line,
)

WIDTH = 8
"""Successors that are kept of a token."""

PRIOR = (0.5, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
"""Share of tokens that are the successor of each rank, before any was seen."""

PRIOR_WEIGHT = 20.0
FORGET = 0.995


@dataclass(frozen=True)
class Tree:
    """Candidates for the next tokens.

    Attributes:
        tokens: Of each node.
        parents: Of each node, a lower index; -1: the token before the tree.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def depths(self) -> list[int]:
        """Tokens from the one before the tree to each node."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def ancestors(self) -> list[list[bool]]:
        """Whether each node sees each, itself included."""
        seen: list[list[bool]] = []
        for node, parent in enumerate(self.parents):
            row = list(seen[parent]) if parent >= 0 else [False] * len(self.parents)
            row[node] = True
            seen.append(row)
        return seen

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` (-1: the token before) with this token."""
        for index, (parent, own) in enumerate(zip(self.parents, self.tokens, strict=True)):
            if parent == node and own == token:
                return index
        return None


def tree_tensors(trees: Sequence[Tree], nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and parents, ``[batch, nodes]``, and the number of nodes of each tree."""
    drafted = torch.zeros(len(trees), nodes, dtype=torch.int64)
    parents = torch.full((len(trees), nodes), -1, dtype=torch.int64)
    for row, tree in enumerate(trees):
        drafted[row, : len(tree.tokens)] = torch.tensor(tree.tokens, dtype=torch.int64)
        parents[row, : len(tree.parents)] = torch.tensor(tree.parents, dtype=torch.int64)
    return drafted, parents, torch.tensor([len(tree.tokens) for tree in trees])


class Successors:
    """The table. Lives as long as the patch, so that a later call of generate starts warm."""

    def __init__(self) -> None:
        """Start with an empty table."""
        self._table: dict[int, list[int]] = {}
        self._hits = [PRIOR_WEIGHT * share for share in PRIOR]
        self._seen = PRIOR_WEIGHT

    def __len__(self) -> int:
        return len(self._table)

    def read(self, tokens: Sequence[int]) -> None:
        """Learn from text: each token's successor becomes its first."""
        for token, follower in pairwise(tokens):
            row = self._table.setdefault(token, [])
            if follower in row:
                row.remove(follower)
            row.insert(0, follower)
            del row[WIDTH:]

    def learn(self, token: int, likely: list[int]) -> None:
        """Replace a token's successors by those that the model finds most likely, best first."""
        self._table[token] = likely[:WIDTH]

    def count(self, token: int, follower: int) -> None:
        """Note what followed a token, to know how often the successor of each rank is right."""
        row = self._table.get(token, ())
        self._seen = self._seen * FORGET + 1
        self._hits = [hits * FORGET for hits in self._hits]
        if follower in row:
            self._hits[row.index(follower)] += 1

    def grow(self, token: int, nodes: int) -> tuple[Tree, list[float]]:
        """The tree of the most likely ``nodes`` continuations of a token.

        Returns:
            The tree, and for each node the expected chance that it is right.
        """
        shares = [hits / self._seen for hits in self._hits]
        tokens: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        order = 0
        heap: list[tuple[float, int, int, int]] = []

        def offer(parent: int, of: int, chance: float) -> None:
            nonlocal order
            for rank, follower in enumerate(self._table.get(of, ())):
                heapq.heappush(heap, (-chance * shares[rank], order, parent, follower))
                order += 1

        offer(-1, token, 1.0)
        while heap and len(tokens) < nodes:
            negative, _, parent, follower = heapq.heappop(heap)
            tokens.append(follower)
            parents.append(parent)
            chances.append(-negative)
            offer(len(tokens) - 1, follower, -negative)
        return Tree(tuple(tokens), tuple(parents)), chances


@dataclass
class TreeSize:
    """How many nodes pay, by the measured time of passes; none while no tree does.

    Attributes:
        most: The most nodes.
        trials: Steps with a tree before it is judged.
        first: The most nodes in these.
        verify: Seconds of a pass over a number of rows.
        plain: Seconds of a step without a tree.
        gained: Tokens of a step with a tree.
        off: Steps still to be made without one.
        turned_off: How often that was decided.
    """

    most: int
    trials: int = OFF_STEPS // 2
    first: int | None = None
    verify: Line = field(default_factory=Line)
    plain: Average = field(default_factory=Average)
    gained: Average = field(default_factory=Average)
    off: int = 0
    turned_off: int = 0
    _pause: int = OFF_STEPS
    _since: int = 0

    def begin(self) -> None:
        """Keep what was learned for another call, whose text may repeat itself more."""
        self.off = min(self.off, OFF_STEPS)

    def wants(self) -> bool:
        """Whether to check a tree in this step."""
        self._since += 1
        if self.plain.value is None or self.plain.weight < PLAIN_FIRST or self._since > PLAIN_EVERY:
            self._since = 0
            return False
        if self.off:
            self.off -= 1
            return self.off == 0
        if self.gained.value is None or self.gained.weight < self.trials:
            return True
        rate = self.gained.value / self.verify.at(self.verify.rows / self.verify.weight)
        if rate * self.plain.value > GAIN:
            self._pause = OFF_STEPS
            return True
        self.off = self._pause
        self._pause = min(2 * self._pause, MOST_OFF_STEPS)
        self.turned_off += 1
        return False

    def nodes(self, chances: Iterable[float]) -> int:
        """How many of the nodes, likeliest first, bring tokens faster than a plain step."""
        if self.first is not None and self.gained.weight < self.trials:
            return self.first
        if self.plain.value is None or self.verify.weight == 0:
            return self.most
        least = self.verify.slope / self.plain.value
        return max(sum(chance > least for chance in chances), 1)
