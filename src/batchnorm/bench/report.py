"""Prints what a run has found: plain lines of at most 80 characters, short things last."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from batchnorm.bench.cases import FUSIONS, PASSES
from batchnorm.bench.peers import COMPILE, EAGER, PEERS
from batchnorm.bench.results import Row

#: Characters in a line.
WIDTH = 80

#: Widths in characters: a pass and a fusion, a number. Two allocators of three numbers make 77.
_LABELS = (19, 12)
_NUMBER = 8

_SHORT = {EAGER: "eager", COMPILE: "compile"}

Cell = tuple[str, str]
"""A text and its style."""

_NOTHING: Cell = ("-", "")
_WRONG = "wrong result"


def show(content: dict[str, Any], console: Console) -> None:
    """Print every row, the geometric means, and the worst case of each pass."""
    for line in lines(content):
        # Lines are never broken or cut: what is in a pipe may be searched and compared.
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def lines(content: dict[str, Any]) -> Iterable[Text]:
    """Yield what `show` prints, line by line."""
    rows = content["rows"]
    peers = [peer for peer in PEERS if any(row["peer"] == peer for row in rows)]
    allocators = list(dict.fromkeys(row["allocator"] for row in rows))
    if rows:
        yield from _every_row(rows, peers, allocators)
    yield from _wrong_sizes(content["sizes"])
    if rows:
        yield from _geomeans(content["geomean"], peers, allocators)
    yield Text()
    for row in content["worst"]:
        low, high = row["interval"]
        yield Text(f"Worst {row['pass']}: {row['ratio']:.2f}× {row['peer']} ", style="bold").append(
            f"({low:.2f} to {high:.2f}):", style="not bold"
        )
        yield Text(f"  {_title(row)}, {row['fusion']}, {row['allocator']}")
    for note in content["notes"]:
        yield Text("\n".join(textwrap.wrap(note, WIDTH, break_long_words=False)), style="yellow")
    if wrong := [row for row in rows if row["status"] == "wrong result"]:
        count = len({(_title(row), row["pass"], row["fusion"], row["allocator"]) for row in wrong})
        yield Text(f"{count} of our results were wrong: no speed-up for those.", style="bold red")


def _every_row(
    rows: Sequence[Row], peers: Sequence[str], allocators: Sequence[str]
) -> Iterable[Text]:
    yield Text(
        "Ratio: time of torch eager or torch.compile / our time, median of paired\n"
        "rounds; above 1 we are faster. Copy: our speed as a part of a copy's, by the\n"
        "fewest bytes that must move. Error: largest difference from float64 / largest\n"
        "value."
    )
    columns = (*(_SHORT[peer] for peer in peers), "copy")
    for title in dict.fromkeys(map(_title, rows)):
        case = [row for row in rows if _title(row) == title]
        yield Text()
        yield from _header(title, allocators, columns)
        cells = _table(case, allocators, partial(_measured, peers=peers))
        yield from _body(cells)
        yield Text(f"  {_errors(case)}", style="dim")


def _geomeans(
    means: Sequence[Row], peers: Sequence[str], allocators: Sequence[str]
) -> Iterable[Text]:
    yield Text()
    columns = tuple(_SHORT[peer] for peer in peers)
    yield from _header("geometric mean", allocators, columns)
    yield from _body(_table(means, allocators, partial(_ratios, peers=peers)))


def _header(title: str, allocators: Sequence[str], columns: Sequence[str]) -> Iterable[Text]:
    """The title with the allocators beside it, above the columns' names."""
    space, width = sum(_LABELS), len(columns) * _NUMBER
    groups = "".join(name.rjust(width) for name in allocators)
    if len(title) >= space:  # beside the first column, which is narrow
        yield Text(title, style="bold")
        title = ""
    yield Text(title.ljust(space), style="bold").append(groups, style="not bold")
    yield Text(" " * space + "".join(name.rjust(_NUMBER) for name in columns) * len(allocators))


def _table(
    rows: Sequence[Row],
    allocators: Sequence[str],
    cells: Callable[[Sequence[Row]], list[Cell]],
) -> dict[tuple[str, str], list[Cell]]:
    """For each pass and fusion that there is, the cells of all allocators."""
    table: dict[tuple[str, str], list[Cell]] = {}
    for mode in PASSES:
        for fusion in FUSIONS:
            here = [row for row in rows if (row["pass"], row["fusion"]) == (mode, fusion)]
            if here:
                table[mode, fusion] = [
                    cell
                    for name in allocators
                    for cell in cells([row for row in here if row["allocator"] == name])
                ]
    return table


def _body(table: dict[tuple[str, str], list[Cell]]) -> Iterable[Text]:
    for labels, cells in table.items():
        line = Text("  " + labels[0].ljust(_LABELS[0] - 2) + labels[1].ljust(_LABELS[1]))
        for text, style in cells:
            # What refuses to be a number takes the place of two.
            line.append(text.rjust(_NUMBER * 2 if text == _WRONG else _NUMBER), style=style)
        yield line


def _measured(rows: Sequence[Row], peers: Sequence[str]) -> list[Cell]:
    """Ratio to each peer and the part of a copy's speed."""
    if any(row["status"] == "wrong result" for row in rows):
        # In the place of the ratio to the last peer and of the part of a copy's speed.
        return [_NOTHING] * (len(peers) - 1) + [(_WRONG, "bold red")]
    share = rows[0]["bandwidth_fraction"] if rows else None
    return [*_ratios(rows, peers), _NOTHING if share is None else (f"{share:.0%}", "")]


def _ratios(rows: Sequence[Row], peers: Sequence[str]) -> list[Cell]:
    by_peer = {row["peer"]: row["ratio"] for row in rows}
    cells = []
    for peer in peers:
        ratio = by_peer.get(peer)
        cells.append(
            _NOTHING if ratio is None else (f"{ratio:.2f}", "red" if ratio < 1 else "green")
        )
    return cells


def _errors(rows: Sequence[Row]) -> str:
    """Say the largest errors of a case; of ours, where it is the nearest to its bound."""
    ours = max(rows, key=lambda row: _size(row["error"]) / row["error_bound"])
    theirs = max(_size(row["peer_error"]) for row in rows if row["peer"] == EAGER)
    return (
        f"error {_size(ours['error']):.1e} in {ours['error_where']}, at most "
        f"{ours['error_bound']:.1e} allowed; torch eager {theirs:.1e}"
    )


def _size(error: float | None) -> float:
    """JSON has no NaN and no infinity: they are None there."""
    return float("inf") if error is None else error


def _wrong_sizes(sizes: Sequence[Row]) -> Iterable[Text]:
    for row in sizes:
        if row["status"] == "wrong result":
            yield Text(f"wrong result: {row['case']}, {row['pass']}", style="bold red")


def _title(row: Row) -> str:
    return f"{row['case']} {row['dtype']} {row['layout']}"
