"""What a run has found: rows, their geometric means, the worst of them; and the file they go to."""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from batchnorm.bench import merge
from batchnorm.bench.cases import PASSES
from batchnorm.bench.estimate import between, geometric_mean
from batchnorm.bench.merge import Row, grouped
from batchnorm.bench.peers import EAGER
from batchnorm.errors import ArgumentError, BatchNormError

#: 2: rows of several processes; see merge.rows.
SCHEMA = 2

#: Significant digits of a number in the file: times repeat to two or three.
DIGITS = 5

#: Bytes that a full suite's results take, with figures and to spare.
ROOM = 2 << 20

#: What every page of results begins with.
HEADING = "# Batch norm beside torch"

GROUP = ("pass", "fusion", "peer", "allocator")


def summarise(
    suite: str,
    events: Iterable[dict[str, Any]],
    *,
    command: str = "batchnorm bench",
    filter: str = "",  # noqa: A002 - the option's name
    complete: bool = True,
) -> dict[str, Any]:
    """Return everything that was found, from the events of the measuring processes.

    Returns:
        `rows`, one for each case, pass, fusion, peer and allocator; `geomean` of their ratios over
        the cases; `copy`, the geometric mean of the parts of a copy's speed; `worst`, the row with
        the lowest ratio, for each pass; `sizes`, the time of a call by the size of a tensor;
        `environment`; `load`, the part of the processors' time that others used before and while
        each process measured; `kernels`, how many cases and fusions our C++ operators served;
        `notes`, in words; `command`, which measured; `complete`, false after Ctrl-C.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        found.setdefault(event["event"], []).append(
            {key: value for key, value in event.items() if key != "event"}
        )
    rows = short(merge.rows(found.get("row", [])))
    native = [event["native"] for event in found.get("kernels", [])]
    loads: dict[str, list[float | None]] = {"before": [], "during": []}
    for event in found.get("load", []):
        loads[event["when"]].append(event["others"])
    return {
        "schema": SCHEMA,
        "suite": suite,
        "filter": filter,
        "command": command,
        "complete": complete,
        "environment": found["environment"][0],
        "load": short(loads),
        "kernels": {"native": sum(native), "others": len(native) - sum(native)},
        # The same note comes from every case that it concerns.
        "notes": list(dict.fromkeys(note["text"] for note in found.get("note", []))),
        "geomean": geomeans(rows),
        "copy": copies(rows),
        "worst": worst(rows),
        "rows": rows,
        "sizes": short(merge.sizes(found.get("size", []))),
    }


def geomeans(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the geometric mean of the ratios over the cases, for each of the rest.

    Its interval is for the same cases measured again, not for others: that of the processes' own
    geometric means, by `estimate.between`. A row without a ratio is left out and counted as
    refused; without as many processes in every row there is no interval.
    """
    means = []
    for alike in grouped(rows, ("peer", "allocator")).values():
        groups = grouped(alike, GROUP)
        known = {
            group: [row for row in members if row["ratio"] is not None]
            for group, members in groups.items()
        }
        processes = [
            [geometric_mean(column) for column in zip(*columns, strict=False)]
            for right in known.values()
            if (columns := [row["by_process"] for row in right])
        ]
        intervals = iter(between(processes))
        for group, right in known.items():
            ratio = geometric_mean([row["ratio"] for row in right]) if right else None
            reach = None
            if ratio is not None:
                low, high = (estimate := next(intervals)).low, estimate.high
                if high < math.inf and len({len(row["by_process"]) for row in right}) == 1:
                    # The mean of medians is not quite the median of means.
                    reach = [min(low, ratio), max(high, ratio)]
            means.append(
                {
                    **dict(zip(GROUP, group, strict=True)),
                    "ratio": ratio,
                    "interval": reach,
                    "cases": len(right),
                    "noisy": sum(row["noisy"] for row in right),
                    "refused": len(groups[group]) - len(right),
                }
            )
    return [short(mean) for mean in means]


def copies(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the geometric mean over the cases of the part of a copy's speed, for each of the rest.

    Ours is the same whatever it is compared with, so the rows beside one peer say it.
    """
    groups = grouped((row for row in rows if row["peer"] == EAGER), ("pass", "fusion", "allocator"))
    known = {
        group: [row["bandwidth_fraction"] for row in members if row["ratio"] is not None]
        for group, members in groups.items()
    }
    return [
        {
            **dict(zip(("pass", "fusion", "allocator"), group, strict=True)),
            "fraction": short(geometric_mean(shares)) if shares else None,
            "cases": len(shares),
        }
        for group, shares in known.items()
    ]


def standing(low: float, high: float) -> str:
    """Say what an interval of a ratio, as it is printed, leaves no doubt of; or nothing.

    >>> standing(1.204, 1.31), standing(0.95, 1.2), standing(0.871, 0.996), standing(0.871, 0.97)
    ('ahead', '', '', 'behind')
    """
    return "ahead" if round(low, 2) > 1 else "behind" if round(high, 2) < 1 else ""


def behind(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose interval lies wholly below 1, the lowest ratio first."""
    known = [row for row in rows if row["ratio"] is not None]
    lost = [row for row in known if standing(*row["interval"]) == "behind"]
    return sorted(lost, key=lambda row: float(row["ratio"]))


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
    """Find out before the measuring whether `save` will work: it may take half an hour.

    Raises:
        ArgumentError: the path cannot be written to, or holds something else than results.
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
    for place in (path, incomplete(path)):
        _check_written_by_us(place)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(ROOM))
        for place in (path, path.with_suffix(".md")):
            if place.exists():
                place.open("ab").close()
    except OSError as error:
        raise ArgumentError(
            f"Cannot write {path} ({error.strerror}). Make room or choose another file with --json."
        ) from error


def incomplete(path: Path) -> Path:
    """Return where results go that Ctrl-C has cut short: they replace no complete ones."""
    return path.with_stem(f"{path.stem}-incomplete")


def _check_written_by_us(path: Path) -> None:
    """Refuse to overwrite what is neither results nor a page of results."""
    if path.is_dir():
        raise ArgumentError(
            f"Expected a file that can be written, got {path}, a directory. Choose another one "
            "with --json."
        )
    if path.exists():
        try:
            content = json.loads(path.read_text("utf-8", "replace"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or not {"schema", "suite", "geomean"} <= content.keys():
            raise ArgumentError(
                f"Expected {path} to be results of `batchnorm bench`, which are written anew, or "
                "not there. Choose another file with --json."
            )
    beside = path.with_suffix(".md")
    if beside.exists() and not beside.read_text("utf-8", "replace").startswith(HEADING):
        raise ArgumentError(
            f"Expected {beside} to be a page of results, which is written anew, or not there. "
            "Choose another file with --json."
        )


def save(content: dict[str, Any], path: Path) -> list[Path]:
    """Write the file, and a page and the figures beside it; return their paths.

    What is not complete goes to `incomplete(path)`, without figures, in which nobody would see it.
    """
    from batchnorm.bench import plots
    from batchnorm.bench.page import page

    drawn = plots.draw(content) if content["complete"] else {}
    path = path if content["complete"] else incomplete(path)
    written = {path: json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"}
    figures = {f"{path.stem}-{name}.svg": svg for name, svg in drawn.items()}
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


def short(value: Any) -> Any:
    """Return numbers with `DIGITS` significant digits, and None for those that JSON has not."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) < float("inf") else None
    if isinstance(value, list):
        return [short(item) for item in value]
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return value
