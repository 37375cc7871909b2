"""The progress bar of long calls: on a terminal alone, and only once they have taken a while."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SHOW_AFTER_SECONDS = 2.0


class ProgressBar:
    """A bar on stderr, if that is a terminal, that appears when the work takes long."""

    def __init__(self, title: str, total: int, wanted: bool) -> None:
        """Show nothing yet.

        Args:
            title: What is being done.
            total: Steps of the whole work.
            wanted: False: no bar.
        """
        self._console = Console(stderr=True)
        self._wanted = wanted and self._console.is_terminal
        self._title, self._total, self._done = title, total, 0
        self._start = perf_counter()
        self._progress: Progress | None = None

    def __enter__(self) -> ProgressBar:
        """Show nothing yet: short work has no bar."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()

    def step(self, note: str = "") -> None:
        """Count one step, and show it if it is time.

        Args:
            note: To show behind the title.
        """
        self._done += 1
        if self._progress is None and self._wanted:
            if perf_counter() - self._start < SHOW_AFTER_SECONDS:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
            self._progress.add_task(self._title, total=self._total)
        if self._progress is not None:
            text = f"{self._title}, {note}" if note else self._title
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=self._done, description=text)
