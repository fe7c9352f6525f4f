"""Running averages lag behind the weights; exact statistics do not."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm import BatchNorm, recalibrate
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
from batchnorm.lab.verdict import Verdict, judge_shares
from batchnorm.lab.words import counted

RUNNING, EXACT = NAMES = ("running", "exact")


@dataclass(frozen=True, kw_only=True)
class LagSettings(Settings):
    """Momentums and learning rates, of which the first ones decide the main claim.

    There are several `looks` an epoch. The claim is judged by the mean error of those in the epochs
    `early`, both counted.
    """

    epochs: int
    # 0.1 is the source's (it writes 0.9) and every framework's; 0.01 remembers ten times as long.
    momentums: tuple[float, ...] = (0.1, 0.01)
    # Weights that move fast leave averages behind: the largest rate at which this network still
    # ends within a point of its best, and a tenth of it, which is about its best.
    rates: tuple[float, ...] = (1.0, 0.1)
    # One look an epoch would leave it to chance where the averages are just then.
    looks: int = 4
    # Not the first epoch: by its end, an average of 20 steps still holds a share of what it
    # started from, which is another fault than to lag.
    early: tuple[int, int] = (2, 4)
    batch: int = 64
    width: int = 128
    depth: int = 3


@dataclass(frozen=True, kw_only=True)
class LagTrial(Trial):
    """One training run."""

    momentum: float
    rate: float
    epochs: int
    looks: int
    batch: int
    width: int
    depth: int


Runs = Sequence[Run[LagTrial]]

PROFILES = {
    "quick": LagSettings(seeds=8, epochs=10),
    "full": LagSettings(
        seeds=8, epochs=40, momentums=(0.1, 0.3, 0.03, 0.01), rates=(1.0, 0.3, 0.1)
    ),
}


def run(trial: LagTrial, data: Dataset) -> Run[LagTrial]:
    """Train; several times an epoch, the test error with running and with exact statistics.

    Those of the training set in one batch are exact: what comes into each layer is what it gets in
    evaluation. The network that goes on training is not touched.
    """
    x, y, x_test, y_test = training.tensors(data)
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        lambda channels: BatchNorm(channels, momentum=trial.momentum),
        training.generator(trial.seed),
    )
    epoch = len(x) // trial.batch
    steps = trial.epochs * epoch
    # At least a step apart, and the end of every epoch is among them.
    when = {
        max(1, round(k * epoch / trial.looks)) for k in range(1, trial.epochs * trial.looks + 1)
    }
    measured: dict[str, list[float]] = {"epoch": [], "step": [], RUNNING: [], EXACT: []}

    def look(step: int) -> None:
        if step not in when:
            return
        exact = copy.deepcopy(net)
        recalibrate(exact, [x])
        measured["epoch"].append(step / epoch)
        measured["step"].append(step)
        for name, of in ((RUNNING, net), (EXACT, exact)):
            measured[name].append(1 - training.accuracy(of, x_test, y_test))

    training.fit(
        net, x, y, rate=trial.rate, steps=steps, batch=trial.batch,
        seed=trial.seed, after=look,
    )  # fmt: skip
    return Run(trial, measured, {})


def plan(settings: LagSettings, _: Runs) -> list[LagTrial]:
    """Every momentum at every rate; the runs of a seed and a rate differ in nothing else."""
    shared = {key: getattr(settings, key) for key in ("epochs", "looks", "batch", "width", "depth")}
    return [
        LagTrial(stage="training", seed=seed, momentum=momentum, rate=rate, **shared)
        for seed in range(settings.seeds)
        for rate in settings.rates
        for momentum in settings.momentums
    ]


def _of(runs: Runs, momentum: float, rate: float) -> Runs:
    return [r for r in runs if (r.trial.momentum, r.trial.rate) == (momentum, rate)]


def _errors(
    runs: Runs, name: str, momentum: float, rate: float, epochs: tuple[int, int]
) -> list[float]:
    """The mean error of the looks in these epochs, a number a seed."""
    first, last = epochs
    return [
        statistics.fmean(
            error
            for epoch, error in zip(r.measured["epoch"], r.measured[name], strict=True)
            if first - 1 < epoch <= last
        )
        for r in _of(runs, momentum, rate)
    ]


def analyse(settings: LagSettings, runs: Runs) -> Findings:
    """Judge exact statistics against running ones, early and at the end."""
    (usual, *others), (fast, *slower) = settings.momentums, settings.rates
    first, last = settings.early
    end = (settings.epochs, settings.epochs)

    def better(momentum: float, rate: float, epochs: tuple[int, int]) -> Verdict:
        running, exact = (_errors(runs, name, momentum, rate, epochs) for name in NAMES)
        return judge_shares(running, exact, errors=True, names=NAMES)

    def mean(name: str, momentum: float, rate: float, epochs: tuple[int, int]) -> str:
        return f"{statistics.fmean(_errors(runs, name, momentum, rate, epochs)):.1%}"

    def left(momentum: float, epoch: int) -> str:
        """How much of a running average is still what it started from."""
        looked = zip(runs[0].measured["epoch"], runs[0].measured["step"], strict=True)
        return f"{(1 - momentum) ** max(step for at, step in looked if at <= epoch):.1%}"

    rows = [
        (f"{rate:g}", f"{momentum:g}", epoch, mean(RUNNING, *at), mean(EXACT, *at))
        for rate in settings.rates
        for momentum in settings.momentums
        for epoch, at in (
            (f"{first}–{last}", (momentum, rate, settings.early)),
            (f"{settings.epochs}", (momentum, rate, end)),
        )
    ]
    verdict = better(usual, fast, settings.early)
    longest = min(settings.momentums)
    also = [
        *(
            Judged(
                f"With momentum {momentum:g}, exact statistics are better in those epochs, too.",
                better(momentum, fast, settings.early),
            )
            for momentum in others
        ),
        *(
            Judged(
                f"At a learning rate of {rate:g}, exact statistics are better in those epochs, "
                "too.",
                better(usual, rate, settings.early),
            )
            for rate in slower
        ),
        Judged(
            "Exact statistics are still better in the last epoch, when the learning rate falls to "
            "zero.",
            better(usual, fast, end),
        ),
    ]
    return Findings(
        summary=(
            f"In epochs {first} to {last} at a learning rate of {fast:g}, a network got "
            f"{mean(RUNNING, usual, fast, settings.early)} of the test rows wrong with running "
            f"averages (momentum {usual:g}) and {mean(EXACT, usual, fast, settings.early)} with "
            f"exact statistics; with momentum {longest:g}, "
            f"{mean(RUNNING, longest, fast, settings.early)} and "
            f"{mean(EXACT, longest, fast, settings.early)}. In the last epoch it was "
            f"{mean(RUNNING, usual, fast, end)} against {mean(EXACT, usual, fast, end)} with "
            f"momentum {usual:g}, and {mean(RUNNING, longest, fast, end)} against "
            f"{mean(EXACT, longest, fast, end)} with {longest:g}."
        ),
        verdict=verdict,
        table=Table(("rate", "momentum", "epoch", "test error, running", "exact"), tuple(rows)),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units, each with "
            f"BatchNorm; SGD with momentum 0.9 on batches of {settings.batch}, "
            f"{counted(settings.epochs, 'epoch')}, the rate falling to zero by a cosine.",
            f"{settings.looks} times an epoch a copy is recalibrated on all training rows in one "
            "batch and evaluated beside the network itself. Both have the same weights: nothing "
            "but the statistics differs, so there is no learning rate to tune.",
            f"Judged by the mean over epochs {first} to {last}: after the first one, running "
            f"averages with momentum {usual:g} are still {left(usual, 1)} the zeros and ones that "
            f"they started from; after epoch {last}, {left(usual, last)}.",
        ),
        caveats=(
            f"With momentum {longest:g}, running averages are still {left(longest, last)} of what "
            f"they started from after epoch {last}: early on, that is most of what is wrong with "
            "them, and not that they lag.",
            *verdict.caveats(),
        ),
        not_shown=(
            "That running averages are bad in the end: where the rate falls, they catch up.",
            "Which learning rate is best: a large one is taken so that the weights move fast.",
        ),
        also=tuple(also),
    )


def figures(settings: LagSettings, runs: Runs) -> list[Picture]:
    """Draw the error by epoch, and what running averages add to it."""
    from batchnorm.lab import plots

    usual, fast = settings.momentums[0], settings.rates[0]
    epochs = runs[0].measured["epoch"]
    # In the first epoch, what the averages started from would hide all that comes after.
    later = [i for i, epoch in enumerate(epochs) if epoch >= 1]
    bands = f"Lines: median of {counted(settings.seeds, 'seed')}; bands: lowest to highest seed."
    errors = {
        f"momentum {momentum:g}": (epochs, [r.measured[RUNNING] for r in _of(runs, momentum, fast)])
        for momentum in dict.fromkeys((usual, min(settings.momentums)))
    }
    errors[EXACT] = epochs, [r.measured[EXACT] for r in _of(runs, usual, fast)]
    added = {
        f"learning rate {rate:g}": (
            [epochs[i] for i in later],
            [
                [r.measured[RUNNING][i] - r.measured[EXACT][i] for i in later]
                for r in _of(runs, usual, rate)
            ],
        )
        for rate in dict.fromkeys((fast, settings.rates[-1]))
    }
    return [
        Picture(
            "error",
            f"Test error by epoch, learning rate {fast:g}",
            "One training, evaluated with the running averages of two momentums, and with exact "
            f"statistics. See the lines meet as the learning rate falls. {bands}",
            plots.curves(
                errors,
                xlabel="epoch",
                ylabel="test error (log scale)",
                xscale="linear",
                yscale="log",
            ),
        ),
        Picture(
            "added",
            f"What running averages add to the error, momentum {usual:g}",
            "The error with running averages less that of the same weights with exact statistics, "
            "seed by seed, from the end of the first epoch: above the dotted line, exact ones are "
            f"better. {bands}",
            plots.curves(
                added,
                xlabel="epoch",
                ylabel="added test error",
                level=0.0,
                xscale="linear",
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="lag",
    claim="Early in training, running averages lag behind the weights; exact statistics evaluate "
    "better.",
    source="Wu & Johnson 2021, “Rethinking ‘Batch’ in BatchNorm” (arXiv:2105.07576)",
    recipe=2,
    trial=LagTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
