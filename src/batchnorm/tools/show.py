"""Prints a diagnosis: the headline, what was found with what to do, and a line for each layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from batchnorm.tools.findings import (
    NOUNS,
    SEVERITIES,
    Diagnosis,
    Finding,
    Gap,
    LayerReport,
    counted,
)

#: Characters in a line, where the terminal has more: longer ones are hard to read.
WIDTH = 110

#: Messages under one code, and layers in the table, before the rest is only counted.
SAME, ROWS = 5, 30

#: Shares of the gap that the headline names, of either sign, and how many of them.
LARGE, NAMED = 0.1, 3

_COLOURS = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_LETTERS = {"error": "E", "warning": "W", "info": "i"}

_Value = Callable[[LayerReport], Any]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value % 1 == 0 else f"{value:.1f}"


#: The columns of the table: a name of two lines, the value, and how it is written.
_COLUMNS: tuple[tuple[str, str, _Value, Callable[[Any], str]], ...] = (
    ("", "channels", lambda layer: layer.channels, str),
    ("", "updates", lambda layer: layer.updates, str),
    ("momen-", "tum", lambda layer: layer.momentum, "{:.3g}".format),
    ("calls", "/pass", lambda layer: layer.calls, _count),
    ("values", "/batch", lambda layer: layer.values, _count),
    ("mean", "drift", lambda layer: layer.mean_drift, _ratio),
    ("var", "drift", lambda layer: layer.var_drift, _ratio),
    ("", "gap", lambda layer: layer.gap, _ratio),
    ("share", "of gap", lambda layer: layer.share, "{:.0%}".format),
)

#: Columns that say nothing where every layer has the same.
_IF_DIFFERENT = ("tum", "/pass")

_LEGEND = {
    "drift": "mean drift: |running − data| / σ of the data, var drift: |ln(running / data)|, root "
    "mean square over channels.",
    "gap": "gap: if this layer alone normalised by its running statistics.",
    "of gap": "share of gap: what goes of the whole if this layer, too, normalises by the batch, "
    "after all before it.",
}


def show(diagnosis: Diagnosis, console: Console, title: str = "") -> None:
    """Print a diagnosis.

    Lines fit the terminal; only names are never cut, so that they can be searched and copied.

    Args:
        diagnosis: by `diagnose` or `inspect_checkpoint`.
        console: where to; in a pipe, its text is plain.
        title: what was looked at.
    """
    width = min(console.width, WIDTH)
    for line in lines(diagnosis, width, title):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def lines(diagnosis: Diagnosis, width: int, title: str = "") -> Iterable[Text]:
    """Yield what `show` prints, line by line."""
    if title:
        yield Text(title, style="bold")
    yield from _headline(diagnosis, width)
    for (severity, code, remedy), group in groupby(
        _sorted(diagnosis.findings), key=lambda f: (f.severity, f.code, f.remedy)
    ):
        yield Text()
        yield from _found(severity, code, remedy, list(group), width)
    if diagnosis.layers:
        yield Text()
        yield from _table(diagnosis, width)
    for note in diagnosis.notes:
        yield Text()
        yield from _wrapped(note, width, style="dim")


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    """The most severe first, then by code; what has the same remedy is together."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.code, f.remedy))


def _headline(diagnosis: Diagnosis, width: int) -> Iterable[Text]:
    counts = [
        (sum(finding.severity == severity for finding in diagnosis.findings), severity)
        for severity in SEVERITIES
    ]
    said = ", ".join(counted(n, NOUNS[severity]) for n, severity in counts if n)
    worst = diagnosis.worst()
    # Without layers there was nothing to be right or wrong.
    style = "" if not diagnosis.layers else _COLOURS[worst] if worst else "bold green"
    layers = counted(len(diagnosis.layers), "batch norm layer")
    yield from _wrapped(f"{layers}: {said or 'nothing found'}", width, style=style)
    if diagnosis.gap is not None:
        yield from _wrapped(_gap(diagnosis.gap), width)
        if diagnosis.findings and (shares := _shares(diagnosis.layers)):
            yield from _wrapped(shares, width)


def _gap(gap: Gap) -> str:
    error = "" if math.isnan(gap.error) else f" ± {gap.error:.1g}"
    known = gap.recalibrated is not None and math.isfinite(gap.recalibrated)
    left = f"; {gap.recalibrated:.2g} would be left with exact running statistics" if known else ""
    if not math.isfinite(gap.value):
        return (
            "How far outputs of train() and eval() differ cannot be said: there is NaN or infinity "
            f"in them{left}. From {counted(gap.batches, 'batch', 'batches')}."
        )
    return (
        f"Outputs of train() and eval() differ by {gap.value:.2g}{error} (1: as much as "
        f"examples differ from each other){left}. From {counted(gap.batches, 'batch', 'batches')}."
    )


