"""Running averages lag behind the weights, exact statistics do not; freezing helps at the end."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm import BatchNorm, freeze, recalibrate
from batchnorm.lab import networks, training
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import (
    Experiment,
    Findings,
    Judged,
    Picture,
    Run,
    Settings,
    Table,
    Trial,
)
from batchnorm.lab.verdict import judge
from batchnorm.lab.words import counted

AVERAGE, EXACT = ARMS = ("running average", "exact statistics")
FROZEN = "exact, then frozen"


@dataclass(frozen=True, kw_only=True)
class LagSettings(Settings):
    """Momentums of the running average; epochs; the batch of the small-batch part."""

    momentums: tuple[float, ...]
    epochs: int
    early: int = 3
    rate: float = 0.3
    batch: int = 64
    small: int = 4
    small_steps: int = 500
    tail: float = 0.25
    width: int = 128
    depth: int = 3


@dataclass(frozen=True, kw_only=True)
class LagTrial(Trial):
    """One training run; `small` is 0 for the running average's part."""

    momentum: float
    epochs: int
    rate: float
    batch: int
    small: int
    small_steps: int
    tail: float
    width: int
    depth: int


Runs = Sequence[Run[LagTrial]]

PROFILES = {
    "quick": LagSettings(seeds=4, momentums=(0.1, 0.01), epochs=8),
    "full": LagSettings(seeds=8, momentums=(0.3, 0.1, 0.01), epochs=30, small_steps=2000),
}


def run(trial: LagTrial, data: Dataset) -> Run[LagTrial]:
    """Train; look at the test error with the statistics as they are, and with exact ones."""
    x, y, x_test, y_test = training.tensors(data)
    size = trial.small or None
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        lambda channels: BatchNorm(channels, momentum=trial.momentum, virtual_batch_size=size),
        training.generator(trial.seed),
    )

    def error(of: object) -> float:
        return 1 - training.accuracy(of, x_test, y_test)  # type: ignore[arg-type]

    def exact() -> object:
        copied = copy.deepcopy(net)
        recalibrate(copied, x.split(trial.batch))
        return copied

    if trial.small:
        # Three ends of one training: to the end as it began, or frozen for the last part.
        first = round(trial.small_steps * (1 - trial.tail))
        training.fit(
            net, x, y, rate=trial.rate, steps=first, batch=trial.batch, seed=trial.seed, decay=False
        )
        other = copy.deepcopy(net)
        recalibrate(other, x.split(trial.batch))
        freeze(other, affine=False)
        for end in (net, other):
            training.fit(
                end, x, y, rate=trial.rate / 10, steps=trial.small_steps - first,
                batch=trial.batch, seed=trial.seed + 1, decay=False,
            )  # fmt: skip
        return Run(
            trial,
            {"average": [error(net)], "exact": [error(exact())], "frozen": [error(other)]},
            {},
        )
    average, best = [], []
    for epoch in range(trial.epochs):
        steps = len(x) // trial.batch
        training.fit(
            net, x, y, rate=trial.rate, steps=steps, batch=trial.batch,
            seed=1000 * trial.seed + epoch, decay=False,
        )  # fmt: skip
        average.append(error(net))
        best.append(error(exact()))
    return Run(trial, {"average": average, "exact": best}, {})


def plan(settings: LagSettings, _: Runs) -> list[LagTrial]:
    """Every momentum with large batches, and the default one with small batches."""
    shared = {
        key: getattr(settings, key)
        for key in ("epochs", "rate", "batch", "small_steps", "tail", "width", "depth")
    }
    return [
        LagTrial(stage="training", seed=seed, momentum=momentum, small=small, **shared)
        for seed in range(settings.seeds)
        for momentum, small in [*((m, 0) for m in settings.momentums), (0.1, settings.small)]
    ]


def _of(runs: Runs, momentum: float, small: int) -> Runs:
    return [r for r in runs if (r.trial.momentum, r.trial.small) == (momentum, small)]


