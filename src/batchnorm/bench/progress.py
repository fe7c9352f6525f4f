"""Shows how far the measuring has come: a bar in a terminal, one line in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

from batchnorm.bench import runner


class Bar(runner.Progress):
    """A bar beside what is being measured; use as a context manager."""

    def __init__(self, console: Console) -> None:
        # Of a narrow line, only what is measured gives way.
        def fixed() -> Column:
            return Column(no_wrap=True)

        self._console = console
        self._bars = Bars(
            BarColumn(bar_width=12, table_column=fixed()),
            MofNCompleteColumn(table_column=fixed()),
            TimeElapsedColumn(table_column=fixed()),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            # A thread that draws would take its turns on the cores that are being measured.
            auto_refresh=False,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()

    def start(self, suite: str, total: int, minutes: float | None) -> None:
        """Draw an empty bar; where nobody would see it, say once what is to be expected."""
        self._task = self._bars.add_task("", total=total)
        self._begun = False
        if not self._console.is_terminal:
            known = "" if minutes is None else f", about {expected(minutes)} on 2 quiet cores"
            self.note(f"Measuring the {suite} suite: {total} steps{known}.")

    def step(self, what: str) -> None:
        """Say what is measured now; what was before is finished."""
        self._bars.update(self._task, advance=int(self._begun), description=what, refresh=True)
        self._begun = True

    def note(self, text: str) -> None:
        """Print a line, above the bar."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def expected(minutes: float) -> str:
    """Return a duration in words, no finer than such a guess is.

    >>> expected(30), expected(1.2), expected(0.1)
    ('30 minutes', 'a minute', '20 seconds')
    """
    if minutes >= 1.5:
        return f"{minutes:.0f} minutes"
    # Four processes take some ten seconds to start, whatever they measure then.
    return "a minute" if minutes >= 0.7 else f"{max(20, round(minutes * 6) * 10)} seconds"
