"""Shows a run's progress: bars in a terminal, an occasional plain line in a pipe or a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from batchnorm.lab import runner

# Seconds between two lines in a log: often enough to see that it lives.
LINE_EVERY = 5.0


class Bars(runner.Progress):
    """Live bars with an estimate of the time left; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<19}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int, done: int) -> None:
        """Add the stage's bar."""
        self._tasks[name] = self._bars.add_task(name, total=total, completed=done)

    def advance(self, name: str) -> None:
        """Move the stage's bar on by one run."""
        self._bars.advance(self._tasks[name])  # type: ignore[arg-type]

    def note(self, message: str) -> None:
        """Print above the bars."""
        self._bars.console.print(message, soft_wrap=True, highlight=False, markup=False)


class Lines(runner.Progress):
    """A line at the start and the end of a stage, and every few seconds between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._last = self._start = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, name: str, total: int, done: int) -> None:
        """Say how much there is to do, and how much is done already."""
        self._total[name], self._done[name] = total, done
        kept = f", {done} of them done earlier" if done else ""
        self.note(f"{name}: {total} runs{kept}")

    def advance(self, name: str) -> None:
        """Count a run, and say so if it is time or the last one."""
        self._done[name] += 1
        now, last_run = time.monotonic(), self._done[name] == self._total[name]
        if last_run or now - self._last >= LINE_EVERY:
            self._last = now
            self.note(f"{name}: {self._done[name]}/{self._total[name]}, {now - self._start:.0f} s")

    def note(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, soft_wrap=True, highlight=False, markup=False)


def watch(console: Console) -> Bars | Lines:
    """Return the progress display that suits the console."""
    return Bars(console) if console.is_terminal else Lines(console)
