"""Internal covariate shift, by its definitions of 2015 and of 2018, and the loss's smoothness."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from batchnorm import BatchNorm
from batchnorm.lab import landscape, networks, training, tuning
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

PLAIN, NORMALIZED, NOISY_PLAIN, NOISY = ARMS = (
    "plain", "BatchNorm", "plain + noise", "BatchNorm + noise"
)  # fmt: skip
CLEAN = (PLAIN, NORMALIZED)
EVERY_RATE = "every rate"

MEASURES = ("shift", "relative", "absolute", "turn", "range", "gradient", "smoothness")

#: How far to go along the gradient, in the network's own steps.
LENGTHS = (0.5, 1.0, 2.0, 4.0)

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class ShiftSettings(Settings):
    """The sweep; how often to look, until what loss, and over how many rows."""

    tuning_seeds: int
    rates: tuple[float, ...]
    steps: int
    every: int = 10
    level: float = 0.1
    probe: int = 500
    depth: int = 6
    width: int = 100
    batch: int = 60


@dataclass(frozen=True, kw_only=True)
class ShiftTrial(ArmTrial):
    """One training run."""

    steps: int
    every: int
    level: float
    probe: int
    depth: int
    width: int
    batch: int


Runs = Sequence[Run[ShiftTrial]]

PROFILES = {
    "quick": ShiftSettings(
        seeds=4, tuning_seeds=1, rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), steps=120
    ),
    "full": ShiftSettings(
        seeds=8,
        tuning_seeds=3,
        rates=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
        steps=400,
    ),
}


# The recipe


def build(trial: ShiftTrial, features: int, classes: int) -> nn.Sequential:
    """The network; all four of a seed start from the same weights and get the same noise."""
    number = itertools.count()

    def noisy() -> nn.Module:
        return nn.Sequential(landscape.Noise(trial.seed, next(number)), nn.ReLU())

    return networks.mlp(
        [features, *[trial.width] * trial.depth, classes],
        BatchNorm if trial.arm in (NORMALIZED, NOISY) else networks.nothing,
        training.generator(trial.seed),
        activation=noisy if trial.arm in (NOISY_PLAIN, NOISY) else nn.ReLU,
    )


def run(trial: ShiftTrial, data: Dataset) -> Run[ShiftTrial]:
    """Train by plain SGD; outside the sweep, look at one step in `every` in all ways.

    A look sees the step that is made anyway: the training is the same with and without. `counted`
    is how many looks there were until the loss was below the level, or in all: a network that has
    learned rests, and its rest must not stand for its learning.
    """
    x, y, _, _ = training.tensors(data)
    probe = x[: trial.probe]
    net = build(trial, x.shape[1], data.classes)
    parameters = list(net.parameters())
    seen: dict[str, list[float | None]] = {name: [] for name in MEASURES}
    losses: list[float] = []
    batches = training.batches(len(x), trial.batch, trial.seed)
    for step, rows in zip(range(trial.steps), batches, strict=False):
        landscape.set_step(net, step)
        xs, ys = x[rows], y[rows]
        loss, gradient = landscape.gradients(net, xs, ys, parameters)
        losses.append(loss)
        if not math.isfinite(loss):
            break
        if trial.stage == SWEEP or step % trial.every:
            landscape.descend(parameters, gradient, trial.rate)
            continue
        lengths = [trial.rate * length for length in LENGTHS]
        line = landscape.along(net, xs, ys, (loss, gradient), lengths)
        before = landscape.inputs(net, probe)
        changes = landscape.update(net, xs, ys, gradient, trial.rate)
        landscape.set_step(net, step + 1)
        seen["shift"].append(_middle(landscape.moved(before, landscape.inputs(net, probe))))
        for name in ("relative", "absolute", "turn"):
            seen[name].append(_middle([getattr(change, name) for change in changes]))
        for name in ("range", "gradient", "smoothness"):
            seen[name].append(_middle([getattr(line, name)]))
    windows = [losses[i : i + trial.every] for i in range(0, len(losses), trial.every)]
    mean = statistics.fmean(losses)
    # NaN is not below anything.
    measured: dict[str, Any] = {"loss": mean, "learned": mean < losses[0]}
    if trial.stage != SWEEP:
        means = [statistics.fmean(window) for window in windows]
        below = [i for i, window in enumerate(means) if window < trial.level]
        measured |= {"losses": means, "counted": below[0] + 1 if below else len(means), **seen}
    return Run(trial, measured, {})


def _middle(values: Sequence[float | None]) -> float | None:
    """The median of those that there are; what overflows counts as the largest float32."""
    there = [v if math.isfinite(v) else LARGEST for v in values if v is not None]
    return statistics.median(there) if there else None


def plan(settings: ShiftSettings, runs: Runs) -> list[ShiftTrial]:
    """Tune every arm for the least mean loss; then run the two without noise at every rate, too."""
    names = ("steps", "every", "level", "probe", "depth", "width", "batch")
    sizes = {name: getattr(settings, name) for name in names}
    template = ShiftTrial(stage="", seed=0, arm="", rate=0.0, **sizes)

    def score(swept: Runs) -> float:
        return statistics.fmean(
            r.measured["loss"] if r.measured["learned"] else math.inf for r in swept
        )

    wanted = tuning.plan(
        template,
        runs,
        arms=ARMS,
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
        score=score,
    )
    own = {trial.arm: trial.rate for trial in wanted if trial.stage == EVALUATION}
    return wanted + [
        replace(template, stage=EVERY_RATE, seed=seed, arm=arm, rate=rate)
        for seed in range(settings.seeds if own else 0)
        for rate in settings.rates
        for arm in CLEAN
        if rate != own[arm]
    ]


# What the runs say


def value(run: Run[ShiftTrial], name: str) -> float | None:
    """The median over a run's looks that count, or its mean loss; None: it did not learn."""
    found = run.measured
    if not found["learned"]:
        return None
    return float(found["loss"]) if name == "loss" else _middle(found[name][: found["counted"]])


