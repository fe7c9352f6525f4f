"""The last γ of each residual branch starts at zero: every block begins as an identity."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from batchnorm import NonFiniteWarning
from batchnorm.lab import limits, networks, training, tuning
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
from batchnorm.lab.limits import ByRate
from batchnorm.lab.tuning import EVALUATION, SWEEP, ArmTrial, select
from batchnorm.lab.verdict import Verdict, judge, judge_shares
from batchnorm.lab.words import bands, counted

#: The stage of the rates that were not the arm's best: the same seeds as in the evaluation.
RATES = "other rates"

SMALL_HEAD = ", small head"

#: Steps that the loss is averaged over before it is compared with a level, or drawn.
WINDOW = 5


@dataclass(frozen=True, kw_only=True)
class ZeroGammaSettings(Settings):
    """The γ to start from: 1, others, 0; and the share of errors up to which a network learned.

    The quick profile has as many blocks as ResNet-50, the source's network; the full one twice as
    many.
    """

    tuning_seeds: int
    starts: tuple[float, ...]
    rates: tuple[float, ...]
    steps: int
    learned: float = 0.2
    blocks: int
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
        seeds=4,
        tuning_seeds=2,
        starts=(1.0, 0.0),
        rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        steps=64,
        blocks=16,
    ),
    "full": ZeroGammaSettings(
        seeds=8,
        tuning_seeds=2,
        starts=(1.0, 0.1, 0.0),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        steps=250,
        blocks=32,
    ),
}


def arm(start: float) -> str:
    """The name of an arm.

    >>> arm(1.0), arm(0.0)
    ('γ = 1', 'γ = 0')
    """
    return f"γ = {start:g}"


ONE, ZERO = arm(1.0), arm(0.0)

#: A start at 1 whose first outputs are no larger than those of a start at 0.
MATCHED = ONE + SMALL_HEAD


def _arms(settings: ZeroGammaSettings) -> list[str]:
    others = [arm(start) for start in settings.starts if arm(start) not in (ONE, ZERO)]
    return [ONE, ZERO, MATCHED, *others]


def run(trial: ZeroGammaTrial, data: Dataset) -> Run[ZeroGammaTrial]:
    """Train with momentum and a rate that ends at zero; the test error at the end, and the losses.

    `early` is the first step at which the mean loss of `WINDOW` steps is at most half of what a
    guess among the classes costs; null if there was none.
    """
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data))
    net = networks.residual_mlp(
        (x.shape[1], trial.width, data.classes),
        trial.blocks,
        training.generator(trial.seed),
        last=float(trial.arm.removesuffix(SMALL_HEAD).rpartition(" ")[2]),
    )
    if trial.arm.endswith(SMALL_HEAD):
        shrink_head(net, x)
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


def shrink_head(net: nn.Sequential, x: Tensor) -> None:
    """Scale the head's weights: the outputs become as large as if each block were an identity."""
    probe = copy.deepcopy(net)  # the running statistics stay as they are
    with torch.no_grad():
        shallow = probe[-1](probe[:2](x))
        for weights in net[-1].parameters():  # the bias is zero
            weights.mul_(shallow.norm() / probe(x).norm())


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


def by_rate(settings: ZeroGammaSettings, runs: Runs, name: str) -> ByRate:
    """Return an arm's errors at every rate, with the evaluation's seeds."""
    judged = [r for r in select(runs, arm=name) if r.trial.stage != SWEEP]
    return {
        rate: [r.measured["error"] for r in select(judged, rate=rate)] for rate in settings.rates
    }


def plan(settings: ZeroGammaSettings, runs: Runs) -> list[ZeroGammaTrial]:
    """Tune every arm's learning rate by itself; then try 0 and 1 at all other rates, too."""
    sizes = {key: getattr(settings, key) for key in ("steps", "blocks", "width", "batch")}
    template = ZeroGammaTrial(stage="", seed=0, arm="", rate=0.0, **sizes)
    wanted = tuning.plan(
        template,
        runs,
        arms=_arms(settings),
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
    )
    if wanted[-1].stage != EVALUATION:
        return wanted
    best = {t.arm: t.rate for t in wanted if t.stage == EVALUATION}
    return wanted + [
        replace(template, stage=RATES, rate=rate, seed=seed, arm=name)
        for rate in settings.rates
        for seed in range(settings.seeds)
        for name in (ONE, ZERO)
        if rate != best[name]
    ]


