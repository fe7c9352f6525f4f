"""Puts together what several processes have found about the same thing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from batchnorm.bench.estimate import estimates

Row = dict[str, Any]

#: What a row is about.
CASE = ("case", "dtype", "layout")
ROW = (*CASE, "pass", "fusion", "allocator", "peer")

#: What a size is about.
SIZE = ("case", "bytes", "pass", "allocator")

#: Rows whose processes are assumed to differ alike; see `estimate.between`. It is the memory of a
#: case that lies one way or another.
ALIKE = (*CASE, "allocator", "peer")

#: An interval that reaches further than this, from end to end, makes a row noisy. It leaves open a
#: factor of 1.22 either way, about what fusing an activation brings in the smallest cases: nothing
#: of what the rows are read for can be seen in such a one.
NOISY = 1.5

_MEDIANS = ("bandwidth_fraction", "ours_us", "peer_us", "copy_us", "faults")
_ERRORS = ("error", "error_bound", "error_where", "peer_error")

#: What is missing where our result was wrong.
_NOTHING = ("ratio", "interval", "noisy", "by_process", *_MEDIANS)


def rows(parts: Iterable[Row]) -> list[Row]:
    """Return one row for each thing measured, in the order in which it was first met.

    A result that was wrong in one process is wrong. `ratio` and `interval` are those of
    `estimate.estimates`, `by_process` the medians behind them; times, faults and the part of a
    copy's speed are medians over the processes of their medians, `rounds` those of all processes.
    """
    merged = []
    for alike in grouped(parts, ALIKE).values():
        found = list(grouped(alike, ROW).values())
        right = [all(part["status"] == "ok" for part in row) for row in found]
        known = [row for row, ok in zip(found, right, strict=True) if ok]
        ratios = iter(estimates([[part["ratios"] for part in row] for row in known]))
        for row, ok in zip(found, right, strict=True):
            first = {key: row[0].get(key) for key in (*ROW, *_ERRORS)}
            nothing = {**dict.fromkeys(_NOTHING), "status": "wrong result", "rounds": 0}
            merged.append({**first, **nothing})
            if not ok:
                continue
            estimate = next(ratios)
            merged[-1] |= {
                "ratio": estimate.value,
                "interval": [estimate.low, estimate.high],
                "noisy": estimate.high > NOISY * estimate.low,
                "by_process": [statistics.median(part["ratios"]) for part in row],
                **{key: statistics.median(part[key] for part in row) for key in _MEDIANS},
                "status": "ok",
                "rounds": sum(len(part["ratios"]) for part in row),
                # On a GPU: whether torch called cuDNN.
                **{key: row[0][key] for key in ("cudnn",) if key in row[0]},
            }
    return merged


def sizes(parts: Iterable[Row]) -> list[Row]:
    """Return one row for each size: medians of the processes' median times."""
    merged = []
    for found in grouped(parts, SIZE).values():
        right = all(part["status"] == "ok" for part in found)
        names = found[0]["us"] if right else ()
        merged.append(
            {
                **{key: found[0][key] for key in SIZE},
                "status": "ok" if right else "wrong result",
                "us": {
                    name: statistics.median(part["us"][name] for part in found) for name in names
                }
                or None,
            }
        )
    return merged


def bytes_of(row: Row) -> int:
    """Return the bytes of the tensor that a row is about, told from its names."""
    sizes = {"float64": 8, "float32": 4}
    return math.prod(map(int, row["case"].split("x"))) * sizes.get(row["dtype"], 2)


def grouped(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows by what they have in common, in the order in which that was first met."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