def _at(runs: Runs, arm: str, rate: float) -> Runs:
    return [r for r in select(runs, arm=arm, rate=rate) if r.trial.stage != SWEEP]


def _said(runs: Runs, name: str) -> str:
    found = [v for r in runs if (v := value(r, name)) is not None]
    return f"{statistics.median(found):.2g}" if found else "–"


def _judge(names: tuple[str, str], *values: Sequence[float | None]) -> Verdict:
    """Judge that the second is smaller, by logarithms: of ratios, an average is no use."""
    worst = max((v for row in values for v in row if v is not None), default=1.0)
    filled = [[worst if v is None else v for v in row] for row in values]
    # A gradient that does not turn at all, but for rounding, still has a logarithm.
    logs = [[math.log10(max(v, SMALLEST)) for v in row] for row in filled]
    return judge(logs[0], logs[1], unit="decades", names=names)


def _less(name: str, control: Runs, treated: Runs) -> Verdict:
    arms = (control[0].trial.arm, treated[0].trial.arm)
    return _judge(arms, *([value(r, name) for r in part] for part in (control, treated)))


def _harm(noisy: Runs, clean: Runs) -> list[float | None]:
    """By how much noise multiplies the loss, seed by seed."""
    pairs = [(value(a, "loss"), value(b, "loss")) for a, b in zip(noisy, clean, strict=True)]
    return [a / b if a and b else None for a, b in pairs]


