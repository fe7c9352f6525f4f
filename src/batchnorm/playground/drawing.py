"""The playground's pictures: SVG for a page, whose text stays text, in the page's language.

Matplotlib draws in English, which every machine has the letters for; the words of another language
are put in their places afterwards, and the browser has letters for those.
"""

from __future__ import annotations

import html
import io
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from batchnorm import figures
from batchnorm.figures import LOOKS, with_looks
from batchnorm.playground.settings import Settings
from batchnorm.playground.texts import Words
from batchnorm.playground.training import ARMS, BINS, SPAN, Snapshot

History = Sequence[Snapshot]

#: Inches: nearly the width of a phone, so that text is never smaller than it is drawn.
SIZE = (4.6, 3.0)

#: The loss of guessing is ln 10 = 2.3. Where a network has gone far beyond, the curve leaves the
#: picture: the other one's would be a flat line otherwise.
HIGHEST_LOSS = 30.0

#: What 0 is on a logarithmic axis: a gradient that moves no weight.
LEAST = 1e-12

#: Of a row's height, what a histogram may have: it may touch the row above.
TALL = 0.95

#: Rows with room for a number each.
ROOMY = 10

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# Matplotlib's settings are those of the whole process, and each tab's page is drawn in a thread.
_LOCK = threading.Lock()


def draw(history: History, settings: Settings, words: Words) -> str:
    """Return the pictures as HTML: loss, accuracy, gradients, and inputs of the activations.

    Args:
        history: at least one snapshot.
        settings: of the run.
        words: the titles by picture, and what stands in place of the pictures' English words.
    """
    with _LOCK, figures.style():
        drawings = {name: _svg(paint, history, settings) for name, paint in _PICTURES.items()}
    return "".join(
        f'<figure><figcaption id="{name}-title">{html.escape(words[name])}</figcaption>'
        f"{_translated(figures.inline(svg, name), words)}</figure>"
        for name, svg in drawings.items()
    )


def _svg(paint: Callable[[Figure, History, Settings], None], *what: Any) -> str:
    # The margins are fixed: a picture that is drawn anew twice a second must not move.
    figure = Figure(SIZE, layout="none")  # type: ignore[arg-type]  # only the stubs do not know it
    paint(figure, *what)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    return buffer.getvalue()


def _translated(svg: str, words: Words) -> str:
    return re.sub(r">([^<>]+)</text>", lambda text: f">{words.get(text[1], text[1])}</text>", svg)


def _loss(figure: Figure, history: History, settings: Settings) -> None:
    axes = _axes(figure, "step", "training loss")
    _by_step(axes, history, settings, lambda look: look.loss)
    _logarithmic(axes)
    low, high = axes.get_ylim()
    # From where it begins to a tenth of that at least: less would be an axis without a number.
    axes.set_ylim(min(low, 0.09), min(max(high, 3.0), HIGHEST_LOSS))


def _accuracy(figure: Figure, history: History, settings: Settings) -> None:
    axes = _axes(figure, "step", "test accuracy")
    _by_step(axes, history, settings, lambda look: look.accuracy)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _by_step(axes: Axes, history: History, settings: Settings, get: Callable[[Any], float]) -> None:
    series = {
        arm: [(shot.step, get(shot.looks[arm])) for shot in history
              if shot.looks[arm].diverged is None]
        for arm in ARMS
    }  # fmt: skip
    for look, arm, points in with_looks(series):
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, color=look.colour, linestyle=look.dash, label=arm)
        if points:  # also of a single point, and where the curve has come to
            axes.plot(x[-1], y[-1], look.mark, color=look.colour, markersize=5)
    axes.set_xlim(0, settings.steps)
    _legend(axes)


def _gradients(figure: Figure, history: History, settings: Settings) -> None:
    axes = _axes(figure, "layer", "gradient norm")
    for time, shot in (("start", history[0]), ("now", history[-1])):
        series = {arm: shot.looks[arm].gradients for arm in ARMS}
        for look, arm, norms in with_looks(series):
            y = [max(norm, LEAST) for norm in norms]
            x = range(1, len(y) + 1)
            if time == "start":
                axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=0.8, alpha=0.6)
            else:
                axes.plot(x, y, look.mark, color=look.colour, linestyle=look.dash, label=arm,
                          markersize=5)  # fmt: skip
    _logarithmic(axes)
    axes.set_xlim(0.7, settings.depth + 1.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _inputs(figure: Figure, history: History, settings: Settings) -> None:
    """A row a layer, the first at the bottom; heights are shares of the fullest bin."""
    panels = figure.subplots(1, len(ARMS), sharey=True)
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.16, top=0.9, wspace=0.08)
    edges = np.linspace(-SPAN, SPAN, BINS + 1)
    rows = range(1, settings.depth + 1)
    for axes, look, arm in zip(panels, LOOKS, ARMS, strict=False):
        for layer, histogram in zip(rows, history[-1].looks[arm].histograms, strict=False):
            height = np.array(histogram.counts) / max(histogram.counts) * TALL
            axes.stairs(
                layer + height, edges, baseline=layer, fill=True, color=look.colour, alpha=0.55
            )
            if settings.depth <= ROOMY:
                axes.text(SPAN * 1.08, layer + 0.15, f"σ {_short(histogram.std)}", fontsize=8.5)
        room = SPAN * (1.75 if settings.depth <= ROOMY else 1)
        axes.set(title=arm, xlabel="value", xlim=(-SPAN, room), ylim=(0.9, settings.depth + 1.1))
        axes.grid(visible=False, axis="y")
        axes.set_xticks((-4, -2, 0, 2, 4))
        axes.set_yticks(rows[:: math.ceil(settings.depth / ROOMY)])
    panels[0].set_ylabel("layer")


def _short(number: float) -> str:
    """Two digits."""
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else "∞"
    return f"{number:.2g}" if number >= 1e-3 else f"{number:.0e}".replace("e-0", "e-")


def _axes(figure: Figure, xlabel: str, ylabel: str) -> Axes:
    axes: Axes = figure.subplots()
    figure.subplots_adjust(left=0.17, right=0.94, bottom=0.16, top=0.89)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def _logarithmic(axes: Axes) -> None:
    """Powers of ten, in plain letters: matplotlib's own take a third of the time of a picture."""
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        lambda value, _: "10" + str(round(math.log10(value))).translate(RAISED)
    )


def _legend(axes: Axes) -> None:
    """Above the curves, in one line."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(ARMS), borderaxespad=0.2)


_PICTURES = {
    "loss": _loss,
    "accuracy": _accuracy,
    "gradients": _gradients,
    "inputs": _inputs,
}
