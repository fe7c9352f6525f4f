"""Small batches, repaired afterwards: population statistics, frozen for the end of training."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm import BatchNorm, freeze, recalibrate
from batchnorm.lab import networks, training, tuning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import (
    Experiment,
    Findings,
    Judged,
    Picture,
    Run,
    Settings,
    Table,
)
from batchnorm.lab.tuning import EVALUATION, ArmTrial, select
from batchnorm.lab.verdict import Verdict, judge_shares
from batchnorm.lab.words import counted

#: Ways to normalize in evaluation: the first three are of one training, the last of another.
OWN, RUNNING, POPULATION, FROZEN = WAYS = ("own batch", "running", "population", "frozen")

#: Added to a run's seed for how the test rows are dealt into batches.
TEST_ORDER_OFFSET = 3_000_000_000


@dataclass(frozen=True, kw_only=True)
class FreezingSettings(Settings):
    """Sizes of the normalization's batch, the first of which decides the claims."""

    tuning_seeds: int
    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    # The source freezes 20 of 100 epochs, after the last drop of the rate but one.
    tail: float = 0.25
    batch: int = 64
    width: int = 128
    # Three layers, as in other experiments, end so near to the large batch's error that little is
    # left to repair.
    depth: int = 5


@dataclass(frozen=True, kw_only=True)
class FreezingTrial(ArmTrial):
    """One training run; the arm is the size, and whether the statistics freeze."""

    steps: int
    tail: float
    batch: int
    width: int
    depth: int


Runs = Sequence[Run[FreezingTrial]]

PROFILES = {
    "quick": FreezingSettings(
        seeds=8, tuning_seeds=1, sizes=(4, 8, 64), rates=(0.03, 0.1, 0.3, 1.0), steps=250
    ),
    "full": FreezingSettings(
        seeds=8,
        tuning_seeds=4,
        sizes=(4, 2, 8, 16, 64),
        rates=(0.01, 0.03, 0.1, 0.3, 1.0),
        steps=600,
    ),
}


def arm(size: int, way: str) -> str:
    """The name of the arm that is normalized in this way.

    >>> arm(4, FROZEN), arm(4, RUNNING)
    ('frozen group-of-4', 'group-of-4')
    """
    return f"{FROZEN + ' ' if way == FROZEN else ''}group-of-{size}"


def run(trial: FreezingTrial, data: Dataset) -> Run[FreezingTrial]:
    """Train on groups of a batch; the test error, normalized in each way the arm allows."""
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data))
    size, freezes = int(trial.arm.rpartition("-")[2]), trial.arm.startswith(FROZEN)
    group = None if size == trial.batch else size
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        lambda channels: BatchNorm(channels, virtual_batch_size=group),
        training.generator(trial.seed),
    )
    begins = round(trial.steps * (1 - trial.tail))

    def fix(step: int) -> None:
        if step == begins:
            recalibrate(net, [x])
            freeze(net, affine=False)

    training.fit(
        net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed,
        after=fix if freezes else None,
    )  # fmt: skip

    def error() -> float:
        return 1 - training.accuracy(net, x_test, y_test)

    if freezes:
        return Run(trial, {FROZEN: error()}, {})
    order = torch.Generator().manual_seed(TEST_ORDER_OFFSET + trial.seed)
    shuffled = torch.randperm(len(x_test), generator=order)
    measured = {OWN: own_error(net, x_test[shuffled], y_test[shuffled], size)}
    measured[RUNNING] = error()
    recalibrate(net, [x])
    return Run(trial, measured | {POPULATION: error()}, {})


def own_error(net: nn.Module, x: Tensor, y: Tensor, size: int) -> float:
    """Share of rows wrong if every `size` rows in order are normalized by their own statistics.

    Rows that fill no batch are left out. The network is not touched.
    """
    full = len(x) - len(x) % size
    copied = copy.deepcopy(net).train()
    with torch.no_grad():
        right = sum(
            int((copied(rows).argmax(1) == labels).sum())
            for rows, labels in zip(x[:full].split(size), y[:full].split(size), strict=True)
        )
    return 1 - right / full


def _score(swept: Runs) -> float:
    """The error as such a network is used: frozen, or with running averages."""
    return statistics.fmean(r.measured[FROZEN if FROZEN in r.measured else RUNNING] for r in swept)


def plan(settings: FreezingSettings, runs: Runs) -> list[FreezingTrial]:
    """Tune the learning rate of every size, to the end and frozen, each by itself."""
    shared = {key: getattr(settings, key) for key in ("steps", "tail", "batch", "width", "depth")}
    return tuning.plan(
        FreezingTrial(stage="", seed=0, arm="", rate=0.0, **shared),
        runs,
        arms=[arm(size, way) for size in settings.sizes for way in (RUNNING, FROZEN)],
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
        score=_score,
    )


def _errors(runs: Runs, size: int, way: str) -> list[float]:
    return tuning.measured(runs, way, arm=arm(size, way))


