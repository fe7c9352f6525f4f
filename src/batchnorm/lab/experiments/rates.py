"""Larger learning rates: the largest at which a deep network still learns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm import BatchNorm
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
from batchnorm.lab.verdict import Verdict, judge
from batchnorm.lab.words import counted

PLAIN, NORMALIZED = ARMS = ("plain", "BatchNorm")


@dataclass(frozen=True, kw_only=True)
class RatesSettings(Settings):
    """The network, the rates, and what counts as having learned."""

    rates: tuple[float, ...]
    steps: int
    threshold: float = 0.9
    depth: int = 12
    width: int = 100
    batch: int = 60


@dataclass(frozen=True, kw_only=True)
class RatesTrial(Trial):
    """One training run."""

    arm: str
    rate: float
    steps: int
    depth: int
    width: int
    batch: int


Runs = Sequence[Run[RatesTrial]]

PROFILES = {
    "quick": RatesSettings(seeds=4, rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), steps=200),
    "full": RatesSettings(
        seeds=8,
        rates=(0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
        steps=1000,
    ),
}


def run(trial: RatesTrial, data: Dataset) -> Run[RatesTrial]:
    """Plain SGD at a constant rate; the test accuracy at the end."""
    x, y, x_test, y_test = training.tensors(data)
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        BatchNorm if trial.arm == NORMALIZED else networks.nothing,
        training.generator(trial.seed),
    )
    training.fit(
        net,
        x,
        y,
        rate=trial.rate,
        steps=trial.steps,
        batch=trial.batch,
        seed=trial.seed,
        momentum=0.0,
        decay=False,
    )
    return Run(trial, {"accuracy": training.accuracy(net, x_test, y_test)}, {})


def plan(settings: RatesSettings, _: Runs) -> list[RatesTrial]:
    """Both arms at every rate, with every seed."""
    return [
        RatesTrial(
            stage="rates",
            seed=seed,
            arm=arm,
            rate=rate,
            steps=settings.steps,
            depth=settings.depth,
            width=settings.width,
            batch=settings.batch,
        )
        for seed in range(settings.seeds)
        for rate in settings.rates
        for arm in ARMS
    ]


def _accuracies(runs: Runs, arm: str) -> dict[int, dict[float, float]]:
    """By seed and rate."""
    found: dict[int, dict[float, float]] = {}
    for r in runs:
        if r.trial.arm == arm:
            found.setdefault(r.trial.seed, {})[r.trial.rate] = r.measured["accuracy"]
    return found


def analyse(settings: RatesSettings, runs: Runs) -> Findings:
    """Judge the largest rate that learns, the best accuracy, and the accuracy at the smallest."""
    level = f"{settings.threshold:.0%}"
    by = {arm: list(_accuracies(runs, arm).values()) for arm in ARMS}
    largest = {
        arm: [
            max((rate for rate, a in rates.items() if a >= settings.threshold), default=None)
            for rates in by[arm]
        ]
        for arm in ARMS
    }
    best = {arm: [max(rates.values()) for rates in by[arm]] for arm in ARMS}
    lowest = min(settings.rates)
    small = {arm: [rates[lowest] for rates in by[arm]] for arm in ARMS}
    # A network that learned at no rate counts as one that needs a smaller one than any tried.
    floor = math.log10(lowest) - 1
    decades = {
        arm: [floor if rate is None else math.log10(rate) for rate in largest[arm]] for arm in ARMS
    }
    verdict = judge(
        decades[PLAIN],
        decades[NORMALIZED],
        unit="decades of the learning rate",
        higher_is_better=True,
        names=ARMS,
    )

    def better(of: dict[str, list[float]]) -> Verdict:
        return judge(
            of[PLAIN], of[NORMALIZED], unit="of accuracy", higher_is_better=True, names=ARMS
        )

    rows = []
    said = {}
    for arm in ARMS:
        reached = [rate for rate in largest[arm] if rate is not None]
        said[arm] = f"{statistics.median(reached):g}" if reached else "none of them"
        rows.append(
            (
                arm,
                said[arm],
                f"{len(reached)} of {len(largest[arm])}",
                f"{statistics.fmean(best[arm]):.1%}",
                f"{statistics.fmean(small[arm]):.1%}",
            )
        )
    edge = max(settings.rates)
    caveats = [
        f"The {arm} network still learned at {edge:g}, the largest rate tried: its limit lies "
        "higher."
        for arm in ARMS
        if edge in largest[arm]
    ]
    return Findings(
        summary=(
            f"The largest learning rate at which the network got to {level} test accuracy was "
            f"{said[PLAIN]} without and {said[NORMALIZED]} with BatchNorm (median of "
            f"{counted(settings.seeds, 'seed')})."
        ),
        verdict=verdict,
        table=Table(
            ("network", "largest rate", "seeds that learned", "best accuracy", f"at {lowest:g}"),
            tuple(rows),
        ),
        recipe=(
            f"{settings.depth} hidden layers of {settings.width} ReLU units, He's initial weights; "
            f"plain SGD at a constant rate, {settings.steps} steps, batches of {settings.batch}.",
            "One network is plain; the other has BatchNorm before each ReLU.",
            f"Rates: {', '.join(f'{rate:g}' for rate in settings.rates)}. What counts is the "
            f"largest with a test accuracy of {level} at the end.",
        ),
        caveats=(*caveats, *verdict.caveats()),
        not_shown=(
            "That larger rates are why networks with batch normalization generalise, which the "
            "source goes on to argue.",
            "Networks with residual connections, or other optimisers, in which plain networks bear "
            "larger rates, too.",
        ),
        also=(
            Judged("At its best rate, the normalized network is more accurate.", better(best)),
            Judged(
                f"At the smallest rate tried, {lowest:g}, the normalized network is more accurate.",
                better(small),
            ),
        ),
    )


def figures(settings: RatesSettings, runs: Runs) -> list[Picture]:
    """Draw the accuracy by learning rate."""
    from batchnorm.lab import plots

    series = {
        arm: (
            settings.rates,
            [[rates[rate] for rate in settings.rates] for rates in _accuracies(runs, arm).values()],
        )
        for arm in ARMS
    }
    return [
        Picture(
            "accuracy",
            "Test accuracy by learning rate",
            "See how far to the right each line stays above the dotted one. Lines: median of "
            f"{counted(settings.seeds, 'seed')}; bands: lowest to highest seed.",
            plots.curves(
                series,
                xlabel="learning rate (log scale)",
                ylabel="test accuracy",
                level=settings.threshold,
                level_label=f"{settings.threshold:.0%}",
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="rates",
    claim="Batch normalization lets a deep network learn at larger learning rates.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167); Bjorck et al. 2018, “Understanding batch "
    "normalization” (arXiv:1806.02375)",
    recipe=1,
    trial=RatesTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
