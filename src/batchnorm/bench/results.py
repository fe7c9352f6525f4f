"""What a run has found: rows, their geometric means, the worst of them; and the file they go to."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from batchnorm.bench import measure
from batchnorm.bench.cases import PASSES
from batchnorm.errors import ArgumentError, BatchNormError

SCHEMA = 1

#: Significant digits of a number in the file: times repeat to two or three.
DIGITS = 5

#: What every page of results begins with.
HEADING = "# Batch norm beside torch"

Row = dict[str, Any]

GROUP = ("pass", "fusion", "peer", "allocator")


def summarise(
    suite: str, events: Iterable[dict[str, Any]], *, command: str = "batchnorm bench"
) -> dict[str, Any]:
    """Return everything that was found, from the events of the measuring processes.

    Returns:
        `rows`, one for each case, pass, fusion, peer and allocator; `geomean` of their ratios over
        the cases; `worst`, the row with the lowest ratio, for each pass; `sizes`, the time of a
        call by the size of a tensor; `environment`; `notes`, in words; `command`, which measured.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        found.setdefault(event["event"], []).append(
            {key: _short(value) for key, value in event.items() if key != "event"}
        )
    rows = found.get("row", [])
    return {
        "schema": SCHEMA,
        "suite": suite,
        "command": command,
        "environment": found["environment"][0],
        # The same note comes from every case that it concerns.
        "notes": list(dict.fromkeys(note["text"] for note in found.get("note", []))),
        "geomean": geomeans(rows),
        "worst": worst(rows),
        "rows": rows,
        "sizes": found.get("size", []),
    }


def geomeans(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the geometric mean of the ratios over the cases, for each of the rest.

    A row without a ratio is left out of it and counted as refused.
    """
    groups: dict[tuple[str, ...], list[float | None]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in GROUP), []).append(row["ratio"])
    means = []
    for group, ratios in groups.items():
        known = [ratio for ratio in ratios if ratio is not None]
        means.append(
            {
                **dict(zip(GROUP, group, strict=True)),
                "ratio": _short(measure.geometric_mean(known)) if known else None,
                "cases": len(known),
                "refused": len(ratios) - len(known),
            }
        )
    return means


def worst(rows: Sequence[Row]) -> list[Row]:
    """Return the row with the lowest ratio of each pass."""
    known = [row for row in rows if row["ratio"] is not None]
    passes = [mode for mode in PASSES if any(row["pass"] == mode for row in known)]
    return [
        min((row for row in known if row["pass"] == mode), key=lambda row: float(row["ratio"]))
        for mode in passes
    ]


def refused(content: dict[str, Any]) -> list[Row]:
    """Return the rows and sizes whose result was wrong."""
    every = [*content["rows"], *content["sizes"]]
    return [row for row in every if row["status"] == "wrong result"]


def prepare(path: Path) -> None:
    """Find out before the measuring whether `save` will work: it may take 15 minutes.

    Raises:
        ArgumentError: the path cannot be written to.
        MissingDependencyError: the `lab` extra, which draws, is not installed.
    """
    importlib.import_module("batchnorm.bench.plots")
    if path.suffix != ".json":
        raise ArgumentError(f"Expected a file that ends in .json, got {path}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"Cannot make the directory {path.parent} ({error.strerror}). Choose another file with "
            "--json."
        ) from error
    beside = path.with_suffix(".md")
    if beside.exists() and not beside.read_text("utf-8", "replace").startswith(HEADING):
        raise ArgumentError(
            f"Expected {beside} to be a page of results, which is written anew, or not there. "
            "Choose another file with --json."
        )
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArgumentError(
            f"Expected a file that can be written, got {path}"
            f"{', a directory' if path.is_dir() else ''}. Choose another one with --json."
        )


def save(content: dict[str, Any], path: Path) -> list[Path]:
    """Write the file, and a page and the figures beside it; return their paths."""
    from batchnorm.bench import plots
    from batchnorm.bench.page import page

    written = {path: json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"}
    figures = {f"{path.stem}-{name}.svg": svg for name, svg in plots.draw(content).items()}
    written[path.with_suffix(".md")] = page(content, list(figures))
    written |= {path.with_name(name): svg for name, svg in figures.items()}
    for place, text in written.items():
        try:
            place.write_text(text, encoding="utf-8")
        except OSError as error:
            raise BatchNormError(
                f"Cannot write {place} ({error.strerror}). Make room or choose another file with "
                "--json."
            ) from error
    return list(written)


def _short(value: Any) -> Any:
    """Return numbers with `DIGITS` significant digits, and None for those that JSON has not."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) < float("inf") else None
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value
