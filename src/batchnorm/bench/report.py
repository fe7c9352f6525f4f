"""Prints what a run has found: plain lines of at most 80 characters, short things last."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from batchnorm.bench.cases import FUSIONS, PASSES
from batchnorm.bench.merge import NOISY, Row
from batchnorm.bench.peers import COMPILE, EAGER, PEERS
from batchnorm.bench.results import standing

#: Characters in a line.
WIDTH = 80

#: Widths in characters: a pass and a fusion, a ratio, a mean with its interval. Two allocators of
#: three ratios make 79, of two means too.
_LABELS = (19, 12)
_NUMBER, _MEAN = 8, 12

_SHORT = {EAGER: "eager", COMPILE: "compile"}

Cell = tuple[str, str]
"""A text and its style."""

_NOTHING: Cell = ("-", "")
_WRONG = "wrong result"

_COLOURS = {"ahead": "green", "behind": "red", "": ""}


def show(content: dict[str, Any], console: Console) -> None:
    """Print every row, the geometric means, and the worst case of each pass."""
    for line in (*details(content), Text(), *summary(content)):
        # Lines are never broken or cut: what is in a pipe may be searched and compared.
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def summary(content: dict[str, Any]) -> Iterable[Text]:
    """Yield the geometric means, the worst case of each pass and the notes, line by line."""
    rows = content["rows"]
    if rows:
        yield from _geomeans(content["geomean"])
        yield Text()
        yield from _copies(content["copy"])
        yield Text()
    for row in content["worst"]:
        yield Text(f"Worst {row['pass']}: {_ratio(row)}× {row['peer']} ", style="bold").append(
            f"{reach(row)}:", style="not bold"
        )
        yield Text(f"  {title(row)}, {row['fusion']}, {row['allocator']}")
    for note in content["notes"]:
        yield _paragraph(note, "yellow")
    if wrong := [row for row in rows if row["status"] == "wrong result"]:
        count = len({(title(row), row["pass"], row["fusion"], row["allocator"]) for row in wrong})
        yield Text(f"{count} of our results were wrong: no speed-up for those.", style="bold red")


def details(content: dict[str, Any]) -> Iterable[Text]:
    """Yield every row, case by case, line by line."""
    rows = content["rows"]
    if rows:
        peers, allocators = _columns(rows)
        yield _paragraph(
            "Ratio: time of torch eager or torch.compile / our time, median of paired rounds; "
            "above 1 we are faster. Green and red: the interval of 95 % lies wholly above or below "
            f"1. ~: it is wide, from end to end more than a factor of {NOISY:g}; another run may "
            "say something else. Copy: our speed as a part of a copy's, by the fewest bytes that "
            "must move. Error: largest difference from float64 / largest value."
        )
        columns = (*(_SHORT[peer] for peer in peers), "copy")
        for name in dict.fromkeys(map(title, rows)):
            case = [row for row in rows if title(row) == name]
            yield Text()
            table = _table(case, allocators, partial(_measured, peers=peers))
            yield from _lines(name, allocators, columns, table, _NUMBER)
            yield Text(f"  {_errors(case)}", style="dim")
    for row in content["sizes"]:
        if row["status"] == "wrong result":
            yield Text(f"wrong result: {row['case']}, {row['pass']}", style="bold red")


def title(row: Row) -> str:
    """Return what case a row is about."""
    return f"{row['case']} {row['dtype']} {row['layout']}"


def reach(row: Row) -> str:
    """Return a row's interval in brackets."""
    low, high = row["interval"]
    return f"({low:.2f} to {high:.2f})"


def _geomeans(means: Sequence[Row]) -> Iterable[Text]:
    peers, allocators = _columns(means)
    yield _paragraph(
        "Geometric mean over the cases of the time of torch eager or torch.compile / our time; "
        "above 1 we are faster. ±: interval of 95 % for the same cases measured again, as a factor "
        "(2.00 ±10% is 2.00 / 1.10 to 2.00 × 1.10). ~: it is wide, or most of the cases' own "
        "intervals are. In brackets: interval of 95 %."
    )
    yield Text()
    columns = [_SHORT[peer] for peer in peers]
    table = _table(means, allocators, partial(_means, peers=peers))
    head, names, *body = _lines("geometric mean", allocators, columns, table, _MEAN)
    yield head
    yield names
    cells = [[(_counted(means, peer, allocator), "") for peer in peers] for allocator in allocators]
    yield _line(("  of cases", ""), cells, _MEAN, _gap(allocators, columns, _MEAN))
    yield from body


def _counted(means: Sequence[Row], peer: str, allocator: str) -> str:
    """How many cases are behind a column's means; a range where results were refused."""
    counts = [
        mean["cases"] for mean in means if (mean["peer"], mean["allocator"]) == (peer, allocator)
    ]
    return "-".join(map(str, sorted({min(counts), max(counts)}))) if counts else "-"


