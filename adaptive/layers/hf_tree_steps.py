"""Steps that check a tree of guesses, drafted from what followed each token lately."""

import torch
from torch import Tensor

from adaptive.layers.hf_rows import Rows
from adaptive.layers.hf_steps import Steps
from adaptive.layers.hf_tree_passes import TreePasses
from adaptive.layers.speculation_log import SpeculationLog
from adaptive.layers.token_tree import WIDTH, Successors, Tree, TreeSize
from adaptive.policy.self_speculative import MAX_DRAFT

TRIED_ROWS = 16
"""Tokens of a pass by which a batch first tries trees: few enough to be bound by the weights."""


class TreeSteps(Steps):
    """Drafts by a table of successors; see `token_tree`."""

    def __init__(
        self,
        passes: TreePasses,
        rows: Rows,
        table: Successors,
        learned: dict[int, TreeSize],
        log: SpeculationLog,
    ) -> None:
        """Know the table, and what earlier calls learned of sizes, by rows."""
        super().__init__(passes, rows, log)
        self.passes: TreePasses = passes
        self.table = table
        self.learned = learned
        self.fit()
        self.size.begin()

    def run(self, chunk: int | None) -> None:
        """As `Steps.run`; learns the prompt's successors."""
        mask, prompt = self.passes.mask, self.rows.prompt.tolist()
        held = [None] * self.rows.batch if mask is None else mask.tolist()
        for ids, row in zip(prompt, held, strict=True):
            seen = ids if row is None else [t for t, on in zip(ids, row, strict=True) if on]
            self.table.read(seen)
        super().run(chunk)

    def fit(self) -> None:
        """As `Steps.fit`."""
        batch = self.rows.batch
        # Gaps cost a mask where there is none; windows count slots, so that there must be none.
        self.together = batch > 1 and (self.passes.windowed or not self.rows.refilled)
        new = TreeSize(most=MAX_DRAFT)
        if batch > 1:
            # Trees for each of many rows cost too much to try for long, or with many nodes.
            new.trials, new.first = 2, max(1, TRIED_ROWS // batch - 1)
        self.size = self.learned.setdefault(batch, new)

    def turned_off(self) -> int:
        """How often trees were given up, in all calls."""
        return self.size.turned_off

    def step(self) -> None:
        """Check a tree and keep the right path; or a plain step where trees do not pay."""
        room = self.rows.room() - 1
        last = self.rows.last()
        if room < 1 or not self.size.wants():
            logits = self.plain(self.size.plain)
            self._learn(last, logits)
            return
        start = self.clock()
        grown = [self.table.grow(token, MAX_DRAFT) for token in last[:, 0].tolist()]
        nodes = max(self.size.nodes(chances) for _, chances in grown)
        trees = [_first(tree, nodes) for tree, _ in grown]
        nodes = max(len(tree.tokens) for tree in trees)
        if nodes == 0:
            logits = self.plain(self.size.plain)
            self._learn(last, logits)
            return
        ids, parents, depths, ancestors = tree_inputs(trees, last, nodes)
        begun = self.clock()
        logits = self.passes.tree(ids, parents, depths, ancestors)
        paths, chosen = self.rows.walk(logits, trees, room)
        self._learn(ids, logits, [len(tree.tokens) for tree in trees])
        alive = self.rows.alive.tolist()
        if self.together:
            paths, chosen = as_slowest(paths, chosen, alive)
        self.passes.accept_paths(paths, alive)
        self._count(trees, paths, alive, last[:, 0].tolist(), chosen)
        self.keep(chosen)
        self.size.verify.add(nodes + 1, self.clock() - begun)
        self.log.draft_seconds += begun - start
        self.log.verify_seconds += self.clock() - begun

    def _count(
        self,
        trees: list[Tree],
        paths: list[list[int]],
        alive: list[bool],
        last: list[int],
        chosen: list[list[int]],
    ) -> None:
        log, made, rows = self.log, 0, 0
        log.steps += 1
        size = max(len(tree.tokens) for tree in trees)
        log.lengths[size] = log.lengths.get(size, 0) + 1
        for row, path in enumerate(paths):
            if not alive[row]:
                continue
            log.drafted += len(trees[row].tokens)
            log.accepted += len(path)
            made, rows = made + len(path) + 1, rows + 1
            for token, follower in zip([last[row], *chosen[row]], chosen[row], strict=False):
                self.table.count(token, follower)
        self.size.gained.add(made / max(rows, 1))

    def _learn(self, ids: Tensor, logits: Tensor, nodes: list[int] | None = None) -> None:
        """Refresh the table by what the model found likely after each checked token."""
        likely = logits.topk(min(WIDTH, logits.shape[-1]), -1).indices.tolist()
        for row, tokens in enumerate(ids.tolist()):
            end = len(tokens) if nodes is None else nodes[row] + 1
            for place in reversed(range(end)):  # the token before the tree last: it is certain
                self.table.learn(tokens[place], likely[row][place])


def _first(tree: Tree, nodes: int) -> Tree:
    """The first ``nodes`` nodes; a parent comes before its children."""
    return Tree(tree.tokens[:nodes], tree.parents[:nodes])


def as_slowest(
    paths: list[list[int]], chosen: list[list[int]], alive: list[bool]
) -> tuple[list[list[int]], list[list[int]]]:
    """Paths and tokens of rows that go together: as far as the shortest path of a row alive."""
    least = min(len(path) for path, on in zip(paths, alive, strict=True) if on)
    return [path[:least] for path in paths], [tokens[: least + 1] for tokens in chosen]


def tree_inputs(
    trees: list[Tree], last: Tensor, nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, parents, depths and ancestors of the last tokens and the trees, filled up to ``nodes``.

    What fills a smaller tree up hangs below the last token and is never walked to.
    """
    batch = len(trees)
    ids = last.repeat(1, nodes + 1)
    parents = torch.zeros(batch, nodes + 1, dtype=torch.long)
    parents[:, 0] = -1
    depths = torch.ones(batch, nodes + 1, dtype=torch.long)
    depths[:, 0] = 0
    ancestors = torch.eye(nodes + 1, dtype=torch.bool).repeat(batch, 1, 1)
    ancestors[:, :, 0] = True
    for row, tree in enumerate(trees):
        count = len(tree.tokens)
        if count:
            ids[row, 1 : count + 1] = torch.tensor(tree.tokens, device=ids.device)
            parents[row, 1 : count + 1] = torch.tensor(tree.parents) + 1
            depths[row, 1 : count + 1] = torch.tensor(tree.depths())
            ancestors[row, 1 : count + 1, 1 : count + 1] = torch.tensor(tree.ancestors())
    device = last.device
    return ids, parents.to(device), depths.to(device), ancestors.to(device)
