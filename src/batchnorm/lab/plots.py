"""The kinds of figure that experiments share; series differ in colour and, without it, in line.

Figures are drawn at the width of a phone and scaled up elsewhere, so their text is never smaller
than drawn there.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, PercentFormatter

from batchnorm.figures import INK, LOOKS, with_looks

# Inches; at 72 points an inch, 374 points are about the text width of a phone.
WIDTH = 5.2

BAND_ALPHA = 0.22

#: Places on a horizontal axis that each have room for a label like 0.003.
MANY = 8
#: From four decades on, 1, 2 and 5 of each would be 12 numbers or more on an axis.
WIDE = 1e4

# Where the marks of each look stand beside their place, in small steps: on it, equal values of two
# series would hide each other.
SIDES = (-1, 1, 3, -3)

Rows = Sequence[Sequence[float | None]]
"""One row a seed; None where there was no finite number."""


def summary(rows: Rows) -> tuple[list[float], list[float], list[float]]:
    """Return lowest, median and highest over the seeds at each point; NaN where no seed has any."""
    low, middle, high = [], [], []
    for column in zip(*rows, strict=True):
        there = [value for value in column if value is not None] or [math.nan]
        low.append(min(there))
        middle.append(statistics.median(there))
        high.append(max(there))
    return low, middle, high


def curves(
    series: Mapping[str, tuple[Sequence[float], Rows]],
    *,
    xlabel: str,
    ylabel: str,
    level: float | None = None,
    level_label: str = "",
    xscale: str = "log",
    yscale: str = "linear",
    share: bool = True,
    marks: bool = False,
    lines: Mapping[str, Sequence[float]] | None = None,
    like: Sequence[str] = (),
) -> Figure:
    """Draw the median and the range over seeds of something by something.

    Args:
        series: For each name, the places on the horizontal axis and a row of values a seed.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
        level: Where a dotted line goes, if anywhere.
        level_label: What the dotted line is.
        xscale: "log" or "linear".
        yscale: "log" or "linear".
        share: The values are shares of one, and are labelled in percent.
        marks: The places are few, and each median gets a mark.
        lines: What was predicted for series: thin lines of ink.
        like: All series of another figure of the same page, to look as they do there.
    """
    figure = Figure((WIDTH, 3.7))
    axes = figure.subplots()
    _draw(axes, series, xscale=xscale, yscale=yscale, share=share, marks=marks, like=like)
    for place, (name, line) in enumerate((lines or {}).items()):
        label = "_" if place else "predicted"
        axes.plot(series[name][0], line, color=INK, linewidth=0.8, label=label, zorder=1.9)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if level is not None:
        if level > max(value for _, rows in series.values() for value in summary(rows)[2]):
            axes.margins(y=0.14)  # room for the label above it
        axes.axhline(level, color=INK, linewidth=1, linestyle=":")
        axes.annotate(
            level_label,
            (0, level),
            (4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=9,
        )
    _legend(figure, axes)
    return figure


def panels(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Rows]]],
    *,
    xlabel: str,
    ylabel: str | Sequence[str],
    columns: int = 1,
    xscale: str = "log",
    yscale: str = "linear",
    share: bool = True,
    marks: bool = False,
    rings: Mapping[str, float] | None = None,
) -> Figure:
    """Draw `curves` in panels; every panel has the same names.

    Args:
        panels: For each panel title the series, as `curves` takes them.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axes, which then have one scale; or one for each panel.
        columns: How many panels lie side by side.
        xscale: "log" or "linear".
        yscale: "log" or "linear".
        share: The values are shares of one, and are labelled in percent.
        marks: The places are few, and each median gets a mark.
        rings: For each series the place at which its median is ringed, if any.
    """
    height, alike = -(-len(panels) // columns), isinstance(ylabel, str)
    figure = Figure((WIDTH, 0.8 + 2.3 * height))
    grid = figure.subplots(height, columns, sharex=True, sharey=alike, squeeze=False)
    for spare in grid.flat[len(panels) :]:
        spare.remove()
    ylabels = [ylabel] * len(panels) if isinstance(ylabel, str) else ylabel
    for axes, (title, series), label in zip(grid.flat, panels.items(), ylabels, strict=False):
        _draw(axes, series, xscale=xscale, yscale=yscale, share=share, marks=marks)
        for name, place in (rings or {}).items():
            x, rows = series[name]
            axes.plot(
                place,
                summary(rows)[1][list(x).index(place)],
                "o",
                color=INK,
                markersize=13,
                markerfacecolor="none",
                markeredgewidth=1.2,
            )
        axes.set(title=title, ylabel=label)
        axes.label_outer()
        if not alike:
            axes.set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    _legend(figure, grid[0, 0])
    return figure


def _draw(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Rows]],
    *,
    xscale: str,
    yscale: str,
    share: bool,
    marks: bool,
    like: Sequence[str] = (),
) -> None:
    """Draw each series' median as a line in a band over the seeds."""
    for look, name, (x, rows) in with_looks(series, like):
        low, middle, high = summary(rows)
        axes.fill_between(x, low, high, color=look.colour, alpha=BAND_ALPHA, linewidth=0)
        axes.plot(
            x,
            middle,
            color=look.colour,
            linestyle=look.dash,
            marker=look.mark if marks else None,
            markersize=5,
            label=name,
        )
    axes.set(xscale=xscale, yscale=yscale)
    places = sorted({place for x, _ in series.values() for place in x})
    if marks and len(places) <= MANY:
        axes.set_xticks(places)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_plain)
    if yscale == "log":
        _steps_of_a_decade(axes)
    if share:
        axes.yaxis.set_major_formatter(
            _percent if yscale == "log" else PercentFormatter(1, decimals=None)
        )


