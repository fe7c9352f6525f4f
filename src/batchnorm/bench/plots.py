"""The figures: ratio by case, and the cost of a byte by the size of a tensor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

from batchnorm.bench.cases import PASSES
from batchnorm.bench.estimate import geometric_mean
from batchnorm.bench.merge import Row, bytes_of
from batchnorm.bench.peers import COPY, EAGER, OURS, PEERS
from batchnorm.bench.report import title
from batchnorm.figures import INK, LOOKS, Look, style

#: Inches: three panels beside the names of cases.
WIDTH = 8.0

_PEERS = dict(zip(PEERS, LOOKS, strict=False))

_SIZES: dict[str, Look] = {EAGER: LOOKS[0], OURS: LOOKS[1], COPY: LOOKS[2]}

KB, MB = 1 << 10, 1 << 20


def draw(content: dict[str, Any]) -> dict[str, str]:
    """Return the figures as SVG files, by name."""
    figures: dict[str, Figure] = {}
    known = [row for row in content["rows"] if row["ratio"] is not None]
    with style():
        for allocator in dict.fromkeys(row["allocator"] for row in known):
            figures[f"ratios-{allocator.replace(' ', '-')}"] = ratios(known, allocator)
        if sizes := [row for row in content["sizes"] if row["us"]]:
            figures["sizes"] = cost_by_size(sizes, content["environment"]["cache_bytes"])
        return {name: _svg(figure) for name, figure in figures.items()}


def ratios(every: Sequence[Row], allocator: str) -> Figure:
    """Draw an allocator's ratios by case, a panel a pass: the mean of the fusions and their range.

    The axis is that of all allocators' rows, so that their figures can be laid side by side.
    """
    rows = [row for row in every if row["allocator"] == allocator]
    titles = ordered(rows)
    figure = Figure((WIDTH, 1.8 + 0.24 * len(titles)))
    panels = figure.subplots(1, len(PASSES), sharex=True, sharey=True)
    for axes, mode in zip(panels, PASSES, strict=True):
        for side, (peer, look) in zip((-1, 1), _PEERS.items(), strict=True):
            for place, case in enumerate(titles):
                values = [
                    row["ratio"]
                    for row in rows
                    if (title(row), row["pass"], row["peer"]) == (case, mode, peer)
                ]
                if values:
                    # Side by side, or the marks of two peers would hide each other.
                    y = place + 0.17 * side
                    axes.hlines(y, min(values), max(values), color=look.colour, linewidth=1.2)
                    axes.plot(
                        geometric_mean(values), y, look.mark, color=look.colour, markersize=4.5
                    )
        axes.axvline(1, color=INK, linewidth=1.2)
        axes.set(xscale="log", title=mode)
        _ticks(axes, [1.0, *(row["ratio"] for row in every)])
    panels[0].set_yticks(range(len(titles)), titles, fontsize=8)
    panels[0].invert_yaxis()
    panels[1].set_xlabel(
        "time of the peer / time of batchnorm; right of 1, batchnorm is faster\n"
        f"allocator: {allocator}; cases by layout and dtype, from small to large"
    )
    handles = [
        Line2D(
            [], [], color=look.colour, marker=look.mark, markersize=5, linestyle="none", label=peer
        )
        for peer, look in _PEERS.items()
        if _has(rows, peer)
    ]
    line = Line2D([], [], color=INK, linewidth=1.2, marker=".")
    line.set_label("bn, bn+relu, bn+add+relu: mean (mark) and range (line)")
    figure.legend(handles=[*handles, line], loc="outside upper right", ncols=len(handles) + 1)
    return figure


def ordered(rows: Sequence[Row]) -> list[str]:
    """Return the titles by layout and dtype, as they come in the suite, and from small to large."""
    kinds = list(dict.fromkeys((row["layout"], row["dtype"]) for row in rows))
    layouts = list(dict.fromkeys(layout for layout, _ in kinds))
    by_size = sorted(
        rows,
        key=lambda row: (
            layouts.index(row["layout"]),
            kinds.index((row["layout"], row["dtype"])),
            bytes_of(row),
        ),
    )
    return list(dict.fromkeys(map(title, by_size)))


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """Reach a little beyond the values; number as finely as there is room for."""
    low, high = min(values) / 1.15, max(values) * 1.15
    axes.set_xlim(low, high)
    room = high / low
    subs = (1, 2, 5) if room < 300 else (1, 3) if room < 1000 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def cost_by_size(sizes: Sequence[Row], caches: dict[str, int]) -> Figure:
    """Draw nanoseconds per KB by the size of a tensor: a row a pass, a column an allocator."""
    passes = list(dict.fromkeys(row["pass"] for row in sizes))
    allocators = list(dict.fromkeys(row["allocator"] for row in sizes))
    figure = Figure((WIDTH, 0.8 + 2.7 * len(passes)))
    grid = figure.subplots(len(passes), len(allocators), sharex=True, sharey=True, squeeze=False)
    for line, mode in zip(grid, passes, strict=True):
        for axes, allocator in zip(line, allocators, strict=True):
            here = [row for row in sizes if (row["pass"], row["allocator"]) == (mode, allocator)]
            for name, look in _SIZES.items():
                axes.plot(
                    [row["bytes"] for row in here],
                    [row["us"][name] * 1e3 / (row["bytes"] / KB) for row in here],
                    color=look.colour,
                    linestyle=look.dash,
                    marker=look.mark,
                    markersize=3.5,
                )
            axes.set(xscale="log", yscale="log", title=f"{mode}, {allocator}")
            _mark(axes, caches, [row["bytes"] for row in sizes])
    for axes in grid[:, 0]:
        axes.set_ylabel("time per KB of the tensor (ns)")
    for axes in grid[-1]:
        axes.set_xlabel("size of the tensor (float32, 64 channels)")
    _legend(figure, _SIZES)
    return figure


def _mark(axes: Axes, caches: dict[str, int], sizes: Sequence[int]) -> None:
    """Write sizes in KB and MB, and show where the tensor fills each cache."""
    ticks = [size for size in (KB << (2 * k) for k in range(10)) if size <= 1.5 * max(sizes)]
    axes.xaxis.set_major_locator(FixedLocator(ticks[::2]))
    axes.xaxis.set_minor_locator(FixedLocator(ticks[1::2]))
    axes.xaxis.set_major_formatter(
        lambda size, _: f"{size / MB:g} MB" if size >= MB else f"{size / KB:g} KB"
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.15g}")
    for name, size in caches.items():
        if min(sizes) < size < max(sizes):
            axes.axvline(size, color=INK, linewidth=0.9, linestyle=":")
            axes.annotate(
                name,
                (size, 1),
                (-2, -1),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
            )


def _legend(figure: Figure, looks: dict[str, Look]) -> None:
    """Name the series above the panels."""
    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.mark,
            markersize=5,
            linestyle=look.dash,
            label=name,
        )
        for name, look in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # White, for pages that may be dark; without a date, which would make two files differ.
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def _has(rows: Sequence[Row], peer: str) -> bool:
    return any(row["peer"] == peer for row in rows)