# What the runs say


def analyse(settings: ZeroGammaSettings, runs: Runs) -> Findings:
    """Judge errors and first steps at each arm's best rate, then the rates that 0 and 1 bear."""
    lowest, highest = settings.rates[0], settings.rates[-1]
    found = {name: by_rate(settings, runs, name) for name in (ONE, ZERO)}
    limit = {
        name: limits.largest(errors, lambda error: error <= settings.learned)
        for name, errors in found.items()
    }
    below = limits.below(settings.rates)
    decades = [limits.decades(limit[name], settings.rates) for name in found]

    def fewer(
        control: Sequence[float], treated: Sequence[float], names: tuple[str, str]
    ) -> Verdict:
        return judge_shares(control, treated, errors=True, names=names)

    def better(control: str) -> Verdict:
        names = control, ZERO
        without, treated = (tuning.measured(runs, "error", arm=name) for name in names)
        return fewer(without, treated, names)

    early = {name: tuning.measured(runs, "early", arm=name) for name in _arms(settings)}
    soon = {n: statistics.median(at or settings.steps for at in early[n]) for n in early}
    error = {n: f"{statistics.fmean(tuning.measured(runs, 'error', arm=n)):.1%}" for n in early}
    small = {name: f"{statistics.fmean(found[name][lowest]):.1%}" for name in found}
    others = [name for name in early if name not in (ONE, ZERO, MATCHED)]
    best = tuning.table(runs, "error", "test error")
    verdict = better(ONE)
    also = (
        Judged(
            "It eases the start of training: the loss falls to half of a guess's in fewer steps "
            "than with a γ of 1 whose first outputs are made as small.",
            judge(
                early[MATCHED],
                early[ZERO],
                unit="steps",
                horizon=settings.steps,
                names=(MATCHED, ZERO),
            ),
        ),
        Judged(
            "A last γ of zero does more than to make the first outputs small: with a γ of 1 and "
            "outputs as small there are more errors.",
            better(MATCHED),
            ours=True,
        ),
        Judged(
            "A last γ of zero lets the network learn at larger rates.",
            judge(
                *decades,
                unit="decades of the learning rate",
                higher_is_better=True,
                names=(ONE, ZERO),
            ),
            ours=True,
        ),
        Judged(
            "At the smallest rate tried, a last γ of zero helps, too.",
            fewer(found[ONE][lowest], found[ZERO][lowest], (ONE, ZERO)),
            ours=True,
        ),
        *(
            Judged(f"A last γ of zero is better than {o[4:]}.", better(o), ours=True)
            for o in others
        ),
    )
    caveats = []
    for name, errors_at in found.items():
        means = {rate: statistics.fmean(errors) for rate, errors in errors_at.items()}
        better_at = min(means, key=lambda rate: means[rate])
        if means[better_at] < means[select(runs, stage=EVALUATION, arm=name)[0].trial.rate]:
            caveats.append(
                f"For {name} the sweep did not find the best rate for the evaluation's seeds: at "
                f"{better_at:g}, {means[better_at]:.1%} came out wrong."
            )
        if highest in limit[name]:
            caveats.append(
                f"With {name} the network still learned at {highest:g}, the largest rate tried: "
                "its limit lies higher."
            )
        if never := limit[name].count(None):
            caveats.append(
                f"With {name}, {never} of {counted(settings.seeds, 'seed')} learned at no rate; "
                f"counted as {below:g}, below all that were tried."
            )
    return Findings(
        summary=(
            f"With the last γ of each branch at 0 instead of 1, a residual network of "
            f"{settings.blocks} blocks got {error[ZERO]} of the test rows wrong instead of "
            f"{error[ONE]}, each at its best learning rate; with a γ of 1 and first outputs made "
            f"as small, {error[MATCHED]}. Its loss was half of a guess's after {soon[ZERO]:g} "
            f"steps, theirs after {soon[ONE]:g} and {soon[MATCHED]:g}. The largest rate at which "
            f"it learned was {limits.reach(limit[ZERO])} instead of {limits.reach(limit[ONE])}. At "
            f"{lowest:g}, the smallest, {small[ZERO]} came out wrong instead of {small[ONE]}."
        ),
        verdict=verdict,
        table=Table(
            ("start", "best rate", best.columns[2], "steps", "largest rate"),
            tuple(
                (*row, f"{soon[row[0]]:g}", limits.reach(limit[row[0]]) if row[0] in limit else "–")
                for row in best.rows
            ),
        ),
        recipe=(
            f"{settings.blocks} blocks relu(x + BN(W·relu(BN(V·x)))) of {settings.width} units "
            "between a normalized dense layer and a dense head; weights are normal draws with the "
            "variance 2/fan-in. The arms differ in the γ of each block's last BN at the start, and "
            "but for the one below in nothing else; all γ are trained.",
            f"{MATCHED}: at 1 the branches add up, and the first outputs and with them the first "
            "losses are large. Here the head's weights are scaled at the start so that the outputs "
            "are as large as with a γ of 0 (root mean square, over the training rows).",
            f"SGD with momentum 0.9 on batches of {settings.batch}, {settings.steps} steps, the "
            "rate falling to zero by a cosine.",
            f"Learning rates, tuned for each arm by itself: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each. {tuning.HOW}",
            f"The largest rate: {ONE} and {ZERO} are trained at every rate with the evaluation's "
            "seeds, and for each seed it is the largest at which at most "
            f"{settings.learned:.0%} of the test rows came out wrong; smaller ones may have "
            "failed.",
            f"Steps: the first step at which the training loss, a mean of {WINDOW} steps, is at "
            f"most half of log(classes), a guess's; {settings.steps} if it never is. At each arm's "
            "best rate, median of the seeds.",
        ),
        caveats=(*caveats, *tuning.edges(runs, settings.rates), *verdict.caveats()),
        not_shown=(
            "What it does beside a warm-up: the source raises the rate slowly at the start, which "
            "may help a start at 1 in the same way; here no arm has one.",
            "Anything about large minibatches, which the source is about: the batch is "
            f"{settings.batch} throughout.",
            "That it must be zero: it is a way to make branches small. The full profile tries one "
            "other small start.",
        ),
        also=also,
    )


