"""How far a tool has come: a bar for who asks for one, or a call of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batchnorm.errors import ArgumentError, MissingDependencyError

Tell = Callable[[int, int | None], object]
"""Gets how many batches have been run, and how many it will have been, or None if nobody knows."""


@contextmanager
def progress_of(what: str, progress: bool | Tell) -> Iterator[Tell]:
    """What to call after each batch: for True, a bar on standard error if that is a terminal.

    Raises:
        ArgumentError: it is neither a bool nor a function.
        MissingDependencyError: a bar is wanted, and rich is not installed.
    """
    if not isinstance(progress, bool):
        if not callable(progress):
            raise ArgumentError(
                f"expected progress to be a bool or a function of (done, total), got {progress!r}"
            )
        yield progress
        return
    if not progress:
        yield lambda *_: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError as error:
        raise MissingDependencyError(
            "progress=True needs rich, which is not installed here: pip install rich, or pass a "
            "function of (done, total)"
        ) from error
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
