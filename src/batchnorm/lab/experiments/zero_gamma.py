"""The last γ of each residual branch starts at zero: every block begins as an identity."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchnorm import NonFiniteWarning
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
from batchnorm.lab.tuning import EVALUATION, SWEEP, ArmTrial, select
from batchnorm.lab.verdict import Verdict, judge
from batchnorm.lab.words import counted

SMALLEST, LARGEST = "smallest rate", "largest rate"

#: Steps that the loss is averaged over before it is compared with a level, or drawn.
WINDOW = 5


@dataclass(frozen=True, kw_only=True)
class ZeroGammaSettings(Settings):
    """The γ to start from: 1, others, 0; and the share of errors up to which a network learns."""

    tuning_seeds: int
    starts: tuple[float, ...]
    rates: tuple[float, ...]
    steps: int
    learned: float = 0.2
    blocks: int = 32
    width: int = 64
    batch: int = 64


@dataclass(frozen=True, kw_only=True)
class ZeroGammaTrial(ArmTrial):
    """One training run; the arm is where the last γ of each branch starts."""

    steps: int
    blocks: int
    width: int
    batch: int


Runs = Sequence[Run[ZeroGammaTrial]]

PROFILES = {
    "quick": ZeroGammaSettings(
        seeds=4, tuning_seeds=1, starts=(1.0, 0.0), rates=(0.003, 0.01, 0.03, 0.1, 0.3), steps=64
    ),
    "full": ZeroGammaSettings(
        seeds=8,
        tuning_seeds=2,
        starts=(1.0, 0.1, 0.0),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        steps=350,
    ),
}


def arm(start: float) -> str:
    """The name of an arm.

    >>> arm(1.0), arm(0.0)
    ('γ = 1', 'γ = 0')
    """
    return f"γ = {start:g}"


ONE, ZERO = arm(1.0), arm(0.0)


def run(trial: ZeroGammaTrial, data: Dataset) -> Run[ZeroGammaTrial]:
    """Train with momentum and a rate that ends at zero; the test error at the end, and the losses.

    `early` is the first step at which the mean loss of `WINDOW` steps is at most half of what a
    guess among the classes costs; null if there was none.
    """
    x, y, x_test, y_test = training.tensors(data)
    net = networks.residual_mlp(
        (x.shape[1], trial.width, data.classes),
        trial.blocks,
        training.generator(trial.seed),
        last=float(trial.arm.rpartition(" ")[2]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)  # a run that diverges is a result here
        losses = training.fit(
            net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed
        )
    means, level = running_mean(losses), math.log(data.classes) / 2
    return Run(
        trial,
        {
            "error": 1 - training.accuracy(net, x_test, y_test),
            "early": reached(means, level),
            "level": level,
            "losses": means if trial.stage == EVALUATION else [],
        },
        {},
    )


def running_mean(losses: Sequence[float]) -> list[float]:
    """Mean of each step's loss and of those before it, `WINDOW` in all.

    >>> running_mean([8, 6, 4, 2, 0, 0])
    [4.0, 2.4]
    """
    ends = range(WINDOW, len(losses) + 1)
    return [sum(losses[end - WINDOW : end]) / WINDOW for end in ends]


def reached(means: Sequence[float], level: float) -> int | None:
    """Return the first step, from 1, whose running mean is at most the level.

    >>> reached([4.0, 2.4], 3.0)
    6
    """
    return next((step for step, mean in enumerate(means, WINDOW) if mean <= level), None)


def largest(settings: ZeroGammaSettings, runs: Runs) -> float:
    """Return the largest rate at which any arm learned, by the sweep; the smallest if none did."""

    def learned(rate: float, name: str) -> bool:
        errors = [r.measured["error"] for r in select(runs, stage=SWEEP, rate=rate, arm=name)]
        return statistics.fmean(errors) <= settings.learned

    names = [arm(start) for start in settings.starts]
    found = [rate for rate in settings.rates if any(learned(rate, name) for name in names)]
    return max(found, default=min(settings.rates))


def plan(settings: ZeroGammaSettings, runs: Runs) -> list[ZeroGammaTrial]:
    """Tune every arm's learning rate by itself; then try the smallest and the largest, too."""
    sizes = {key: getattr(settings, key) for key in ("steps", "blocks", "width", "batch")}
    template = ZeroGammaTrial(stage="", seed=0, arm="", rate=0.0, **sizes)
    names = [arm(start) for start in settings.starts]
    wanted = tuning.plan(
        template,
        runs,
        arms=names,
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
        score=lambda swept: statistics.fmean(r.measured["error"] for r in swept),
    )
    if wanted[-1].stage != EVALUATION:
        return wanted
    ends = {SMALLEST: min(settings.rates), LARGEST: largest(settings, runs)}
    return wanted + [
        replace(template, stage=stage, rate=rate, seed=seed, arm=name)
        for stage, rate in ends.items()
        for seed in range(settings.seeds)
        for name in names
    ]


# What the runs say


def _values(runs: Runs, key: str, name: str, stage: str = EVALUATION) -> list[float]:
    return [r.measured[key] for r in select(runs, stage=stage, arm=name)]


