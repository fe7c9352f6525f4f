"""Larger learning rates: the largest at which a deep network still learns, and what they bring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from batchnorm import BatchNorm
from batchnorm.lab import limits, networks, training, tuning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Findings, Judged, Picture, Run, Settings, Table
from batchnorm.lab.limits import ByRate
from batchnorm.lab.tuning import ArmTrial
from batchnorm.lab.verdict import judge, judge_shares
from batchnorm.lab.words import bands, counted

PLAIN, NORMALIZED = ARMS = ("plain", "BatchNorm")

#: The loss of a run is the mean over this share of its steps, the last: one batch is noisy.
TAIL = 0.1


@dataclass(frozen=True, kw_only=True)
class RatesSettings(Settings):
    """The network, the rates in rising order, and what counts as having learned.

    Width and batch are those of the 2015 paper's figure 1, and 90% is what `convergence` counts to.
    12 layers, because the source's claim is on deep networks.
    """

    rates: tuple[float, ...]
    steps: int
    threshold: float = 0.9
    depth: int = 12
    width: int = 100
    batch: int = 60


@dataclass(frozen=True, kw_only=True)
class RatesTrial(ArmTrial):
    """One training run."""

    steps: int
    depth: int
    width: int
    batch: int


Runs = Sequence[Run[RatesTrial]]

PROFILES = {
    # Half-decades; 200 steps are nine epochs of the digits, and 56 runs half a minute.
    "quick": RatesSettings(seeds=4, rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), steps=200),
    "full": RatesSettings(
        seeds=8,
        rates=(0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
        steps=1000,
    ),
}


def run(trial: RatesTrial, data: Dataset) -> Run[RatesTrial]:
    """Plain SGD at a constant rate; the test accuracy at the end, and the last steps' mean loss.

    A network that diverged gives NaN for every row, which counts as the first class: that is
    chance only where the classes are of one size.
    """
    x, y, x_test, y_test = training.tensors(data)
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        BatchNorm if trial.arm == NORMALIZED else networks.nothing,
        training.generator(trial.seed),
    )
    losses = training.fit(
        net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed,
        momentum=0.0, decay=False,
    )  # fmt: skip
    last = losses[-max(1, round(TAIL * trial.steps)) :]
    accuracy = training.accuracy(net, x_test, y_test)
    return Run(trial, {"accuracy": accuracy, "loss": statistics.fmean(last)}, {})


def plan(settings: RatesSettings, _: Runs) -> list[RatesTrial]:
    """Both arms at every rate, with every seed."""
    sizes = {key: getattr(settings, key) for key in ("steps", "depth", "width", "batch")}
    return [
        RatesTrial(stage="rates", seed=seed, arm=arm, rate=rate, **sizes)
        for seed in range(settings.seeds)
        for rate in settings.rates
        for arm in ARMS
    ]


# What the runs say


def by_rate(settings: RatesSettings, runs: Runs, arm: str, key: str = "accuracy") -> ByRate:
    """Return what an arm's runs have measured."""
    return {
        rate: [r.measured[key] for r in tuning.select(runs, arm=arm, rate=rate)]
        for rate in settings.rates
    }


def best_for_others(accuracies: ByRate) -> list[float]:
    """Return for each seed the rate with the best mean accuracy of all other seeds.

    No seed has a say in the rate that it is judged at: the best of many noisy numbers is in part
    the luckiest. Of equals the smaller rate is taken; a seed that is alone chooses for itself.

    >>> best_for_others({0.1: [0.8, 0.8, 0.8], 1.0: [1.0, 0.7, 0.7]})
    [0.1, 1.0, 1.0]
    """
    seeds = range(len(next(iter(accuracies.values()))))
    rates = []
    for i in seeds:
        others = [j for j in seeds if j != i] or [i]
        rates.append(
            max(accuracies, key=lambda r: statistics.fmean(accuracies[r][j] for j in others))
        )
    return rates


