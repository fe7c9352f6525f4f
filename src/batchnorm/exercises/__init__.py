"""The article's exercises, one file each, with checks that the reader runs.

To add one, add a module `eNN_topic.py` that ends in `EXERCISE = Exercise(...)`. It is found by
itself; `e01_forward.py` is the model to copy. A check draws fresh data, calls the answer through
`Answer.call`, and compares by `compare.same` with float64 values that its own module computes.
What a usual mistake would give is computed as well, so that the reader is told which one it is. The
tests hold each exercise to that: its solution passes for many seeds, usual mistakes never do.
"""

from __future__ import annotations

import importlib
import pkgutil
import re

from batchnorm.errors import ArgumentError
from batchnorm.exercises.exercise import Exercise as Exercise
from batchnorm.exercises.grade import Outcome as Outcome
from batchnorm.exercises.grade import grade as grade


def discover() -> dict[int, Exercise]:
    """Return every exercise by its number, in that order."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [
        importlib.import_module(f"{__name__}.{name}")
        for name in names
        if re.fullmatch(r"e\d\d_\w+", name)
    ]
    found: list[Exercise] = [module.EXERCISE for module in modules]
    return {exercise.number: exercise for exercise in sorted(found, key=lambda e: e.number)}


def find(number: int) -> Exercise:
    """Return the exercise of that number.

    Raises:
        ArgumentError: there is none.
    """
    known = discover()
    if number not in known:
        raise ArgumentError(
            f"expected the number of an exercise, {min(known)} to {max(known)}, got {number}; "
            "`batchnorm exercise` lists them"
        )
    return known[number]
