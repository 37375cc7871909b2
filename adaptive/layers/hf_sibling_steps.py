"""Steps whose drafts are checked together with what the draft's head found likely besides them."""

import torch
from torch import Tensor

from adaptive.layers.draft_length import DraftLength
from adaptive.layers.hf_rows import Rows
from adaptive.layers.hf_steps import DraftSteps
from adaptive.layers.hf_tree_passes import TreePasses
from adaptive.layers.hf_tree_steps import as_slowest, tree_inputs
from adaptive.layers.sibling_length import WIDTH, Sibling, SiblingLength
from adaptive.layers.state import PatchRecord
from adaptive.layers.token_tree import Tree
from adaptive.policy import SelfSpeculative
from adaptive.policy.self_speculative import MAX_DRAFT


class SiblingSteps(DraftSteps):
    """Drafts a chain; checks a tree: the chain, and siblings of its tokens. See `sibling_length`.

    Drafts are the likeliest tokens, in sampling too, and chosen without regard to what the model
    draws at each node. So what it draws is kept, in the tree or not, and is distributed as ever.
    """

    def __init__(
        self,
        policy: SelfSpeculative,
        passes: TreePasses,
        rows: Rows,
        record: PatchRecord,
        keeps_cache: bool,
    ) -> None:
        """As `DraftSteps`."""
        super().__init__(policy, passes, rows, record, keeps_cache)
        self.passes: TreePasses = passes
        self._ranked: list[Tensor] = []

    @staticmethod
    def new_length(policy: SelfSpeculative) -> DraftLength:
        """What decides how much to draft, before anything was learned."""
        return SiblingLength(fixed=policy.draft, most=MAX_DRAFT)

    def _draft(self, last: Tensor, most: int) -> tuple[Tensor, list[Tensor]]:
        self._ranked = []
        return super()._draft(last, most)

    def _draft_pass(self, ids: Tensor, before: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, chances = self.rows.rank(self._draft_logits(ids), before, WIDTH)
        self._ranked.append(tokens)
        return tokens[:, :1], chances[:, 0], chances[:, :0]

    def _check(self, ids: Tensor, chances: list[Tensor]) -> None:
        """Check drafts and siblings, and keep the path that was right."""
        rows, passes, length = self.rows, self.passes, self.length
        assert isinstance(length, SiblingLength)
        start = begun = self.clock()
        alive = rows.alive.tolist()
        accepts = [
            [length.accepts(c) for c, on in zip(row, alive, strict=True) if on]
            for row in (confidence.tolist() for confidence in self.confidences)
        ]
        closes, siblings = length.choose(accepts)
        ranked = torch.stack(self._ranked, 1).tolist()  # [batch, drafts, width]
        drafts = len(accepts) - (not closes)
        siblings = [sibling for sibling in siblings if sibling.rank < len(ranked[0][0])]
        trees = [_tree(row, drafts, siblings) for row in ranked]
        nodes = drafts + len(siblings)
        given = tree_inputs(trees, ids[:, :1], nodes)
        exit_layer = self.policy.exit_layer
        if exit_layer is None:
            logits = passes.tree(*given)
        else:
            if passes.behind(nodes + 1):
                passes.branches(given[0], given[2], given[3], exit_layer)
                begun = self.clock()
                length.branches.add(nodes + 1 - len(accepts), begun - start)
            logits = passes.deep_tree(*given, exit_layer)
        paths, made = rows.walk(logits, trees, nodes)
        length.verify.add(nodes + 1, self.clock() - begun)
        self.log.verify_seconds += self.clock() - start
        right = made
        if self.together:
            paths, made = as_slowest(paths, made, alive)
        passes.accept_paths(paths, alive)
        self._count(ranked, right, alive)
        log = self.log
        log.steps += 1
        log.dropped += not closes
        log.lengths[nodes] = log.lengths.get(nodes, 0) + 1
        log.drafted += nodes * sum(alive)
        log.siblings += len(siblings) * sum(alive)
        log.accepted += sum(len(path) for path, on in zip(paths, alive, strict=True) if on)
        ends = (path[-1] for path, on in zip(paths, alive, strict=True) if on and path)
        found = sum(node >= drafts for node in ends)
        log.siblings_right += found
        length.learn_siblings(found / sum(alive))
        self.keep(made)

    def _count(
        self, ranked: list[list[list[int]]], right: list[list[int]], alive: list[bool]
    ) -> None:
        """Learn from each draft after right ones whether it was right, or which of its siblings."""
        length = self.length
        assert isinstance(length, SiblingLength)
        for row, on in enumerate(alive):
            if not on:
                continue
            for depth, (ranks, token) in enumerate(zip(ranked[row], right[row], strict=False)):
                length.learn(float(self.confidences[depth][row]), token == ranks[0])
                if token != ranks[0]:
                    length.learn_rank(ranks.index(token) if token in ranks else None)
                    break


def _tree(ranked: list[list[int]], drafts: int, siblings: list[Sibling]) -> Tree:
    """The chain of drafts of a row, and siblings of its tokens after it."""
    chain = tuple(ranks[0] for ranks in ranked[:drafts])
    others = tuple(ranked[depth][rank] for depth, rank in siblings)
    return Tree(chain + others, (*range(-1, drafts - 1), *(depth - 1 for depth, _ in siblings)))