def sweep(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float | None]]]],
    *,
    horizon: float,
    horizon_label: str,
    chosen: Mapping[tuple[str, str], float],
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Draw a value by learning rate for each series; None is drawn at the horizon, as an open mark.

    Args:
        panels: For each panel title and series name, the seeds' values at each learning rate.
        horizon: What a value of None counts as.
        horizon_label: What it means to be there.
        chosen: The learning rates to ring, by panel title and series name.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
    """
    figure = Figure((WIDTH, 0.8 + 2.9 * len(panels)))
    grid = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, arms) in zip(grid, panels.items(), strict=True):
        for side, (look, name, by_rate) in zip(SIDES, with_looks(arms), strict=False):
            filled = {
                rate: [horizon if value is None else value for value in values]
                for rate, values in by_rate.items()
            }
            middle = [statistics.median(values) for values in filled.values()]
            axes.plot(list(filled), middle, color=look.colour, linestyle=look.dash, label=name)
            for rate, values in by_rate.items():
                for value in values:
                    axes.plot(
                        # Side by side, or equal values of two series would hide each other.
                        rate * 1.06**side,
                        horizon if value is None else value,
                        look.mark,
                        color=look.colour,
                        markersize=5,
                        markerfacecolor="none" if value is None else look.colour,
                    )
            if ringed := chosen.get((title, name)):
                axes.plot(
                    ringed,
                    statistics.median(filled[ringed]),
                    "o",
                    color=INK,
                    markersize=15,
                    markerfacecolor="none",
                    markeredgewidth=1.2,
                )
        axes.axhline(horizon, color=INK, linewidth=1, linestyle=":")
        axes.annotate(
            horizon_label,
            (1, horizon),
            (0, 5),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        axes.margins(y=0.14)  # room for the label below the title
        axes.set(xscale="log", yscale="log", ylabel=ylabel, title=title)
        axes.xaxis.set_major_formatter(_plain)
        _steps_of_a_decade(axes)
    grid[-1].set_xlabel(xlabel)
    _legend(figure, grid[0])
    return figure


def quantile_panels(
    panels: Mapping[str, tuple[Sequence[float], Mapping[str, Rows]]], *, xlabel: str, ylabel: str
) -> Figure:
    """Draw quantiles by step, one panel a series, all on one scale, with labels at the lines."""
    figure = Figure((WIDTH, 0.6 + 2.3 * len(panels)))
    grid = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    labels: list[list[Annotation]] = []
    for axes, (look, title, (x, quantiles)) in zip(grid, with_looks(panels), strict=True):
        labels.append([])
        for name, rows in quantiles.items():
            low, middle, high = summary(rows)
            axes.fill_between(x, low, high, color=look.colour, alpha=BAND_ALPHA, linewidth=0)
            axes.plot(x, middle, color=look.colour, linestyle=look.dash, linewidth=1.3)
            label = axes.annotate(
                name,
                (x[-1], middle[-1]),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                annotation_clip=False,
            )
            if math.isfinite(middle[-1]):
                labels[-1].append(label)
        axes.set(title=title, ylabel=ylabel)
    grid[-1].set_xlabel(xlabel)
    # Only a figure that is laid out knows how many points lie between two lines.
    figure.draw_without_rendering()
    for axes, panel in zip(grid, labels, strict=True):
        heights = [float(axes.transData.transform(label.xy)[1]) for label in panel]
        heights = [height * 72 / figure.dpi for height in heights]
        for label, height, free in zip(panel, heights, apart(heights, 10), strict=True):
            label.set_position((4, free - height))
    return figure


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Move places as far as need be to lie `gap` from each other, in their order.

    The middle one stays.

    >>> apart([5.0, 0.0, 1.0], 10)
    [11.0, -9.0, 1.0]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved, centre = list(places), len(places) // 2
    for below, above in itertools.pairwise(order[centre:]):
        moved[above] = max(moved[above], moved[below] + gap)
    for above, below in itertools.pairwise(order[centre::-1]):
        moved[below] = min(moved[below], moved[above] - gap)
    return moved


def by_layer(series: Mapping[str, Rows], *, xlabel: str, ylabel: str) -> Figure:
    """Draw a value by layer (log scale): the median over seeds, a bar from lowest to highest."""
    figure = Figure((WIDTH, 3.4))
    axes = figure.subplots()
    for side, (look, name, rows) in zip(SIDES, with_looks(series), strict=False):
        low, middle, high = summary(rows)
        # Side by side, or the bars of two series would hide each other.
        x = [layer + 0.04 * side for layer in range(1, len(middle) + 1)]
        axes.vlines(x, low, high, color=look.colour, linewidth=1.5)
        axes.plot(x, middle, color=look.colour, linestyle=look.dash, marker=look.mark, label=name)
        # Of many layers every fifth has room for its number.
        many = len(middle) > 12
        axes.set_xticks([1, *range(5, len(middle) + 1, 5)] if many else range(1, len(middle) + 1))
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    _steps_of_a_decade(axes)
    _legend(figure, axes)
    return figure


def strips(
    series: Mapping[str, Sequence[float]], *, xlabel: str, level: float | None = None
) -> Figure:
    """Draw every seed's value as a mark on a line of its series, and the median as a stroke.

    A dotted line goes through `level`.
    """
    figure = Figure((WIDTH, 0.7 + 0.55 * len(series)))
    axes = figure.subplots()
    # The names stand on the axis, so looks may come again.
    for place, (look, (_, values)) in enumerate(zip(itertools.cycle(LOOKS), series.items())):
        axes.plot(
            values,
            [-place] * len(values),
            look.mark,
            color=look.colour,
            markersize=7,
            markerfacecolor="none",
        )
        middle = statistics.median(values)
        axes.vlines(middle, -place - 0.3, -place + 0.3, color=INK, linewidth=2)
    if level is not None:
        axes.axvline(level, color=INK, linewidth=1, linestyle=":")
    axes.set(xlabel=xlabel, ylim=(-len(series) + 0.4, 0.6))
    axes.set_yticks([-place for place in range(len(series))], list(series))
    # Zero, and every mark whole.
    ends = [0.0, *(value for values in series.values() for value in values)]
    room = 0.05 * (max(ends) - min(ends))
    axes.set_xlim(min(ends) - room if min(ends) < 0 else 0, max(ends) + room)
    axes.grid(visible=False, axis="y")
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Name the series above the axes, where no curve can run through the names."""
    handles, names = axes.get_legend_handles_labels()
    # Inches that a column takes: its line and gaps, and so much for each letter of 10 points.
    column = 0.75 + 0.085 * max(map(len, names))
    columns = max(1, min(3, int(WIDTH / column)))
    figure.legend(handles, names, loc="outside upper right", ncols=columns)


def _plain(value: float, _: object) -> str:
    """Write a tick as 0.1 or 300, which needs no exponent to be read; a millionth as 1e-6."""
    mantissa, e, exponent = f"{value:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _percent(value: float, _: object) -> str:
    """Write a tick as 0.5% or 20%: of one axis with both, each with the digits that it needs."""
    return f"{100 * value:g}%"


def _steps_of_a_decade(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade: the decades alone may leave one number on an axis.

    Many decades are enough by themselves, and there would be no room for more.
    """
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < WIDE else (1,)))
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
