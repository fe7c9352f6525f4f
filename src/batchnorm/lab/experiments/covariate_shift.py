"""Internal covariate shift, by its definitions of 2015 and of 2018, and the loss's smoothness."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from batchnorm import BatchNorm
from batchnorm.lab import landscape, networks, training, tuning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Findings, Judged, Picture, Run, Settings, Table
from batchnorm.lab.tuning import EVALUATION, SWEEP, ArmTrial, select
from batchnorm.lab.verdict import Verdict, judge
from batchnorm.lab.words import bands, counted

PLAIN, NORMALIZED, NOISY_PLAIN, NOISY = ARMS = (
    "plain", "BatchNorm", "plain + noise", "BatchNorm + noise"
)  # fmt: skip
CLEAN = (PLAIN, NORMALIZED)
EVERY_RATE = "every rate"

MEASURES = ("shift", "held", "relative", "departure", "gradient", "smoothness")

#: How far to go along the gradient, in multiples of it: half to four steps at a rate of 0.1. The
#: same for every network: what saturates is the smaller per length the longer the way.
LENGTHS = (0.05, 0.1, 0.2, 0.4)

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How long to train what; how often to look, until what loss, and over how many rows."""

    steps: int
    every: int = 10
    level: float = 0.1
    probe: int = 500
    depth: int = 6
    width: int = 100
    batch: int = 60


@dataclass(frozen=True, kw_only=True)
class ShiftSettings(Sizes, Settings):
    """The sweep."""

    tuning_seeds: int
    rates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ShiftTrial(Sizes, ArmTrial):
    """One training run."""


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
        line = landscape.along(net, xs, ys, (loss, gradient), LENGTHS)
        before, held = landscape.inputs(net, probe), landscape.statistics(net, probe)
        changes = landscape.update(net, xs, ys, gradient, trial.rate)
        landscape.set_step(net, step + 1)
        shift = _middle(landscape.moved(before, landscape.inputs(net, probe)))
        seen["shift"].append(shift)
        if held:
            shift = _middle(landscape.moved(before, landscape.inputs(net, probe, held)))
        seen["held"].append(shift)
        seen["relative"].append(_middle(changes))
        for name in ("departure", "gradient", "smoothness"):
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
    sizes = {field.name: getattr(settings, field.name) for field in fields(Sizes)}
    template = ShiftTrial(stage="", seed=0, arm="", rate=0.0, **sizes)

    def score(swept: Runs) -> float:
        losses = (r.measured["loss"] if r.measured["learned"] else math.inf for r in swept)
        return statistics.fmean(losses)

    seeds = {"tuning_seeds": settings.tuning_seeds, "seeds": settings.seeds}
    corners = [{"rate": rate} for rate in settings.rates]
    wanted = tuning.plan(template, runs, arms=ARMS, corners=corners, score=score, **seeds)
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
    found = _middle([value(r, name) for r in runs])
    return "–" if found is None else f"{found:.2g}"


