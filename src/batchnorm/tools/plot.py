"""A picture of a diagnosis: how far each layer's running statistics are from the data's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.errors import ArgumentError, BatchNormError, MissingDependencyError
from batchnorm.tools.findings import SEVERITIES, Diagnosis, LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")

#: Inches: names and one panel, and what a second panel adds.
WIDTH, WIDER = 6.4, 2.6

#: Inches a row, and points of a name: with few layers, and with so many that a page is full.
ROOMY, DENSE = (0.24, 8.5), (0.145, 6.5)
FEW = 45

#: Of longer names, what all begin with is left out.
LONGEST_NAME = 24

#: How a layer is marked that findings of a severity name: a letter before its name, and filled
#: marks of so many points. Others are hollow, and smaller.
_MARKED = {"error": ("E", 7.5), "warning": ("W", 6.0)}
_UNMARKED = 4.5

#: Decades of drift that are shown. What is less than the smallest part of the largest lies at the
#: left edge: exact agreement has no place on a logarithmic axis.
DECADES = 5
PNG_DPI = 160

_Get = Callable[[LayerReport], float | None]


def check_file(path: str | os.PathLike[str]) -> Path:
    """Find out beforehand whether `drift` can write there.

    Raises:
        ArgumentError: the name ends in no format, or there is no such directory.
        MissingDependencyError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"expected a picture's name, in {', '.join(SUFFIXES)}; got {path}")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(
            f"expected a directory for {path.name}, got {path.parent}: make it first"
        )
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "to draw, matplotlib is needed, which is not installed. Install it with: "
            "pip install --no-build-isolation '.[tools]' (in the clone)"
        ) from error
    return path