def _shares(layers: Sequence[LayerReport]) -> str:
    """Who has the most of the gap."""
    known = [(layer.share, layer.name or "the model") for layer in layers if layer.share]
    large = sorted((part for part in known if abs(part[0]) >= LARGE), key=lambda p: -abs(p[0]))
    parts = ", ".join(f"{name} {share:.0%}" for share, name in large[:NAMED])
    return f"Of that, by layer: {parts}." if parts else ""


def _found(
    severity: str, code: str, remedy: str, findings: Sequence[Finding], width: int
) -> Iterable[Text]:
    head = Text(severity.upper(), style=_COLOURS[severity])
    yield head.append(f" {code} ", style="bold").append(findings[0].title, style="bold")
    said: dict[str, list[str]] = {}
    for finding in findings:
        said.setdefault(finding.message, []).append(finding.layer or "the model")
    for message, layers in list(said.items())[:SAME]:
        yield from _wrapped(f"{_listed(layers)}: {message}", width, "  ", "    ")
    if more := sum(map(len, list(said.values())[SAME:])):
        yield Text(f"  … and {counted(more, 'more layer')}", style="dim")
    if remedy:
        yield from _wrapped(f"→ {remedy}", width, "  ", "    ", style="green")


def _table(diagnosis: Diagnosis, width: int) -> Iterable[Text]:
    layers, hidden = _chosen(diagnosis)
    marks = {
        layer.name: [f for f in _sorted(diagnosis.findings) if f.layer == layer.name]
        for layer in layers
    }
    columns = [
        (first, second, ["-" if (v := value(layer)) is None else form(v) for layer in layers])
        for first, second, value, form in _COLUMNS
        if _worth(diagnosis.layers, value, different=second in _IF_DIFFERENT)
    ]
    wide = [max(map(len, (first, second, *cells))) for first, second, cells in columns]

    def row(cells: Iterable[str]) -> str:
        return "  ".join(map(str.rjust, cells, wide))

    # Numbers first and names last: so a name of any length fits.
    for head, last in (
        (row(first for first, *_ in columns), ""),
        (row(n for _, n, _ in columns), "layer"),
    ):
        if head.strip():
            yield Text(f"   {head}  {last}".rstrip(), style="bold")
    for place, layer in enumerate(layers):
        found = marks[layer.name]
        worst = found[0].severity if found else ""
        line = Text().append(_LETTERS.get(worst, " "), style=_COLOURS.get(worst, ""))
        line.append("  ").append(row(cells[place] for *_, cells in columns))
        line.append(f"  {layer.name or '(the model)'}")
        codes = " ".join(dict.fromkeys(finding.code for finding in found))
        yield line.append(f"  {codes}" if codes else "", style=_COLOURS.get(worst, ""))
    if hidden:
        yield from _wrapped(f"… and {counted(hidden, 'layer')} with less to tell", width, "   ")
    shown = {name for _, name, _ in columns}
    for word, text in _LEGEND.items():
        if word in shown:
            yield from _wrapped(text, width, "   ", style="dim")


def _chosen(diagnosis: Diagnosis) -> tuple[list[LayerReport], int]:
    """The layers of the table, and how many are left out: those without findings, then by share."""
    layers = diagnosis.layers
    if len(layers) <= ROWS:
        return list(layers), 0
    worst = {f.layer: SEVERITIES.index(f.severity) for f in reversed(_sorted(diagnosis.findings))}

    def rank(place: int) -> tuple[float, ...]:
        layer = layers[place]
        size = [layer.share, layer.gap, layer.mean_drift, layer.var_drift]
        return (worst.get(layer.name, 9), *(-_finite(value) for value in size), place)

    return [layers[place] for place in sorted(range(len(layers)), key=rank)[:ROWS]], len(
        layers
    ) - ROWS


def _finite(value: float | None) -> float:
    """For sorting: what is not known is small, what is no number large."""
    return -math.inf if value is None else math.inf if math.isnan(value) else value


def _worth(layers: Sequence[LayerReport], value: _Value, *, different: bool) -> bool:
    """Whether a column says something."""
    values = {value(layer) for layer in layers}
    return len(values) > 1 if different else values != {None}


def _listed(layers: Sequence[str]) -> str:
    """One name, or how many and the first."""
    if len(layers) == 1:
        return layers[0]
    return f"{len(layers)} layers ({', '.join(layers[:3])}{', …' if len(layers) > 3 else ''})"


def _wrapped(
    text: str, width: int, first: str = "", rest: str | None = None, style: str = ""
) -> Iterable[Text]:
    """Broken between words only."""
    for line in textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    ):
        yield Text(line, style=style)