def _judge(names: tuple[str, str], *values: Sequence[float | None]) -> Verdict:
    """Judge that the second is smaller, by logarithms: of ratios, an average is no use."""
    worst = max((v for row in values for v in row if v is not None), default=1.0)
    filled = [[worst if v is None else v for v in row] for row in values]
    # A loss that leaves the line by nothing but its rounding still has a logarithm.
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
    shared, own = plain[0].trial.rate, bn[0].trial.rate
    same = _at(runs, NORMALIZED, shared)
    verdict = _less("shift", plain, bn)
    harm = _judge((NOISY_PLAIN, NOISY), _harm(noisy_plain, plain), _harm(noisy, bn))
    at = "At one and the same rate for both, that of the plain network, batch normalization"
    makes = "Batch normalization makes the gradient"
    noisily = "noise that moves the inputs of the layers at every step"
    ours = {
        f"{at} reduces the shift of 2015, too.": _less("shift", plain, same),
        f"{noisily.capitalize()} harms a plain network more than a normalized one.": harm,
        "With batch normalization the loss keeps closer to the straight line that its gradient "
        "foretells.": _less("departure", plain, bn),
    }
    also = {
        f"{at} reduces the shift of 2018: once the earlier layers have been updated, a layer's "
        "gradient has changed by a smaller part of its size.": _less("relative", plain, same),
        f"With {noisily}, a normalized network still learns faster than a plain one without "
        "noise.": _less("loss", plain, noisy),
        f"{makes} more predictive: on the way along it, the gradient changes by a smaller part of "
        "its size.": _less("gradient", plain, bn),
        f"{makes} change less for the distance moved: the effective β-smoothness is "
        "smaller.": _less("smoothness", plain, bn),
    }
    columns = ("loss", "shift", "held", "relative", "departure")
    # If both have the same best rate, one row says it all.
    shown = [plain, *([same] if shared != own else []), bn, noisy, noisy_plain]
    failed = sum(not r.measured["learned"] for of in shown for r in of)
    caveats = [*tuning.edges(runs, settings.rates), *verdict.caveats()]
    if failed:
        caveats.append(
            f"{counted(failed, 'run')} judged did not learn, and counted as the worst of those "
            "that did."
        )
    by_rate = [[_at(runs, arm, rate) for arm in CLEAN] for rate in settings.rates]
    pairs = [[_middle([value(r, "relative") for r in of]) for of in both] for both in by_rate]
    order = [a > b for a, b in pairs if a is not None and b is not None]
    return Findings(
        summary=(
            "In one step the distributions of the layers' inputs moved by "
            f"{_said(plain, 'shift')} standard deviations in the plain network and by "
            f"{_said(bn, 'shift')} with BatchNorm, each at its best rate ({shared:g} and {own:g}), "
            f"and by {_said(same, 'shift')} with BatchNorm at {shared:g}. Had its normalizations "
            "kept the statistics from before the step, they would have moved by "
            f"{_said(bn, 'held')} and {_said(same, 'held')}. The shift of 2018, ‖G − G′‖ ÷ ‖G‖, "
            f"was {_said(plain, 'relative')} and {_said(same, 'relative')} with both at "
            f"{shared:g}; BatchNorm had the smaller one at {sum(order)} of the "
            f"{counted(len(order), 'rate')} at which both learned. Noise moved the normalized "
            f"network's inputs by {_said(noisy, 'shift')}, and it had a mean training loss of "
            f"{_said(noisy, 'loss')}; the plain one had {_said(plain, 'loss')} without noise and "
            f"{_said(noisy_plain, 'loss')} with it. Along the gradient the loss left its line by "
            f"{_said(plain, 'departure')} times the descent foretold in the plain network and by "
            f"{_said(bn, 'departure')} with BatchNorm. These are medians of "
            f"{counted(settings.seeds, 'seed')}."
        ),
        verdict=verdict,
        table=Table(
            ("network", "rate", "loss", "shift 2015", "held", "shift 2018", "off line"),
            tuple(
                (of[0].trial.arm, f"{of[0].trial.rate:g}", *(_said(of, name) for name in columns))
                for of in shown
            ),
        ),
        recipe=(
            f"{settings.depth} hidden layers of {settings.width} ReLU units, He's initial weights; "
            f"plain SGD at a constant rate, {settings.steps} steps, batches of {settings.batch}; "
            "BatchNorm before the ReLU.",
            f"The noise stands between the two, in the plain network at the same place: "
            f"{landscape.NOISE} How far it moves a layer's inputs follows from these numbers, and "
            "is no finding.",
            f"Learning rates: {', '.join(f'{rate:g}' for rate in settings.rates)}. The best is the "
            "one with the least training loss, noise included, in the mean over all steps; tuned "
            f"for each network by itself, {counted(settings.tuning_seeds, 'seed')} for each. The "
            "verdicts come from other seeds. Only training rows are used: the question is how "
            "networks learn, and no test row is looked at.",
            f"Shift of 2015: every {settings.every} steps, the inputs of each layer but the first "
            f"over the same {settings.probe} training rows, before and after the step. "
            f"{landscape.DISTANCE} “Held”: after the step, the normalizations use the statistics "
            "of those rows from before it, and cannot take back its effect.",
            f"Shift of 2018: {landscape.GRADIENT_SHIFT}",
            f"Along the gradient, at {', '.join(f'{length:g}' for length in LENGTHS)} times it in "
            "every network: the loss and the gradient again; of each measure the largest. “Off "
            f"line”: {landscape.OFF_LINE}",
            "Of each run the median over layers and over all looks until the mean loss of "
            f"{settings.every} steps is below {settings.level:g}, so that networks are compared "
            "while they learn. Verdicts are on the logarithms: a decade is a factor of ten.",
        ),
        caveats=(
            *caveats,
            f"{1 + len(also) + len(ours)} verdicts are read off the same runs: of so many, one "
            "that is narrow may be chance.",
        ),
        not_shown=(
            "That batch normalization works because of either: measures that go along with "
            "learning fast need not cause it. Only the noise is an intervention, and the most it "
            "can say is that distributions need not keep still, not that it does no good.",
            "Slow drifts, or smoothness everywhere: the shift of 2015 was measured over single "
            "steps, and the loss along one line from where each network went.",
            "That the two definitions are about one thing. Both grow with the length of the step, "
            "so a network that bears a larger rate is charged for using it. Of 2018's there is "
            "no verdict at the networks' own rates: at large ones ‖G − G′‖ ÷ ‖G‖ is near one for "
            "both, and which is the larger hangs on the rates that were tried.",
            "That a multiple of the gradient is as far a way in one network as in the other: a "
            "normalized layer does not care for the scale of its weights, which sets the size of "
            "the gradient. All that is measured along the gradient hangs on that scale, and at one "
            "rate for both so do the shifts.",
            "Which network ends lower: the mean loss over all steps says which one learns sooner. "
            "Nor anything of unseen data, other optimisers, or convolutional or deeper networks.",
        ),
        also=(
            *(Judged(claim, found) for claim, found in also.items()),
            *(Judged(claim, found, ours=True) for claim, found in ours.items()),
        ),
    )


