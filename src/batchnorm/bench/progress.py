"""Shows how far the measuring has come: a bar in a terminal, nothing in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

from batchnorm.bench import runner


class Bar(runner.Progress):
    """A bar beside what is being measured; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            # A thread that draws would take its turns on the cores that are being measured.
            auto_refresh=False,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()

    def start(self, total: int) -> None:
        """Draw an empty bar."""
        self._task = self._bars.add_task("", total=total)
        self._begun = False

    def step(self, what: str) -> None:
        """Say what is measured now; what was before is finished."""
        self._bars.update(self._task, advance=int(self._begun), description=what, refresh=True)
        self._begun = True
