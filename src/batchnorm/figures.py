"""How every figure looks. Colours are Okabe and Ito's, safe for colour-blind readers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib as mpl

from batchnorm.errors import ArgumentError

T = TypeVar("T")

# The report swaps these two, and the colours of the series, for those of the reader's light or dark
# page; nothing else in a figure may have them.
INK, RULE = "#1b1f25", "#cfd4da"


@dataclass(frozen=True)
class Look:
    """How one series is drawn everywhere."""

    colour: str
    dash: Any
    mark: str


# First series dashed vermillion with squares, second solid blue with circles, third dotted green,
# fourth reddish purple with dashes and dots.
LOOKS = (
    Look("#D55E00", (0, (5, 2)), "s"),
    Look("#0072B2", "solid", "o"),
    Look("#009E73", (0, (1, 1.5)), "^"),
    Look("#CC79A7", (0, (6, 1.5, 1, 1.5)), "D"),
)


def with_looks(series: Mapping[str, T], like: Sequence[str] = ()) -> list[tuple[Look, str, T]]:
    """Return each series with the look that is its place's, or its place's in `like`.

    >>> [(look.mark, name) for look, name, _ in with_looks({"plain": 1, "BatchNorm": 2})]
    [('s', 'plain'), ('o', 'BatchNorm')]

    Raises:
        ArgumentError: There are more series than looks: a figure would hold two that look alike.
    """
    names = list(like or series)
    if len(names) > len(LOOKS):
        raise ArgumentError(
            f"A figure has at most {len(LOOKS)} series, each with a look of its own; got "
            f"{len(names)}: {', '.join(names)}. Draw fewer, or in several figures."
        )
    return [(LOOKS[names.index(name)], name, values) for name, values in series.items()]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw and save in the house style, whatever the user's matplotlibrc says."""
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        # SVG text stays text; a browser is offered these, and the first is what is measured.
        "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
        "font.size": 10,
        "text.color": INK,
        "axes.facecolor": "none",
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "legend.handlelength": 3,
        "lines.linewidth": 1.8,
        "svg.fonttype": "none",
        "svg.hashsalt": "batchnorm",
        "figure.constrained_layout.use": True,
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        yield


def inline(svg: str, name: str) -> str:
    """Return an SVG file as part of a page: no prologue or address, its own ids, the page's ink.

    The page has an element `{name}-title` that names the picture, and says in CSS what --ink,
    --rule and --series1 to --series4 are.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    # Two figures' ids would meet in one page.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    colours = {INK: "ink", RULE: "rule"}
    colours |= {look.colour: f"series{i}" for i, look in enumerate(LOOKS, start=1)}
    for colour, variable in colours.items():
        svg = svg.replace(colour.lower(), f"var(--{variable})")
    # The page sets the size; the viewBox keeps the shape.
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-title"', 1)