# What there is to see


def figures(settings: ShiftSettings, runs: Runs) -> list[Picture]:
    """Draw the loss and the inputs' shift by step, and three measures by learning rate."""
    from batchnorm.lab import plots

    best = {arm: select(runs, stage=EVALUATION, arm=arm) for arm in ARMS}
    own = {arm: best[arm][0].trial.rate for arm in ARMS}

    def by_step(name: str, first: int, ylabel: str) -> Any:
        x = list(range(first, settings.steps + first, settings.every))
        # A run that diverged stopped early.
        rows = {
            arm: [r.measured[name] + [None] * (len(x) - len(r.measured[name])) for r in best[arm]]
            for arm in ARMS
        }
        return plots.curves(
            {arm: (x, rows[arm]) for arm in ARMS},
            xlabel="training step", ylabel=f"{ylabel} (log scale)", xscale="linear", yscale="log",
            share=False,
        )  # fmt: skip

    def by_rate(name: str) -> dict[str, Any]:
        columns = {
            arm: [[value(r, name) for r in _at(runs, arm, rate)] for rate in settings.rates]
            for arm in CLEAN
        }
        return {arm: (settings.rates, list(zip(*columns[arm], strict=True))) for arm in CLEAN}

    lines = bands(settings.seeds)
    rates = ", ".join(f"{own[arm]:g} ({arm})" for arm in ARMS)
    return [
        Picture(
            "learning",
            "Training loss by step",
            "See which line falls first, and what the noise does to each network. Each point is a "
            f"mean over {settings.every} steps, with the noise. {lines} Each at its best learning "
            f"rate: {rates}.",
            by_step("losses", settings.every, "training loss"),
        ),
        Picture(
            "inputs",
            "How far the layers' inputs move in a step",
            "The shift of 2015 in the very runs of the first figure, median over the layers. See "
            "where the noise puts the normalized network, and compare the order of the lines with "
            f"that of the losses. {lines}",
            by_step("shift", 1, "standard deviations"),
        ),
        Picture(
            "rates",
            "Both shifts and the loss off its line by learning rate",
            "At one rate, compare the lines above it; at each network's best rate, the rings. "
            "Where the lines of a panel cross, the answer depends on the rate. In the third, the "
            "lengths of the way are the same at every rate, which only says where the network "
            f"went. Runs that did not learn are left out. {lines}",
            plots.panels(
                {
                    "2015: the inputs' distributions, in one step": by_rate("shift"),
                    "2018: the gradient, when earlier layers step": by_rate("relative"),
                    "The loss, along its gradient": by_rate("departure"),
                },
                ylabel=("standard deviations", "‖G − G′‖ ÷ ‖G‖", "off the straight line"),
                xlabel="learning rate (log scale)", yscale="log", share=False, marks=True,
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
    recipe=2,
    trial=ShiftTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