def analyse(settings: FreezingSettings, runs: Runs) -> Findings:
    """Judge frozen statistics against all others at the first size, and these among themselves."""
    size, large = settings.sizes[0], max(settings.sizes)
    mean = {
        (s, way): statistics.fmean(_errors(runs, s, way)) for s in settings.sizes for way in WAYS
    }

    def better(control: str, treated: str, of: int = size) -> Verdict:
        names = control, treated
        return judge_shares(*(_errors(runs, of, way) for way in names), errors=True, names=names)

    def at(s: int, way: str) -> str:
        return f"{select(runs, stage=EVALUATION, arm=arm(s, way))[0].trial.rate:g}"

    rows = [
        (
            f"{s} ({at(s, RUNNING)}; {at(s, FROZEN)})",
            *(f"{mean[s, way]:.1%}" for way in WAYS),
        )
        for s in sorted(settings.sizes)
    ]
    verdict = better(RUNNING, FROZEN)
    return Findings(
        summary=(
            f"Trained on groups of {size}, a network got {mean[size, OWN]:.1%} of the test rows "
            f"wrong when it was evaluated on such groups, {mean[size, RUNNING]:.1%} with running "
            f"averages and {mean[size, POPULATION]:.1%} with the training set's statistics; with "
            f"these frozen for the last {settings.tail:.0%} of its training, "
            f"{mean[size, FROZEN]:.1%}. Groups of {large}: {mean[large, RUNNING]:.1%} with running "
            f"averages, {mean[large, FROZEN]:.1%} frozen."
        ),
        verdict=verdict,
        table=Table(("group (rates)", *WAYS), tuple(rows)),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units, each with "
            f"BatchNorm; SGD with momentum 0.9 on batches of {settings.batch}, {settings.steps} "
            "steps, the rate falling to zero by a cosine. Within the batch, BatchNorm normalizes "
            "groups of samples by themselves (virtual_batch_size), so that the optimizer's batch "
            "stays the same.",
            "One training is evaluated in three ways: test rows in groups of the training's size, "
            "by their own statistics; by running averages (momentum 0.1, over all groups of a "
            "step); by the statistics of all training rows in one batch (recalibrate). Another, "
            f"from the same weights with the same batches, is recalibrated and frozen for its last "
            f"{settings.tail:.0%}; γ and β go on learning.",
            f"Learning rates, tuned for each size and each of the two trainings: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each, by the error with running "
            f"averages, or the frozen statistics. {tuning.HOW} The table has the two rates in "
            "brackets.",
        ),
        caveats=(*tuning.edges(runs, settings.rates), *verdict.caveats()),
        not_shown=(
            "Small batches on many devices, where running averages are those of one device's "
            "groups: here they take in all groups of a step, which makes them better.",
            "Convolutions, whose channels pool over positions as well, so that a small batch is "
            "less small.",
        ),
        also=(
            Judged(
                "Freezing for the end of training is better than to take the same statistics "
                "after it.",
                better(POPULATION, FROZEN),
            ),
            Judged(
                f"Trained on groups of {size}, population statistics evaluate better than running "
                "averages.",
                better(RUNNING, POPULATION),
            ),
            Judged(
                f"Trained on groups of {size}, population statistics evaluate better than the "
                "groups' own.",
                better(OWN, POPULATION),
            ),
            Judged(
                f"Freezing helps on groups of {large} as well.",
                better(RUNNING, FROZEN, large),
            ),
        ),
    )


def figures(settings: FreezingSettings, runs: Runs) -> list[Picture]:
    """Draw the error by the size of the group, and what is won over running averages."""
    from batchnorm.lab import plots

    sizes = sorted(settings.sizes)
    errors = {way: [_errors(runs, size, way) for size in sizes] for way in WAYS}
    error: dict[str, Any] = {way: (sizes, np.transpose(errors[way]).tolist()) for way in WAYS}
    won: dict[str, Any] = {
        way: (sizes, np.transpose(np.subtract(errors[RUNNING], errors[way])).tolist())
        for way in (FROZEN, POPULATION)
    }
    xlabel = "samples normalized together in training (log scale)"
    marks = f"Marks: median of {counted(settings.seeds, 'seed')}; bands: lowest to highest seed."
    return [
        Picture(
            "sizes",
            "Test error by the size of the group in training",
            "Left is smaller. The first three lines are one training, evaluated in three ways; the "
            f"last one froze. See where the lines part. {marks}",
            plots.curves(
                error, xlabel=xlabel, ylabel="test error (log scale)", yscale="log", marks=True
            ),
        ),
        Picture(
            "won",
            "What is won over running averages",
            "The error with running averages less the other's, seed by seed: above the dotted line "
            f"is better. See whether it rises to the left. {marks}",
            plots.curves(
                won,
                xlabel=xlabel,
                ylabel="test error less",
                level=0.0,
                marks=True,
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="freezing",
    claim="Trained with small batches, a network is better if population statistics are frozen for "
    "the end of training.",
    source="Wu & Johnson 2021, “Rethinking ‘Batch’ in BatchNorm” (arXiv:2105.07576)",
    recipe=2,
    trial=FreezingTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
