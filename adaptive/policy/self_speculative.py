"""Self-speculation: the model drafts with a part of its layers and checks with all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaptive.policy import _skip_files
from adaptive.policy._compose import begin, stock_layers
from adaptive.policy._fields import check_count, check_flag, check_share, refused
from adaptive.policy._policy import Policy
from adaptive.policy.plan import Plan

MAX_DRAFT = 15
"""Drafts are verified together with the token before them, by kernels that take 16 rows."""

SEARCH = "search"
"""The value of ``skip`` that has the sets found."""

LEAST_LAYERS = 3
"""Of a model in which a search has something to leave out."""

Skip = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Policy):
    """`generate` makes the same tokens in fewer passes of the whole model.

    A few tokens are drafted by a part of the model's layers; one pass of the whole model then
    checks them, and keeps those that it would have made itself. Greedy search gives the same
    tokens, sampling the same distribution.

    With ``exit_layer``, after LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710): drafts leave the
    model after that many layers, through its own norm and head; the check goes on from there, so
    no layer runs twice for a token, and there is one KV cache. Best for models that were trained to
    be left early, see `adaptive.train.early_exit`.

    With ``skip``, after SWIFT (Xia et al. 2024, arXiv:2410.06916): drafts leave out the attention
    of some layers and the MLP of some. For any model; the check runs all layers anew. With
    ``skip="search"`` the sets are found while generating: now and then a candidate, drawn or
    proposed by Bayesian optimisation, is scored by how many of the latest tokens the model makes
    without it, in one pass; drafts use the set that promises most tokens per second. What was found
    stays as long as the patch, and is in the report.

    With ``tree`` alone, after Token Recycling (Luo et al. 2024, arXiv:2408.08696): no layer drafts.
    A table of the tokens that lately followed each token gives a tree of guesses, and one pass of
    the whole model checks them all. For text that repeats itself: code, copying, editing.

    With ``exit_layer`` or ``skip``, and ``tree``: what the draft's head finds likely besides each
    draft is checked beside it, as a tree (Miao et al. 2023, arXiv:2305.09781). It costs no draft,
    only rows of the check. Which of those siblings pay follows from how often the token of each
    rank was right and what a row costs.

    With ``exit_layer``, ``draft`` and ``static``: every step does the same work on the same memory,
    and nothing of it is decided by the host. Rows that accept different numbers of drafts go on
    alone; on CUDA the step is captured in a graph once and replayed. Greedy search alone.

    Attributes:
        exit_layer: Layers that a draft runs, from 1 to the model's number of layers - 1.
        skip: Layers whose attention drafts leave out, and layers whose MLP they do, ascending; or
            "search".
        skip_ratio: With ``skip="search"``: share of the modules between the first and the last
            layer that candidates leave out; None: searched, too.
        draft: Tokens drafted per step, 1 to 15; None: as many as pay, by the measured time of
            passes and share of right drafts, and none while they do not pay.
        draft_vocabulary: With ``exit_layer``: draft among so many first tokens of the vocabulary;
            None: all. Tokenizers number frequent tokens first, and the LM head is most of what a
            draft of a small model with a large vocabulary reads. What is never drafted can still
            be generated.
        draft_head: With ``exit_layer``: "int8" drafts with a copy of the LM head, or of the rows
            that ``draft_vocabulary`` leaves of it, in 8 bits per weight. It is kept while the model
            is patched, and costs half of a 16-bit head to read. None: the head itself.
        tree: Check a tree of up to 15 tokens, whose size follows what pays: drafts and what was
            likely besides them; without ``exit_layer`` and ``skip``, tokens from what was seen.
        static: Decode by steps of fixed shapes over a KV cache of fixed capacity; of no account in
            `generate_many`, whose rows come and go.
    """

    exact: ClassVar[bool] = True
    generates: ClassVar[bool] = True

    exit_layer: int | None = None
    skip: Skip | str | None = None
    draft: int | None = None
    draft_vocabulary: int | None = None
    draft_head: str | None = None
    tree: bool = False
    skip_ratio: float | None = None
    static: bool = False

    def __post_init__(self) -> None:
        check_count(self, "exit_layer", 1, optional=True)
        check_count(self, "draft", 1, optional=True)
        if self.draft is not None and self.draft > MAX_DRAFT:
            raise refused(self, "draft", f"be at most {MAX_DRAFT}", self.draft)
        check_count(self, "draft_vocabulary", 1, optional=True)
        if self.draft_head not in (None, "int8"):
            raise refused(self, "draft_head", 'be "int8" or None', self.draft_head)
        for name in ("draft_vocabulary", "draft_head"):
            if getattr(self, name) is not None and self.exit_layer is None:
                rule = "be None without exit_layer, whose drafts alone have a head of their own"
                raise refused(self, name, rule, getattr(self, name))
        check_flag(self, "tree")
        both = self.exit_layer is not None and self.skip is not None
        if both or not (self.exit_layer is not None or self.skip is not None or self.tree):
            given = (self.exit_layer, self.skip, self.tree)
            rule = "be given, or skip, or tree=True, and not both of the first two"
            raise refused(self, "exit_layer", rule, given)
        if self.recycles and self.draft is not None:
            rule = "be None with tree=True alone, whose size follows"
            raise refused(self, "draft", rule, self.draft)
        if self.tree and self.searches:
            rule = 'be False with skip="search", which compares sets by the drafts of a chain'
            raise refused(self, "tree", rule, self.tree)
        check_share(self, "skip_ratio")
        if self.skip_ratio is not None and not self.searches:
            raise refused(self, "skip_ratio", 'be None without skip="search"', self.skip_ratio)
        if self.skip is not None and not self.searches:
            object.__setattr__(self, "skip", _two_lists(self, self.skip))
        self._check_static()

    def _check_static(self) -> None:
        """Raise unless a static step has one form that nothing measured can change."""
        check_flag(self, "static")
        if not self.static:
            return
        if self.exit_layer is None or self.draft is None:
            rule = "be False without exit_layer and draft, which fix what a step does"
            raise refused(self, "static", rule, self.static)
        for name in ("tree", "draft_vocabulary", "draft_head"):
            if getattr(self, name):
                rule = f"be False with {name}, which static steps do not have"
                raise refused(self, "static", rule, self.static)

    @classmethod
    def from_json(cls, path: str | Path, **fields: Any) -> SelfSpeculative:
        """Return the policy with the skip sets of a file that `to_json` wrote.

        Args:
            path: JSON, ``{"attention": [layers], "mlp": [layers]}``.
            fields: Of the policy, besides ``skip``.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds something else: names the file and the field.
        """
        return cls(skip=_skip_files.read_sets(Path(path)), **fields)

    def to_json(self, path: str | Path) -> None:
        """Write the skip sets to a file.

        Raises:
            ValueError: There are none: ``skip`` is None or "search".
        """
        if self.given is None:
            raise refused(self, "skip", "be two lists to be written", self.skip)
        _skip_files.write_sets(Path(path), self.given)

    @property
    def searches(self) -> bool:
        """Whether the skip sets are to be found."""
        return isinstance(self.skip, str) and self.skip == SEARCH

    @property
    def recycles(self) -> bool:
        """Whether no layer drafts, but a table of what was seen."""
        return self.tree and self.exit_layer is None and self.skip is None

    @property
    def given(self) -> Skip | None:
        """The skip sets, if they were given."""
        return None if isinstance(self.skip, str) else self.skip

    def candidates(self, table: Plan) -> Skip:
        """Layers whose attention, and whose MLP, a search may leave out.

        The first and the last layer stay whole, as in SWIFT, and so does the attention that masks
        are made for.
        """
        middle = range(1, len(table.rows) - 1)
        first = _first_of_each_kind(table)
        return tuple(i for i in middle if i not in first), tuple(middle)

    def plan(self, table: Plan) -> Plan:
        """Return ``table``, whose undecided layers become dense.

        Raises:
            ValueError: A layer does not exist, or an earlier policy skips keys while decoding.
        """
        table = begin(self, table)
        layers = len(table.rows)
        if self.exit_layer is not None and self.exit_layer >= layers:
            rule = f"be below the model's {layers} layers, or nothing is left to check with"
            raise refused(self, "exit_layer", rule, self.exit_layer)
        if self.searches and layers < LEAST_LAYERS:
            rule = f"be given for a model of {layers} layers: the first and the last one stay"
            raise refused(self, "skip", rule, self.skip)
        for chosen in self.given or ():
            if chosen and chosen[-1] >= layers:
                raise refused(self, "skip", f"name layers below the model's {layers}", chosen[-1])
        windowed = any(window is not None for window in table.shape.windows)
        if self.static and windowed:
            rule = "be False for a model with windows: a static cache holds every token"
            raise refused(self, "static", rule, self.static)
        if self.static and stock_layers(table):
            rule = "be False with Exact.stock_layers: stock attention reads no lengths of rows"
            raise refused(self, "static", rule, self.static)
        first = _first_of_each_kind(table)
        taken = sorted(first & set(self.given[0])) if self.given else []
        if taken:
            rule = (
                "leave the attention of the first layer in, and of the first with each window: "
                "masks are made for it"
            )
            raise refused(self, "skip", rule, taken[0])
        return table


def _first_of_each_kind(table: Plan) -> set[int]:
    windows = table.shape.windows
    return {windows.index(window) for window in set(windows)}


def _two_lists(policy: SelfSpeculative, skip: object) -> Skip:
    rule = (
        "be two lists of ascending layer numbers from 0, the attention's and the MLPs', or 'search'"
    )
    if not isinstance(skip, list | tuple) or len(skip) != len(("attention", "mlp")):
        raise refused(policy, "skip", rule, skip)
    for layers in skip:
        whole = isinstance(layers, list | tuple) and all(type(i) is int for i in layers)
        if not whole or list(layers) != sorted(set(layers)) or any(i < 0 for i in layers):
            raise refused(policy, "skip", rule, layers)
    if not any(skip):
        raise refused(policy, "skip", "name a layer, or drafts cost what they save", skip)
    return tuple(skip[0]), tuple(skip[1])
