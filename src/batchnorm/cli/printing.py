"""What all commands print with."""

import re
from typing import Any

#: Chinese characters and their punctuation, and the full-width forms.
_WIDE = r"\u2e80-\u303f\u3400-\u9fff\uff00-\uffef"

#: What a line may end after: a word, or a wide character; and the closing marks that follow it.
_PIECE = re.compile(rf" *[（「]*(?:[^ {_WIDE}]+|[{_WIDE}])[，。；：、！？）」]*| +$")


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


def wrapped(text: str, width: int) -> list[str]:
    """Break text into lines; unlike rich, between Chinese characters, too.

    Example:
        >>> wrapped("用 float32 时，先减去均值。", 16)
        ['用 float32 时，', '先减去均值。']
        >>> wrapped("Subtract the mean first.", 16)
        ['Subtract the', 'mean first.']
    """
    from rich.cells import cell_len, chop_cells

    width = max(width, 2)  # a Chinese character takes as much
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for piece in _PIECE.findall(paragraph):
            if line and cell_len(line + piece) > width:
                lines += chop_cells(line, width)
                line = piece.lstrip()
            else:
                line += piece
        lines += chop_cells(line, width) if line else [""]
    return lines
