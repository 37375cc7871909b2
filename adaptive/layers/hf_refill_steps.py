"""What makes the tokens of `generate_many`: plain steps, early exits, or drafts and their check."""

from typing import Any, Protocol

from adaptive.layers import hf_steps
from adaptive.layers.hf_exit_passes import ExitPasses, StretchPasses
from adaptive.layers.hf_exit_steps import AloneSteps, TogetherSteps
from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_requests import RequestRows
from adaptive.layers.hf_row_passes import RowPasses
from adaptive.layers.hf_speculate import steps_of
from adaptive.layers.hf_tree_passes import TreePasses
from adaptive.layers.state import PatchRecord
from adaptive.policy import EarlyExit, SelfSpeculative
from adaptive.policy.early_exit import ALONE


class Steps(Protocol):
    """What makes tokens for each row."""

    def step(self) -> None:
        """Make at least one per row."""

    def align(self) -> None:
        """Let every layer hold every token."""


class PlainSteps:
    """Each a pass of the whole model."""

    def __init__(self, passes: Passes, rows: RequestRows) -> None:
        """Know the model's passes and the rows."""
        self.passes = passes
        self.rows = rows

    def step(self) -> None:
        """Make a token per row."""
        passes, rows = self.passes, self.rows
        logits = passes.plain(rows.last())
        passes.slots += 1
        passes.positions = passes.positions + 1
        rows.keep(rows.choose(logits, []))

    def align(self) -> None:
        """Do nothing: all layers have run."""


class SpeculativeSteps:
    """Each makes as many tokens per row as the check of its drafts finds right, and one more."""

    def __init__(self, inner: hf_steps.Steps, rows: RequestRows) -> None:
        """Know the steps that `generate` makes with rows that stay, and those that do not."""
        self.inner = inner
        self.rows = rows
        inner.begin()

    def step(self) -> None:
        """Draft for the rows that there are now, check and keep."""
        inner = self.inner
        inner.fit()
        inner.passes.furthest = self.rows.ends()
        before = inner.turned_off()
        inner.step()
        inner.log.turned_off += inner.turned_off() - before

    def align(self) -> None:
        """Do nothing: what a check left is what all layers hold."""


def passes_and_steps(
    make: Any, read: Passes, rows: RequestRows, record: PatchRecord
) -> tuple[Passes, Steps]:
    """The passes over a batch, and the steps that make them, as the policies say.

    Args:
        make: Makes passes of a kind over the batch's cache.
        read: Passes that have read the first prompt.
        rows: Of the batch.
        record: Of the model.
    """
    policy = next((p for p in record.policies if p.generates), None)
    if isinstance(policy, SelfSpeculative):
        drafts: TreePasses = make(TreePasses)
        steps = steps_of(policy, drafts, rows, record, keeps_cache=False)
        return drafts, SpeculativeSteps(steps, rows)
    if not isinstance(policy, EarlyExit):
        plain: Passes = make(Passes)
        plain.finish(plain.slots)  # nothing will be taken back from windows
        return plain, PlainSteps(plain, rows)
    log = record.exits
    assert log is not None  # the policy has made it
    alone = policy.rows == ALONE and rows.batch > 1
    passes: Any = make(RowPasses if alone else ExitPasses, policy.layers, log)
    assert isinstance(read, StretchPasses)  # as `Refill` makes it
    passes.head = read.head
    if passes.head is not None:
        passes.head.summarises = rows.searches  # as in `ExitSteps.run`
    form = AloneSteps if alone else TogetherSteps
    return passes, form(policy, record, passes, rows, log)
