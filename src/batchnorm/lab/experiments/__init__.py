"""The claims made for batch normalization, one file each.

To add an experiment, add a module to this package that ends in `EXPERIMENT = Experiment(...)`. It
is found by itself; nothing else needs touching. `convergence.py` is the model to copy, and
`batchnorm.lab.tuning` and `plots` are there to be used. A module supplies:

- `Settings` and `Trial`: frozen dataclasses of plain JSON values, derived from the two below. The
  settings say what to do in a profile ("quick", "full"); a trial holds *everything* one training
  run depends on besides the data, because a trial's fields are its identity on disk.
- `plan(settings, runs)`: every trial wanted so far, in a fixed order. It is called again with the
  finished runs, in that order, until it asks for nothing new; so it can tune a learning rate
  first and ask for the evaluation at the rate found afterwards.
- `run(trial, data)`: one training run, a pure function. It seeds its own generators and leaves
  the global ones alone. Deterministic results go into `Run.measured`, wall times into
  `Run.timing`; both are JSON values, where NaN and infinity become null. It runs in another
  process, perhaps on another machine, so it is a module's top-level function and imports no
  plotting.
- `analyse(settings, runs)`: the `Findings`, with the verdict (`batchnorm.lab.verdict.judge`) and
  the limits of what was shown. Every number in its sentences comes from the runs.
- `figures(settings, runs)`: the `Picture`s, each with a sentence on what to see in it.

Raise `recipe` when `run` changes its meaning: finished runs of the old recipe are then redone.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from batchnorm.errors import ArgumentError
from batchnorm.lab.data import Dataset
from batchnorm.lab.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a profile asks for; `seeds` is the number of evaluation seeds, which users may set."""

    seeds: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run to do; `stage` names the progress bar that it counts under."""

    stage: str
    seed: int


S = TypeVar("S", bound=Settings)
T = TypeVar("T", bound=Trial)


@dataclass(frozen=True)
class Run(Generic[T]):
    """One training run done: `measured` repeats bit for bit, `timing` does not."""

    trial: T
    measured: dict[str, Any]
    timing: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text under column names, ready for a terminal or a page."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Judged:
    """One more claim that the same runs decide.

    `ours` marks what the source does not claim: a control, or a question that readers will have.
    """

    claim: str
    verdict: Verdict
    ours: bool = False


@dataclass(frozen=True)
class Findings:
    """What the runs say, in words whose every number was computed.

    `verdict` is on the experiment's claim, `also` on others that its runs decide, too.
    """

    summary: str
    verdict: Verdict
    table: Table
    recipe: tuple[str, ...]
    caveats: tuple[str, ...]
    not_shown: tuple[str, ...]
    also: tuple[Judged, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A drawn figure; `see` tells the reader what to look for, and what the lines and bands are."""

    name: str
    title: str
    see: str
    figure: Figure


@dataclass(frozen=True)
class Experiment(Generic[S, T]):
    """A claim and the recipe that tests it; the module docstring says what each field must do."""

    name: str
    claim: str
    source: str
    recipe: int
    trial: type[T]
    profiles: Mapping[str, S]
    plan: Callable[[S, Sequence[Run[T]]], list[T]]
    run: Callable[[T, Dataset], Run[T]]
    analyse: Callable[[S, Sequence[Run[T]]], Findings]
    figures: Callable[[S, Sequence[Run[T]]], list[Picture]]


def discover() -> dict[str, Experiment[Any, Any]]:
    """Return every experiment of this package by name, in alphabetical order."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    found: list[Experiment[Any, Any]] = [module.EXPERIMENT for module in modules]
    return {experiment.name: experiment for experiment in sorted(found, key=lambda e: e.name)}


def find(name: str) -> Experiment[Any, Any]:
    """Return the experiment of that name, or raise ArgumentError with the names there are."""
    known = discover()
    if not isinstance(name, str):
        raise ArgumentError(
            f"name: expected the name of one experiment; got {name!r}. Run several one by one, "
            "each in a directory of its own."
        )
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(
            f"There is no experiment called {name!r}.{hint} Expected one of: {', '.join(known)}. "
            "`batchnorm lab list` says what each one tests."
        )
    return known[name]