def analyse(settings: ShiftSettings, runs: Runs) -> Findings:
    """Judge both shifts and the loss's smoothness, and what noise does to learning."""
    plain, bn, noisy_plain, noisy = (select(runs, stage=EVALUATION, arm=arm) for arm in ARMS)
    shared, own, least = plain[0].trial.rate, bn[0].trial.rate, min(settings.rates)
    same = _at(runs, NORMALIZED, shared)
    slow_plain, slow = (_at(runs, arm, least) for arm in CLEAN)
    verdict = _less("shift", plain, bn)
    at, lowest = f"At one rate for both, {shared:g},", f"At the smallest rate, {least:g},"
    harm = _judge((NOISY_PLAIN, NOISY), _harm(noisy_plain, plain), _harm(noisy, bn))
    also = {
        f"{at} it reduces the shift of 2015, too.": _less("shift", plain, same),
        "It reduces the shift of 2018: once the earlier layers have been updated, a layer's "
        "gradient has changed less, ‖G − G′‖ ÷ ‖G‖.": _less("relative", plain, bn),
        "It reduces ‖G − G′‖ itself, which grows with the gradient.": _less("absolute", plain, bn),
        "It makes the gradient turn less: cos(G, G′) is nearer to one.": _less("turn", plain, bn),
        f"{at} it reduces ‖G − G′‖ ÷ ‖G‖.": _less("relative", plain, same),
        f"{lowest} it reduces ‖G − G′‖ ÷ ‖G‖.": _less("relative", slow_plain, slow),
        "Noise after each normalization brings the shift of 2015 back: the inputs move more than "
        "those of the plain network without noise.": _less("shift", noisy, plain),
        "With that noise the normalized network still learns faster than the plain one without "
        "it.": _less("loss", plain, noisy),
        "The same noise harms the plain network more than the normalized one.": harm,
        "It makes the loss vary less along its gradient.": _less("range", plain, bn),
        f"{at} it makes the loss vary less along its gradient.": _less("range", plain, same),
        f"{lowest} it makes the loss vary less along its gradient.": _less(
            "range", slow_plain, slow
        ),
        "It makes the gradient more predictive: on the way along it, the gradient changes by a "
        "smaller part of its size.": _less("gradient", plain, bn),
        "It makes the gradient change less for the distance moved: the effective β-smoothness is "
        "smaller.": _less("smoothness", plain, bn),
    }
    shown = [plain, same, bn, noisy, noisy_plain]
    # If both have the same best rate, one row says it all.
    shown = [of for of in shown if of is not same or shared != own]
    failed = sum(not r.measured["learned"] for of in (*shown, slow_plain, slow) for r in of)
    return Findings(
        summary=(
            "In one step the distributions of the layers' inputs moved by "
            f"{_said(plain, 'shift')} standard deviations in the plain network and by "
            f"{_said(bn, 'shift')} with BatchNorm, each at its best rate ({shared:g} and {own:g}). "
            "The shift of 2018, ‖G − G′‖ ÷ ‖G‖, was "
            f"{_said(plain, 'relative')} and {_said(bn, 'relative')}; with both at {shared:g} "
            f"{_said(plain, 'relative')} and {_said(same, 'relative')}, with both at {least:g} "
            f"{_said(slow_plain, 'relative')} and {_said(slow, 'relative')}. Noise moved the "
            f"normalized network's inputs by {_said(noisy, 'shift')}, and it had a mean training "
            f"loss of {_said(noisy, 'loss')}; the plain one had {_said(plain, 'loss')} without "
            f"noise and {_said(noisy_plain, 'loss')} with it. Along the gradient the loss varied "
            f"by {_said(plain, 'range')} in the plain network and {_said(bn, 'range')} with "
            f"BatchNorm. These are medians of {counted(settings.seeds, 'seed')}."
        ),
        verdict=verdict,
        table=Table(
            ("network", "rate", "mean loss", "shift 2015", "shift 2018", "loss range"),
            tuple(
                (
                    of[0].trial.arm,
                    f"{of[0].trial.rate:g}",
                    *(_said(of, name) for name in ("loss", "shift", "relative", "range")),
                )
                for of in shown
            ),
        ),
        recipe=(
            f"{settings.depth} hidden layers of {settings.width} ReLU units, He's initial weights; "
            f"plain SGD at a constant rate, {settings.steps} steps, batches of {settings.batch}. "
            "BatchNorm stands before the ReLU, the noise between the two: each step, each unit is "
            "given a new shift within ±0.5 and a new scale in 1…1.25, and each activation a little "
            "more of both. In the plain network it stands at the same place.",
            f"Learning rates: {', '.join(f'{rate:g}' for rate in settings.rates)}. The best is the "
            "one with the least training loss, noise included, in the mean over all steps; tuned "
            f"for each network by itself, {counted(settings.tuning_seeds, 'seed')} for each. The "
            "verdicts come from other seeds.",
            f"Shift of 2015: every {settings.every} steps, the inputs of each layer but the first "
            f"over the same {settings.probe} training rows, before and after the step. For a unit, "
            "the 2-Wasserstein distance between the distributions of its values, so that a change "
            "of mean, deviation or shape counts; over a layer, √(Σ distance² ÷ Σ variance), in "
            "which the layer's scale cancels.",
            "Shift of 2018: G is the gradient by a layer's weights, G′ the one on the same batch "
            "with the same noise after all earlier layers, γ and β included, have made their step, "
            "and no other.",
            "Along the gradient: at "
            f"{', '.join(f'{length:g}' for length in LENGTHS)} of the network's own steps "
            "the loss and the gradient again; its range, and the greatest change.",
            f"Of each run the median over layers and over all looks until the mean loss of "
            f"{settings.every} steps is below {settings.level:g}, so that networks are compared "
            "while they learn. Verdicts are on the logarithms: a decade is a factor of ten.",
        ),
        caveats=(
            *tuning.edges(runs, settings.rates),
            *(
                (
                    f"{counted(failed, 'run')} judged did not learn, and counted as the worst of "
                    "those that did.",
                )
                if failed
                else ()
            ),
            f"{1 + len(also)} verdicts are read off the same runs: of so many, one that is narrow "
            "may be chance.",
            *verdict.caveats(),
        ),
        not_shown=(
            "That batch normalization works because of either: measures that go along with "
            "learning fast need not cause it. Only the noise is an intervention, and the most it "
            "can say is that distributions need not keep still, not that it does no good.",
            "Slow drifts: the shift of 2015 was measured over single steps.",
            "That the two definitions are about one thing. Both grow with the length of the step, "
            "so a network that bears a larger rate is charged for using it. At large rates ‖G − "
            "G′‖ ÷ ‖G‖ is near one for both, and which is the larger at the best rates can hang on "
            "the rates that were tried.",
            "Which network has the lower loss in the end: the mean over all steps says which one "
            "learns sooner.",
            "That the loss is smooth everywhere: it was looked at where each network went, and "
            "along one line from there.",
            "That gradients of two networks compare in absolute terms: a normalized layer does not "
            "care for the scale of its weights, which sets the size of the gradient. So do ‖G − "
            "G′‖ and β; the other measures are free of it.",
            "Convolutional or deeper networks, other optimisers, or unseen data: only the training "
            "loss was looked at.",
        ),
        also=tuple(Judged(claim, found) for claim, found in also.items()),
    )