def _copies(copies: Sequence[Row]) -> Iterable[Text]:
    allocators = list(dict.fromkeys(row["allocator"] for row in copies))

    def cells(rows: Sequence[Row]) -> list[Cell]:
        share = rows[0]["fraction"] if rows else None
        return [_NOTHING if share is None else (f"{share:.0%}", "")]

    table = _table(copies, allocators, cells)
    yield from _lines("part of a copy's speed", allocators, ("copy",), table, _NUMBER)


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the peers and the allocators that there are."""
    peers = [peer for peer in PEERS if any(row["peer"] == peer for row in rows)]
    return peers, list(dict.fromkeys(row["allocator"] for row in rows))


def _gap(allocators: Sequence[str], columns: Sequence[str], width: int) -> int:
    """Spaces before an allocator's columns, or its name would touch the one before it."""
    return max(0, max(map(len, allocators)) + 2 - len(columns) * width)


def _lines(
    heading: str,
    allocators: Sequence[str],
    columns: Sequence[str],
    table: dict[tuple[str, str], list[list[Cell]]],
    width: int,
) -> Iterable[Text]:
    """The heading with the allocators beside it, above the columns' names, above the cells."""
    space, gap = sum(_LABELS), _gap(allocators, columns, width)
    groups = "".join(name.rjust(gap + len(columns) * width) for name in allocators)
    if len(heading) >= space:  # beside the first column, which is narrow
        yield Text(heading, style="bold")
        heading = ""
    yield Text(heading.ljust(space), style="bold").append(groups, style="not bold")
    names = [[(name, "") for name in columns] for _ in allocators]
    yield _line(("", ""), names, width, gap)
    for (mode, fusion), cells in table.items():
        yield _line((f"  {mode}", fusion), cells, width, gap)


def _line(labels: tuple[str, str], groups: Sequence[Sequence[Cell]], width: int, gap: int) -> Text:
    line = Text("".join(map(str.ljust, labels, _LABELS)))
    for cells in groups:
        line.append(" " * gap)
        for text, style in cells:
            # What refuses to be a number takes the place of two.
            line.append(text.rjust(width * 2 if text == _WRONG else width), style=style)
    return line


def _table(
    rows: Sequence[Row],
    allocators: Sequence[str],
    cells: Callable[[Sequence[Row]], list[Cell]],
) -> dict[tuple[str, str], list[list[Cell]]]:
    """For each pass and fusion that there is, the cells of each allocator."""
    table: dict[tuple[str, str], list[list[Cell]]] = {}
    for mode in PASSES:
        for fusion in FUSIONS:
            here = [row for row in rows if (row["pass"], row["fusion"]) == (mode, fusion)]
            if here:
                table[mode, fusion] = [
                    cells([row for row in here if row["allocator"] == name]) for name in allocators
                ]
    return table


def _measured(rows: Sequence[Row], peers: Sequence[str]) -> list[Cell]:
    """Ratio to each peer and the part of a copy's speed."""
    if any(row["status"] == "wrong result" for row in rows):
        # In the place of the ratio to the last peer and of the part of a copy's speed.
        return [_NOTHING] * (len(peers) - 1) + [(_WRONG, "bold red")]
    by_peer = {row["peer"]: row for row in rows}
    cells = [_NOTHING if peer not in by_peer else _cell(by_peer[peer]) for peer in peers]
    share = rows[0]["bandwidth_fraction"] if rows else None
    return [*cells, _NOTHING if share is None else (f"{share:.0%}", "")]


def _cell(row: Row) -> Cell:
    style = "dim" if row["noisy"] else ""
    return _ratio(row), f"{style} {_COLOURS[standing(*row['interval'])]}".strip()


def _ratio(row: Row) -> str:
    return f"{'~' if row['noisy'] else ''}{row['ratio']:.2f}"


def _means(rows: Sequence[Row], peers: Sequence[str]) -> list[Cell]:
    """Geometric mean and interval of each peer."""
    by_peer = {row["peer"]: row for row in rows}
    return [_mean(by_peer[peer]) if peer in by_peer else _NOTHING for peer in peers]


def _mean(mean: Row) -> Cell:
    if mean["ratio"] is None:
        return _NOTHING
    low, high = mean["interval"] or (0.0, math.inf)
    noisy = high > NOISY * low or 2 * mean["noisy"] > mean["cases"]
    # Three digits, or ±10% would not fit beside them.
    digits = 2 if mean["ratio"] < 10 else 1 if mean["ratio"] < 100 else 0
    ratio = f"{'~' if noisy else ''}{mean['ratio']:.{digits}f}"
    if not low:
        return ratio, "dim"
    either_way = math.sqrt(high / low) - 1
    reach = f"±{either_way:.0%}" if either_way < 0.995 else "±>99%"
    return f"{ratio} {reach}", "dim" if noisy else _COLOURS[standing(low, high)]


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


def _paragraph(text: str, style: str = "") -> Text:
    return Text("\n".join(textwrap.wrap(text, WIDTH, break_long_words=False)), style=style)