# What there is to see


def figures(settings: ZeroGammaSettings, runs: Runs) -> list[Picture]:
    """Draw the loss by step at each arm's best rate, and the error by rate."""
    from batchnorm.lab import plots

    names = _arms(settings)
    steps = list(range(WINDOW, settings.steps + 1))
    level = select(runs, stage=EVALUATION)[0].measured["level"]
    rates = [f"{select(runs, stage=EVALUATION, arm=n)[0].trial.rate:g} ({n})" for n in names]
    errors = {name: by_rate(settings, runs, name).values() for name in (ONE, ZERO)}
    return [
        Picture(
            "loss",
            "Training loss by step",
            "See where each line starts, and where it crosses the dotted one, half of what a guess "
            "costs: from 1 the first outputs are large, which a small head undoes. Each arm is at "
            f"its best rate: {'; '.join(rates)}. Means of {WINDOW} steps. {bands(settings.seeds)}",
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
            "See how far to the right each line stays below the dotted one at "
            f"{settings.learned:.0%}, up to which a network counts as having learned, and which is "
            f"lower on the left. {bands(settings.seeds)}",
            plots.curves(
                {n: (settings.rates, list(zip(*errors[n], strict=True))) for n in errors},
                xlabel="learning rate (log scale)",
                ylabel="test error",
                level=settings.learned,
                marks=True,
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="zero-gamma",
    claim="A last γ of zero in each residual branch at the start helps deep residual networks.",
    source="Goyal et al. 2017, “Accurate, large minibatch SGD” (arXiv:1706.02677)",
    recipe=2,
    trial=ZeroGammaTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