# What there is to see


def figures(settings: ShiftSettings, runs: Runs) -> list[Picture]:
    """Draw the loss and the inputs' shift by step, and three measures by learning rate."""
    from batchnorm.lab import plots

    best = {arm: select(runs, stage=EVALUATION, arm=arm) for arm in ARMS}
    own = {arm: best[arm][0].trial.rate for arm in ARMS}

    def by_step(name: str, first: int) -> dict[str, Any]:
        x = list(range(first, settings.steps + first, settings.every))
        # A run that diverged stopped early.
        rows = {
            arm: [r.measured[name] + [None] * (len(x) - len(r.measured[name])) for r in best[arm]]
            for arm in ARMS
        }
        return {arm: (x, rows[arm]) for arm in ARMS}

    def by_rate(name: str) -> dict[str, Any]:
        columns = {
            arm: [[value(r, name) for r in _at(runs, arm, rate)] for rate in settings.rates]
            for arm in CLEAN
        }
        return {arm: (settings.rates, list(zip(*columns[arm], strict=True))) for arm in CLEAN}

    seeds = counted(settings.seeds, "seed")
    bands = f"Lines: median of {seeds}; bands: lowest to highest seed."
    rates = ", ".join(f"{own[arm]:g} ({arm})" for arm in ARMS)
    return [
        Picture(
            "learning",
            "Training loss by step",
            "See which line falls first, and what the noise does to each network. Each point is a "
            f"mean over {settings.every} steps, with the noise. {bands} Each at its best learning "
            f"rate: {rates}.",
            plots.curves(
                by_step("losses", settings.every),
                xlabel="training step",
                ylabel="training loss (log scale)",
                xscale="linear",
                yscale="log",
                share=False,
            ),
        ),
        Picture(
            "inputs",
            "How far the layers' inputs move in a step",
            "The shift of 2015 in the very runs of the first figure, median over the layers. See "
            "where the noise puts the normalized network, and compare the order of the lines with "
            f"that of the losses. {bands}",
            plots.curves(
                by_step("shift", 1),
                xlabel="training step",
                ylabel="standard deviations (log scale)",
                xscale="linear",
                yscale="log",
                share=False,
            ),
        ),
        Picture(
            "rates",
            "Both shifts and the range of the loss by learning rate",
            "At one rate, compare the lines above it; at each network's best rate, the rings. "
            "Where the lines of a panel cross, the answer depends on the rate. Runs that did not "
            f"learn are left out. {bands}",
            plots.panels(
                {
                    "2015: the inputs' distributions, in one step": by_rate("shift"),
                    "2018: the gradient, when earlier layers step": by_rate("relative"),
                    "The loss, along its gradient": by_rate("range"),
                },
                ylabel=("standard deviations", "‖G − G′‖ ÷ ‖G‖", "range of the loss"),
                yscale="log",
                share=False,
                marks=True,
                xlabel="learning rate (log scale)",
                rings={arm: own[arm] for arm in CLEAN},
            ),
        ),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="covariate-shift",
    claim="Batch normalization reduces internal covariate shift: the distributions of the layers' "
    "inputs change less while the network learns.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167); against it Santurkar et al. 2018, “How does "
    "batch normalization help optimization?” (arXiv:1805.11604)",
    recipe=1,
    trial=ShiftTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
