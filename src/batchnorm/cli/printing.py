"""What all commands print with."""

from typing import Any


def print_table(console: Any, columns: Any, rows: Any) -> None:
    """Print a table that fits into 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # Eight columns with their numbers just fit into 80 characters, with gaps as narrow as these.
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def print_text(console: Any, text: str) -> None:
    """Print without breaking lines: a path or a command must survive being copied."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