def analyse(settings: LagSettings, runs: Runs) -> Findings:
    """Judge exact statistics against the average early on, and frozen ones in small batches."""
    early = settings.early - 1
    slowest = min(settings.momentums)

    def at(momentum: float, name: str, epoch: int) -> list[float]:
        return [r.measured[name][epoch] for r in _of(runs, momentum, 0)]

    unit = "of the test rows wrong"
    verdict = judge(
        at(slowest, "average", early), at(slowest, "exact", early), unit=unit, names=ARMS
    )
    usual = max(settings.momentums)
    small = {
        name: [r.measured[name][0] for r in _of(runs, 0.1, settings.small)]
        for name in ("average", "exact", "frozen")
    }
    rows = [
        (
            f"momentum {momentum:g}, epoch {epoch + 1}",
            f"{statistics.fmean(at(momentum, 'average', epoch)):.1%}",
            f"{statistics.fmean(at(momentum, 'exact', epoch)):.1%}",
            "",
        )
        for momentum in settings.momentums
        for epoch in dict.fromkeys((early, settings.epochs - 1))
    ]
    mean = {name: statistics.fmean(values) for name, values in small.items()}
    rows.append(
        (
            f"normalized over {settings.small}",
            f"{mean['average']:.1%}",
            f"{mean['exact']:.1%}",
            f"{mean['frozen']:.1%}",
        )
    )
    first = {name: statistics.fmean(at(slowest, name, early)) for name in ("average", "exact")}
    return Findings(
        summary=(
            f"After {settings.early} epochs with momentum {slowest:g}, running averages gave "
            f"{first['average']:.1%} of test errors, exact statistics of the same network "
            f"{first['exact']:.1%}. Normalized over {settings.small} samples, a network had "
            f"{mean['average']:.1%} with running averages, and {mean['frozen']:.1%} if exact "
            "statistics were frozen for the end of training."
        ),
        verdict=verdict,
        table=Table(("test error", AVERAGE, EXACT, FROZEN), tuple(rows)),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units; SGD with "
            f"momentum 0.9 at {settings.rate:g}, batches of {settings.batch}. After each epoch a "
            "copy is recalibrated on the training rows; nothing else differs.",
            f"Small batches: groups of {settings.small} are normalized by themselves; for the last "
            f"{settings.tail:.0%} of {settings.small_steps} steps the rate is a tenth, and in one "
            "arm the statistics are made exact and frozen.",
        ),
        caveats=verdict.caveats(),
        not_shown=(
            "That a running average is bad in the end: with a rate that falls, it catches up.",
            "The best learning rate of either: the two are evaluations of one training.",
        ),
        also=(
            Judged(
                f"Exact statistics are better with momentum {usual:g}, too, after "
                f"{settings.early} epochs.",
                judge(
                    at(usual, "average", early), at(usual, "exact", early), unit=unit, names=ARMS
                ),
            ),
            Judged(
                f"Trained with batches of {settings.small}, networks gain from statistics that "
                "are frozen for the end.",
                judge(small["average"], small["frozen"], unit=unit, names=(AVERAGE, FROZEN)),
            ),
        ),
    )


def figures(settings: LagSettings, runs: Runs) -> list[Picture]:
    """Draw the error by epoch."""
    from batchnorm.lab import plots

    slowest = min(settings.momentums)
    epochs = list(range(1, settings.epochs + 1))
    series = {
        name: (epochs, [r.measured[key] for r in _of(runs, slowest, 0)])
        for name, key in ((AVERAGE, "average"), (EXACT, "exact"))
    }
    return [
        Picture(
            "lag",
            f"Test error by epoch, momentum {slowest:g}",
            "One training, evaluated twice: the distance of the lines is the running average's "
            "lag. "
            f"Lines: median of {counted(settings.seeds, 'seed')}; bands: lowest to highest seed.",
            plots.curves(
                series,
                xlabel="epoch (log scale)",
                ylabel="test error",
                level=0.1,
                level_label="10%",
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="lag",
    claim="Running averages lag behind the weights; exact statistics evaluate better.",
    source="Wu & Johnson 2021, “Rethinking ‘Batch’ in BatchNorm” (arXiv:2105.07576)",
    recipe=1,
    trial=LagTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