def drift(diagnosis: Diagnosis, path: str | os.PathLike[str]) -> None:
    """Draw how far each layer's running statistics are from those of the data.

    One row a layer, in the order of the model. Left: `mean_drift` (in σ of the data) and
    `var_drift` (of ln variance); marks are filled where an error or a warning names the layer.
    Right, where it is known: what the layer alone contributes to the gap between
    training and evaluation, and its share of the whole gap.

    Args:
        diagnosis: by `diagnose`: `inspect_checkpoint` knows nothing of the data.
        path: ends in .svg, .png or .pdf.

    Raises:
        ArgumentError: nothing is known of any layer's drift; or the path is impossible.
        BatchNormError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    path = check_file(path)
    layers = diagnosis.layers
    if not any(_shown(layer.mean_drift) or _shown(layer.var_drift) for layer in layers):
        raise ArgumentError(
            "expected a diagnosis with the drift of some layer, got none: drawing needs "
            "`diagnose`, which runs the model on data"
        )
    from batchnorm.figures import style

    with style():
        figure = _figure(diagnosis)
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        try:
            # White, for pages that may be dark; without a date, which would make two files differ.
            figure.savefig(
                path,
                dpi=PNG_DPI,
                facecolor="white",
                metadata=dates.get(path.suffix.lower()),
            )
        except OSError as error:
            raise BatchNormError(
                f"expected to write {path}, got: {error.strerror}; make room or choose another file"
            ) from error


def _figure(diagnosis: Diagnosis) -> Figure:
    from matplotlib.figure import Figure

    layers = diagnosis.layers
    row, points = ROOMY if len(layers) <= FEW else DENSE
    attributed = any(_shown(layer.gap) or _shown(layer.share) for layer in layers)
    figure = Figure((WIDTH + WIDER * attributed, 1.5 + row * max(len(layers), 3)))
    panels = figure.subplots(
        1, 1 + attributed, sharey=True, squeeze=False, width_ratios=[2, 1][: 1 + attributed]
    )[0]
    worst = _worst(diagnosis)
    _drifts(panels[0], layers, worst)
    if attributed:
        _attribution(panels[1], diagnosis, worst)
    axes = panels[0]
    axes.set_yticks(range(len(layers)), _labels(layers, worst), fontsize=points)
    for label, layer in zip(axes.get_yticklabels(), layers, strict=True):
        label.set_fontweight("bold" if layer.name in worst else "normal")
    axes.set_ylim(len(layers) - 0.5, -0.5)
    for panel in panels:
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="y", visible=False)
        # Every fifth line guides the eye along the rows; all of them would be a fence.
        for place in range(4, len(layers) - 1, 5):
            panel.axhline(place + 0.5, color=_rule(), linewidth=0.6, zorder=0)
    figure.suptitle(_title(diagnosis), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _drifts(axes: Axes, layers: Sequence[LayerReport], worst: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    from batchnorm.figures import LOOKS

    series: list[tuple[str, _Get, Any]] = [
        ("mean: |running − data| / σ", lambda layer: layer.mean_drift, LOOKS[1]),
        ("variance: |ln(running / data)|", lambda layer: layer.var_drift, LOOKS[0]),
    ]
    known = [
        value for _, get, _ in series for layer in layers if _shown(value := get(layer)) and value
    ]
    high = max([1.0, *(value for value in known if math.isfinite(value))]) * 1.6
    low = max(min([0.01, *known]) / 1.6, high / 10**DECADES)
    for place, layer in enumerate(layers):
        pair = [value for _, get, _ in series if _shown(value := get(layer)) and value is not None]
        ends = [min(max(value, low), high) for value in pair]
        axes.plot(ends, [place] * len(ends), color=_rule(), linewidth=1.2, zorder=1)
    for label, get, look in series:
        _marks(axes, layers, worst, get, look, (low, high), label)
    axes.axvline(1, color=_ink(), linewidth=0.9, zorder=0)
    axes.set(xscale="log", xlim=(low, high), xlabel="drift (root mean square over channels)")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    names = [f"{name} ({_MARKED[name][0]})" for name in _MARKED if name in worst.values()]
    _legend(axes, f"filled: {' or '.join(names)}" if names else "")


def _attribution(axes: Axes, diagnosis: Diagnosis, worst: dict[str, str]) -> None:
    from batchnorm.figures import LOOKS, Look

    layers = diagnosis.layers
    series: list[tuple[str, _Get, Any]] = [
        ("from this layer alone", lambda layer: layer.gap, Look("#000000", "solid", "D")),
        ("its share of the whole", lambda layer: _part(diagnosis, layer), LOOKS[2]),
    ]
    known = [
        float(value)
        for _, get, _ in series
        for layer in layers
        if _shown(value := get(layer)) and value is not None and math.isfinite(value)
    ]
    # Beside the whole, or what is next to nothing would look large.
    whole = 0.0 if diagnosis.gap is None else diagnosis.gap.value
    low, high = min([0.0, *known]), max([whole if math.isfinite(whole) else 0.0, *known])
    room = 0.08 * ((high - low) or 1)
    limits = (low - room, high + room)
    for label, get, look in series:
        _marks(axes, layers, worst, get, look, limits, label)
    axes.axvline(0, color=_ink(), linewidth=0.9, zorder=0)
    if whole and math.isfinite(whole):
        axes.axvline(whole, color=_ink(), linewidth=1.2, linestyle=":", label="the whole gap")
    axes.set(xlim=limits, xlabel="gap")
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(axes)


def _marks(
    axes: Axes,
    layers: Sequence[LayerReport],
    worst: dict[str, str],
    get: _Get,
    look: Any,
    limits: tuple[float, float],
    label: str,
) -> None:
    """A mark a layer, filled where a finding names it; at the edge, an arrow to what is beyond."""
    for place, layer in enumerate(layers):
        value = get(layer)
        if value is None or math.isnan(value):
            continue
        marked = worst.get(layer.name)
        axes.plot(
            min(max(value, limits[0]), limits[1]),
            place,
            "<" if value < limits[0] else ">" if value > limits[1] else look.mark,
            color=look.colour,
            markersize=_MARKED[marked][1] if marked else _UNMARKED,
            markerfacecolor=look.colour if marked else "white",
            markeredgewidth=1.1,
            clip_on=False,
            zorder=3,
        )
    axes.plot([], [], look.mark, color=look.colour, markersize=5, mfc="white", label=label)


def _legend(axes: Axes, filled: str = "") -> None:
    """Above the panel, where no mark can be."""
    if filled:
        axes.plot([], [], "o", color=_ink(), markersize=6, label=filled)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        handletextpad=0.1,
        handlelength=1.4,
        fontsize=8.5,
    )


def _worst(diagnosis: Diagnosis) -> dict[str, str]:
    """The severity of what names each layer; only what is more than good to know."""
    worst: dict[str, str] = {}
    for finding in sorted(diagnosis.findings, key=lambda f: -SEVERITIES.index(f.severity)):
        if finding.severity != SEVERITIES[-1]:
            worst[finding.layer] = finding.severity
    return worst


def _title(diagnosis: Diagnosis) -> str:
    gap = diagnosis.gap
    if gap is None:
        return "Running statistics and those of the data"
    known = gap.recalibrated is not None and math.isfinite(gap.recalibrated)
    left = f", {gap.recalibrated:.2g} with exact statistics" if known else ""
    if not math.isfinite(gap.value):
        return f"Gap between train() and eval(): NaN or infinity{left}"
    error = "" if math.isnan(gap.error) else f" ± {gap.error:.1g}"
    return f"Gap between train() and eval(): {gap.value:.2g}{error}{left}"


def _part(diagnosis: Diagnosis, layer: LayerReport) -> float | None:
    """A layer's share of the gap, in the gap's own unit."""
    if diagnosis.gap is None or layer.share is None:
        return None
    return layer.share * diagnosis.gap.value


def _shown(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _labels(layers: Sequence[LayerReport], worst: dict[str, str]) -> list[str]:
    """Names, without what all begin with where they are long; and what findings say of them."""
    names = [layer.name for layer in layers]
    first = ""
    if max(map(len, names)) > LONGEST_NAME:
        parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
        first = ".".join(part[0] for part in takewhile(lambda part: len({*part}) == 1, parts))
    short = [
        f"…{name.removeprefix(first + '.')}" if first else name or "(the model)" for name in names
    ]
    marks = [_MARKED[worst[name]][0] + "  " if name in worst else "" for name in names]
    return [mark + label for mark, label in zip(marks, short, strict=True)]


def _ink() -> str:
    from batchnorm.figures import INK

    return INK


def _rule() -> str:
    from batchnorm.figures import RULE

    return RULE