def analyse(settings: ZeroGammaSettings, runs: Runs) -> Findings:
    """Judge the error at each arm's best rate and at fixed ones, and how soon the loss falls."""
    names = [arm(start) for start in settings.starts]
    high, low = largest(settings, runs), min(settings.rates)

    def better(stage: str = EVALUATION, control: str = ONE) -> Verdict:
        errors = [_values(runs, "error", name, stage) for name in (control, ZERO)]
        return judge(*errors, unit="of the test rows wrong", names=(control, ZERO))

    def mean(name: str, stage: str = EVALUATION) -> str:
        return f"{statistics.fmean(_values(runs, 'error', name, stage)):.1%}"

    early = judge(
        _values(runs, "early", ONE),
        _values(runs, "early", ZERO),
        unit="steps",
        horizon=settings.steps,
        names=(ONE, ZERO),
    )
    verdict = better()
    best = tuning.table(runs, "error", "test error")
    also = {
        "At the best rate of each, the loss falls to half of a guess's in fewer steps.": early,
        f"At {high:g}, the largest rate at which any of them learned, it helps, too.": better(
            LARGEST
        ),
        f"At {low:g}, the smallest rate tried, it helps, too.": better(SMALLEST),
        **{
            f"At each one's best rate, a start at 0 is better than one at {start:g}.": better(
                control=arm(start)
            )
            for start in settings.starts
            if arm(start) not in (ONE, ZERO)
        },
    }
    soon = {
        name: statistics.median(step or settings.steps for step in _values(runs, "early", name))
        for name in (ONE, ZERO)
    }
    return Findings(
        summary=(
            f"With the last γ of each branch at 0 instead of 1, a residual network of "
            f"{settings.blocks} blocks got {mean(ZERO)} of the test rows wrong instead of "
            f"{mean(ONE)}, each at its best learning rate; its loss was half of a guess's after "
            f"{soon[ZERO]:g} steps instead of {soon[ONE]:g}. At {high:g} for both: "
            f"{mean(ZERO, LARGEST)} and {mean(ONE, LARGEST)}; at {low:g}, "
            f"{mean(ZERO, SMALLEST)} and {mean(ONE, SMALLEST)}."
        ),
        verdict=verdict,
        table=Table(
            ("start", "best rate", best.columns[2], f"at {low:g}", f"at {high:g}"),
            tuple(
                (*row, mean(name, SMALLEST), mean(name, LARGEST))
                for name, row in zip(names, best.rows, strict=True)
            ),
        ),
        recipe=(
            f"{settings.blocks} blocks relu(x + BN(W·relu(BN(V·x)))) of {settings.width} units "
            "between a normalized dense layer and a dense head; weights are normal draws with the "
            "variance 2/fan-in. The arms differ in the γ of each block's last BN at the start, and "
            "in nothing else; all γ are trained.",
            f"SGD with momentum 0.9 on batches of {settings.batch}, {settings.steps} steps, the "
            "rate falling to zero by a cosine.",
            f"Learning rates, tuned for each arm by itself: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each. The largest rate at which any arm "
            f"learned is the one at which at most {settings.learned:.0%} of the test rows came out "
            "wrong in this sweep.",
            f"How soon the loss falls: the first step at which the training loss, a mean of "
            f"{WINDOW} steps, is at most half of log(classes), a guess's; {settings.steps} if it "
            "never is.",
        ),
        caveats=(*tuning.edges(runs, settings.rates), *verdict.caveats()),
        not_shown=(
            "What it does beside a warm-up: the source raises the rate slowly at the start, which "
            "may help a start at 1 in the same way; here no arm has one.",
            "Anything about large minibatches, which the source is about: the batch is "
            f"{settings.batch} throughout.",
            "That it must be zero: it is a way to make branches small, and small outputs of the "
            "untrained network with them. The full profile tries one other small start.",
        ),
        also=tuple(Judged(claim, outcome) for claim, outcome in also.items()),
    )


# What there is to see


def figures(settings: ZeroGammaSettings, runs: Runs) -> list[Picture]:
    """Draw the loss by step at each arm's best rate, and the sweep."""
    from batchnorm.lab import plots

    names = [arm(start) for start in settings.starts]
    steps = list(range(WINDOW, settings.steps + 1))
    level = select(runs, stage=EVALUATION)[0].measured["level"]
    rates = [f"{select(runs, stage=EVALUATION, arm=n)[0].trial.rate:g} ({n})" for n in names]

    several = settings.tuning_seeds > 1

    def swept(name: str) -> list[list[float]]:
        """A row a tuning seed."""
        of_arm = select(runs, stage=SWEEP, arm=name)
        seeds = dict.fromkeys(r.trial.seed for r in of_arm)
        by = {(r.trial.seed, r.trial.rate): r.measured["error"] for r in of_arm}
        return [[by[seed, rate] for rate in settings.rates] for seed in seeds]

    return [
        Picture(
            "loss",
            "Training loss by step",
            "See where each line starts, and where it crosses the dotted one, half of what a guess "
            "costs. Each arm is at its "
            f"best rate: {', '.join(rates)}. Means of {WINDOW} steps. Lines: median of "
            f"{counted(settings.seeds, 'seed')}; bands: lowest to highest seed.",
            plots.curves(
                {
                    n: (
                        steps,
                        [r.measured["losses"] for r in select(runs, stage=EVALUATION, arm=n)],
                    )
                    for n in names
                },
                xlabel="training step",
                ylabel="training loss (log scale)",
                level=level,
                xscale="linear",
                yscale="log",
                share=False,
            ),
        ),
        Picture(
            "rates",
            "Test error by learning rate",
            "See which rates each start bears, and which arm is ahead at small ones. Lines: "
            f"{'median of ' if several else ''}the sweep's "
            f"{counted(settings.tuning_seeds, 'seed')}"
            f"{'; bands: lowest to highest' if several else ''}.",
            plots.curves(
                {n: (settings.rates, swept(n)) for n in names},
                xlabel="learning rate (log scale)",
                ylabel="test error",
                marks=True,
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="zero-gamma",
    claim="A last γ of zero in each residual branch at the start helps deep residual networks.",
    source="Goyal et al. 2017, “Accurate, large minibatch SGD” (arXiv:1706.02677)",
    recipe=1,
    trial=ZeroGammaTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
