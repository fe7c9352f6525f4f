"""Tune each arm by itself, then judge it at its best on seeds that the tuning never saw.

To compare two arms at one learning rate is to compare how well that rate suits each; so every claim
about training gives each arm its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Run, Table, Trial

SWEEP, EVALUATION = "learning-rate sweep", "evaluation"

# The share of the training rows that stands for the test rows in the sweep: a choice that looked at
# the test rows would flatter every arm, and an arm with many good rates the most.
HELD_OUT = 0.2

#: For recipes.
HOW = (
    f"In the sweep, networks are trained on {1 - HELD_OUT:.0%} of the training rows and judged by "
    "the others; the test rows are for the evaluation alone."
)

# Tuning seeds start here, out of reach of the evaluation seeds 0, 1, 2, …
FIRST_TUNING_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ArmTrial(Trial):
    """One training run of one arm at one learning rate."""

    arm: str
    rate: float


A = TypeVar("A", bound=ArmTrial)
T = TypeVar("T", bound=Trial)


def mean_error(runs: Sequence[Run[Any]]) -> float:
    """Return the mean of `measured["error"]`."""
    return statistics.fmean(run.measured["error"] for run in runs)


def plan(
    template: A,
    runs: Sequence[Run[A]],
    *,
    arms: Sequence[str],
    corners: Sequence[Mapping[str, Any]],
    tuning_seeds: int,
    seeds: int,
    score: Callable[[Sequence[Run[A]]], Any] | None = None,
) -> list[A]:
    """Ask for the sweep, and once that is finished for each arm's evaluation at its best corner.

    Args:
        template: A trial with every field that is the same in all of them.
        runs: The finished runs.
        arms: The arms, paired by seed.
        corners: Values of the fields to tune (`rate`, and others).
        tuning_seeds: How many seeds each corner is tried with.
        seeds: How many seeds each arm is judged by.
        score: Ranks the runs of a corner, least first; the earlier of equal corners wins. None: the
            mean of what they have measured as their error.
    """
    score = score or mean_error
    done = {run.trial: run for run in runs}

    def tuning(arm: str, corner: Mapping[str, Any]) -> list[A]:
        first = replace(template, stage=SWEEP, arm=arm, **corner)
        return [replace(first, seed=FIRST_TUNING_SEED + seed) for seed in range(tuning_seeds)]

    # Arms take turns: they cost unequal time, and an estimate of the time left should not.
    pairs = [(arm, corner) for corner in corners for arm in arms]
    wanted = [trial for arm, corner in pairs for trial in tuning(arm, corner)]
    if any(trial not in done for trial in wanted):
        return wanted

    def best(arm: str) -> Mapping[str, Any]:
        return min(corners, key=lambda corner: score([done[t] for t in tuning(arm, corner)]))

    chosen = [replace(template, stage=EVALUATION, arm=arm, **best(arm)) for arm in arms]
    return wanted + [replace(trial, seed=seed) for seed in range(seeds) for trial in chosen]


def data_for(trial: Trial, data: Dataset) -> Dataset:
    """Return what a trial may see of the data: in the sweep, nothing of the test rows.

    Part of the training rows then stands for them, the same part in every trial.
    """
    if trial.stage != SWEEP:
        return data
    order = np.random.default_rng(0).permutation(len(data.x_train))
    held = round(HELD_OUT * len(order))
    rest, out = order[held:], order[:held]
    return replace(
        data,
        x_train=data.x_train[rest],
        y_train=data.y_train[rest],
        x_test=data.x_train[out],
        y_test=data.y_train[out],
    )


def select(runs: Sequence[Run[T]], **fields: Any) -> list[Run[T]]:
    """Return the runs whose trials have these fields, in the order of the plan."""
    return [r for r in runs if all(getattr(r.trial, k) == v for k, v in fields.items())]


def edge(trial: ArmTrial, rates: Sequence[float]) -> str | None:
    """Return a caveat if the trial's learning rate is the lowest or the highest tried."""
    if min(rates) < trial.rate < max(rates):
        return None
    return (
        f"The best learning rate found for the {trial.arm} network, {trial.rate:g}, is on the edge "
        "of those tried: a better one may lie beyond."
    )


def measured(runs: Sequence[Run[A]], key: str, **fields: Any) -> list[float]:
    """Return what the evaluation runs with these fields have measured, a number a seed."""
    return [r.measured[key] for r in select(runs, stage=EVALUATION, **fields)]


def edges(runs: Sequence[Run[A]], rates: Sequence[float]) -> tuple[str, ...]:
    """Return the caveats of all arms whose best learning rate is the lowest or highest tried."""
    trials = {r.trial.arm: r.trial for r in runs if r.trial.stage == EVALUATION}
    return tuple(caveat for trial in trials.values() if (caveat := edge(trial, rates)))


def table(runs: Sequence[Run[A]], key: str, what: str) -> Table:
    """Return a row an arm: its learning rate, and mean and range of a share over the seeds."""
    rows = []
    for arm in dict.fromkeys(r.trial.arm for r in runs):
        values = measured(runs, key, arm=arm)
        rate = select(runs, stage=EVALUATION, arm=arm)[0].trial.rate
        reach = f"{min(values):.1%}–{max(values):.1%}"
        rows.append((arm, f"{rate:g}", f"{statistics.fmean(values):.1%} ({reach})"))
    return Table(("network", "rate", f"{what} (range)"), tuple(rows))