def analyse(settings: RatesSettings, runs: Runs) -> Findings:
    """Judge the largest rate that learns, then accuracies at best rates and at a shared one."""
    level, lowest = f"{settings.threshold:.0%}", settings.rates[0]
    found = {arm: by_rate(settings, runs, arm) for arm in ARMS}
    limit = {
        arm: limits.largest(found[arm], lambda accuracy: accuracy >= settings.threshold)
        for arm in ARMS
    }
    chosen = {arm: best_for_others(found[arm]) for arm in ARMS}
    below = limits.below(settings.rates)
    decades = [limits.decades(limit[arm], settings.rates) for arm in ARMS]
    verdict = judge(
        *decades, unit="decades of the learning rate", higher_is_better=True, names=ARMS
    )

    def at(arm: str, rates: Sequence[float]) -> list[float]:
        return [found[arm][rate][i] for i, rate in enumerate(rates)]

    best = {arm: at(arm, chosen[arm]) for arm in ARMS}
    shared = at(NORMALIZED, chosen[PLAIN])
    small = {arm: found[arm][lowest] for arm in ARMS}
    rows = [
        (
            arm,
            limits.reach(limit[arm]),
            limits.reach(chosen[arm]),
            f"{statistics.fmean(best[arm]):.1%}",
            f"{statistics.fmean(small[arm]):.1%}",
        )
        for arm in ARMS
    ]
    caveats = []
    for arm in ARMS:
        if settings.rates[-1] in limit[arm]:
            caveats.append(
                f"The {arm} network still learned at {settings.rates[-1]:g}, the largest rate "
                "tried: its limit lies higher."
            )
        if never := limit[arm].count(None):
            caveats.append(
                f"With {never} of {counted(settings.seeds, 'seed')} the {arm} network got to "
                f"{level} at no rate; counted as {below:g}, below all that were tried."
            )
        trial = tuning.select(runs, arm=arm)[0].trial
        tried = (replace(trial, rate=rate) for rate in sorted(set(chosen[arm])))
        caveats += [edge for t in tried if (edge := tuning.edge(t, settings.rates))]
    return Findings(
        summary=(
            f"The largest learning rate at which the network got to {level} test accuracy was "
            f"{limits.reach(limit[PLAIN])} without and {limits.reach(limit[NORMALIZED])} with "
            f"BatchNorm: lower median of {counted(settings.seeds, 'seed')}, and the range where "
            f"seeds differ. At its best rate the plain network got to {rows[0][3]}, the normalized "
            f"one to {rows[1][3]} (at the plain one's best rate, to "
            f"{statistics.fmean(shared):.1%}). At {lowest:g}, the smallest rate, {settings.steps} "
            f"steps brought the plain network to {rows[0][4]}, the normalized one to {rows[1][4]}."
        ),
        verdict=verdict,
        table=Table(
            ("network", "largest rate", "best rate", "accuracy there", f"at {lowest:g}"),
            tuple(rows),
        ),
        recipe=(
            f"{settings.depth} hidden layers of {settings.width} ReLU units, He's initial weights; "
            f"plain SGD at a constant rate, {settings.steps} steps, batches of {settings.batch}.",
            "One network is plain; the other has BatchNorm before each ReLU, and no bias there. "
            "Both networks of a seed start from the same normal draws and see the same batches.",
            f"Rates: {', '.join(f'{rate:g}' for rate in settings.rates)}, each with "
            f"{counted(settings.seeds, 'seed')}. The largest is the one at which the test "
            f"accuracy at the end is {level} or more; smaller ones may have failed. A network that "
            "diverged puts every row in the first class.",
            "The best rate for a seed is the one with the best mean accuracy of all the other "
            "seeds, on the test rows: none chooses the rate that it is judged at. Where seeds "
            "differ, the table has the lower median, which is a rate that was tried, and the "
            "range.",
        ),
        caveats=(*caveats, *verdict.caveats()),
        not_shown=(
            "Why a larger rate helps: the source's reasons, activations that grow with depth and "
            "minima that are flat, are not measured here.",
            "That batch normalization is slow at small rates elsewhere: with residual connections, "
            "another initial scale or an optimiser that divides by the gradient's size, the same "
            "rate is another step.",
            "Accuracy on unseen data: the rates were compared on the same test rows, though with "
            "other seeds.",
        ),
        also=(
            Judged(
                "Each at its own best rate, the normalized network is more accurate than the plain "
                "one.",
                judge_shares(best[PLAIN], best[NORMALIZED]),
            ),
            Judged(
                "The gain comes with the larger rate: at the plain network's best rate, the "
                "normalized network is no better than the plain one.",
                judge_shares(shared, best[PLAIN]),
            ),
            Judged(
                "At the smallest rate tried, the normalized network learns faster, too.",
                judge_shares(small[PLAIN], small[NORMALIZED]),
                ours=True,
            ),
        ),
    )


def figures(settings: RatesSettings, runs: Runs) -> list[Picture]:
    """Draw accuracy and training loss by learning rate."""
    from batchnorm.lab import plots

    def drawn(key: str, ylabel: str, **options: Any) -> Any:
        series = {}
        for arm in ARMS:
            columns = by_rate(settings, runs, arm, key).values()
            series[arm] = (settings.rates, list(zip(*columns, strict=True)))
        return plots.curves(
            series, xlabel="learning rate (log scale)", ylabel=ylabel, marks=True, **options
        )

    lines = bands(settings.seeds)
    level, lowest = f"{settings.threshold:.0%}", settings.rates[0]
    ends = {}
    for arm in ARMS:
        losses = [loss for loss in by_rate(settings, runs, arm, "loss")[lowest] if loss is not None]
        ends[arm] = f"{statistics.median(losses):.2g}" if losses else "no finite loss"
    return [
        Picture(
            "accuracy",
            "Test accuracy by learning rate",
            f"See how far to the right each line stays above the dotted one at {level}, and which "
            f"is higher on the left. {lines}",
            drawn("accuracy", "test accuracy", level=settings.threshold, level_label=level),
        ),
        Picture(
            "loss",
            "Training loss by learning rate",
            "The same in training, where no running averages are in use: what both figures show "
            f"is not their doing. At {lowest:g} the loss ended at {ends[PLAIN]} ({PLAIN}) and "
            f"{ends[NORMALIZED]} ({NORMALIZED}). Mean of the last {TAIL:.0%} of the steps; runs "
            f"that diverged to no finite loss are left out. {lines}",
            drawn("loss", "training loss", share=False, yscale="log"),
        ),
    ]


EXPERIMENT = Experiment(
    name="rates",
    claim="Batch normalization lets a deep network learn at larger learning rates.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167); Bjorck et al. 2018, “Understanding batch "
    "normalization” (arXiv:1806.02375)",
    recipe=2,
    trial=RatesTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
