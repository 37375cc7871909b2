"""What every command shares: the error of a user's mistake, and how progress is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class UsageError(Exception):
    """The user asked for something impossible. The text says what to do instead."""


class Steps:
    """A progress bar of a known number of named steps."""

    def __init__(self, progress: Progress, total: int) -> None:
        """Show ``total`` steps on ``progress``."""
        self._progress = progress
        self._task = progress.add_task("starting", total=total)
        self._started = False

    def next(self, text: str) -> None:
        """Finish the step that runs, if any, and start the one called ``text``."""
        if not self._progress.console.is_terminal:  # a log: lines instead of a bar
            self._progress.console.print(text, highlight=False)
        self._progress.update(self._task, description=text, advance=int(self._started))
        self._started = True


@contextmanager
def steps(console: Console, total: int) -> Iterator[Steps]:
    """Show progress on ``console`` (stderr) and remove it at the end.

    Four refreshes a second: the bar runs beside measurements and must not disturb them.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        yield Steps(progress, total)


def quiet() -> None:
    """Silence what optional packages say on import; none of it concerns the user's command."""
    for name in ("torchao", "torch.utils._pytree", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
