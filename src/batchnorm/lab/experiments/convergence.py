"""Faster convergence: the network of figure 1 in the 2015 paper, with and without normalization."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm
from batchnorm.lab import training, tuning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Findings, Picture, Run, Settings, Table
from batchnorm.lab.tuning import EVALUATION, SWEEP, ArmTrial, select
from batchnorm.lab.verdict import judge
from batchnorm.lab.words import compared, counted

PLAIN, NORMALIZED = ARMS = ("plain", "BatchNorm")
PERCENTILES = (15, 50, 85)  # those of the paper's figure 1b, c
XAVIER = "Xavier"


@dataclass(frozen=True, kw_only=True)
class ConvergenceSettings(Settings):
    """The sweep; the sizes that are the paper's (batch 60, 3 × 100 sigmoids) are defaults."""

    tuning_seeds: int
    rates: tuple[float, ...]
    inits: tuple[str, ...]
    steps: int
    every: int = 5
    threshold: float = 0.9
    batch: int = 60
    depth: int = 3
    width: int = 100


@dataclass(frozen=True, kw_only=True)
class ConvergenceTrial(ArmTrial):
    """One training run, with all that it depends on."""

    init: str
    steps: int
    every: int
    batch: int
    depth: int
    width: int


Runs = Sequence[Run[ConvergenceTrial]]

PROFILES = {
    # Half-decades show where each arm's optimum is; steps and seeds are what a minute allows.
    "quick": ConvergenceSettings(
        seeds=8,
        tuning_seeds=2,
        rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        inits=(XAVIER,),
        steps=800,
    ),
    "full": ConvergenceSettings(
        seeds=8,
        tuning_seeds=4,
        rates=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0),
        inits=("0.01", "0.1", XAVIER),
        steps=3000,
    ),
}


# The recipe


def build(trial: ConvergenceTrial, features: int, classes: int) -> nn.Sequential:
    """Return the network; both arms of a seed start from the same weights, bit for bit.

    Weights are normal draws scaled by the init: a standard deviation, or Xavier's
    sqrt(2 / (fan_in + fan_out)). Biases start at zero; a layer that is normalized needs none.
    """
    weights = torch.Generator().manual_seed(trial.seed)
    sizes = [features, *[trial.width] * trial.depth, classes]
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        hidden = index < trial.depth
        normalized = hidden and trial.arm == NORMALIZED
        # skip_init: the layer's own initialisation would draw from the global generator.
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=not normalized)
        std = math.sqrt(2 / (fan_in + fan_out)) if trial.init == XAVIER else float(trial.init)
        nn.init.normal_(linear.weight, std=std, generator=weights)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if normalized:
            layers.append(BatchNorm(fan_out))
        if hidden:
            layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


def run(trial: ConvergenceTrial, data: Dataset) -> Run[ConvergenceTrial]:
    """Train by plain SGD; look at the test set every few steps, in eval mode.

    Evaluation runs are also probed: percentiles of the last sigmoid's input over the test set (of
    all units together, and of unit 0 alone, as in the paper), and the norm of the loss's gradient
    by each layer's weights. The clock of a step stands still meanwhile.
    """
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data))
    net = build(trial, x.shape[1], data.classes)
    body, head = net[:-2], net[-2:]  # cut at the last sigmoid's input
    parameters = list(net.parameters())
    matrices = [i for i, parameter in enumerate(parameters) if parameter.ndim == 2]
    names = ["step", "accuracy"]
    if trial.stage == EVALUATION:
        names += ["all_units", "unit_0", "gradient_norm"]
    curves: dict[str, list[Any]] = {name: [] for name in names}
    clock: list[float] = []
    batches = training.batches(len(x), trial.batch, trial.seed)
    for step, rows in zip(range(1, trial.steps + 1), batches, strict=False):
        start = time.perf_counter()
        loss = cross_entropy(net(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=trial.rate)
        clock.append(time.perf_counter() - start)
        if step % trial.every and step > 1:
            continue
        net.eval()
        with torch.no_grad():
            inputs = body(x_test)
            correct = (head(inputs).argmax(1) == y_test).sum().item()
        net.train()
        curves["step"].append(step)
        curves["accuracy"] += _short([correct / len(y_test)])
        if trial.stage == EVALUATION:
            curves["all_units"].append(_short(np.percentile(inputs, PERCENTILES)))
            curves["unit_0"].append(_short(np.percentile(inputs[:, 0], PERCENTILES)))
            curves["gradient_norm"].append(_short(gradients[i].norm() for i in matrices))
    return Run(trial, curves, {"step_ms": 1000 * statistics.median(clock)})


def _short(values: Iterable[Any]) -> list[float]:
    """Round to 6 digits, of which no accuracy needs more: 17 are most of the results' size."""
    return [float(f"{float(value):.6g}") for value in values]


def steps_to(threshold: float, run: Run[ConvergenceTrial]) -> int | None:
    """Return the first looked-at step with at least this test accuracy; None if there was none."""
    pairs = zip(run.measured["step"], run.measured["accuracy"], strict=True)
    return next((step for step, accuracy in pairs if accuracy >= threshold), None)


def plan(settings: ConvergenceSettings, runs: Runs) -> list[ConvergenceTrial]:
    """Tune init and learning rate of each arm for the fewest mean steps to the threshold.

    Between equals the better mean final accuracy decides.
    """

    def score(swept: Runs) -> tuple[float, float]:
        steps = [steps_to(settings.threshold, r) or settings.steps for r in swept]
        return statistics.fmean(steps), -statistics.fmean(r.measured["accuracy"][-1] for r in swept)

    sizes = {key: getattr(settings, key) for key in ("steps", "every", "batch", "depth", "width")}
    return tuning.plan(
        ConvergenceTrial(stage="", seed=0, arm="", init="", rate=0.0, **sizes),
        runs,
        arms=ARMS,
        corners=[
            {"init": init, "rate": rate} for init in settings.inits for rate in settings.rates
        ],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
        score=score,
    )


# What the runs say


def seconds_to(threshold: float, run: Run[ConvergenceTrial]) -> float:
    """Return the run's own training time to the threshold; of all its steps if it never got there.

    Steps × the median step, not a sum of the clock: one hiccup of the machine must not decide.
    """
    steps = steps_to(threshold, run) or run.measured["step"][-1]
    return float(steps * run.timing["step_ms"] / 1000)


def analyse(settings: ConvergenceSettings, runs: Runs) -> Findings:
    """Judge steps to the threshold, each arm at its own best init and learning rate."""
    level = f"{settings.threshold:.0%}"
    best = {arm: select(runs, stage=EVALUATION, arm=arm) for arm in ARMS}
    reached = {arm: [steps_to(settings.threshold, r) for r in best[arm]] for arm in ARMS}
    rows, took, caveats = [], {}, []
    for arm in ARMS:
        trial = best[arm][0].trial
        steps = sorted(step or settings.steps for step in reached[arm])
        middle, never = statistics.median(steps), reached[arm].count(None)
        # Of an even number the median is a mean of two: one that is censored makes it a bound.
        beyond = 2 * never >= len(steps)
        reach = f"{steps[0]}–{'>' if never else ''}{steps[-1]}" if never < len(steps) else "all"
        spread = f" ({reach})" if len(steps) > 1 else ""
        mark = ">" if beyond else ""
        accuracy = statistics.fmean(r.measured["accuracy"][-1] for r in best[arm])
        step_ms = statistics.median(r.timing["step_ms"] for r in best[arm])
        seconds = statistics.median(seconds_to(settings.threshold, r) for r in best[arm])
        took[arm] = f"{'more than ' if beyond else ''}{middle:g} steps"
        rows.append(
            {
                "network": arm,
                "rate": f"{trial.rate:g}",
                "init": trial.init,
                f"steps to {level}": f"{mark}{middle:g}{spread}",
                "reached": f"{len(steps) - never} of {len(steps)}",
                "accuracy": f"{accuracy:.1%}",
                "ms/step": f"{step_ms:.2f}",
                f"s to {level}": f"{mark}{seconds:.3f}",
            }
        )
        if caveat := tuning.edge(trial, settings.rates):
            caveats.append(caveat)
        if never:
            caveats.append(
                f"{never} of {counted(len(steps), 'run')} of the {arm} network never got to "
                f"{level}; counted as {settings.steps} steps, which is less than needed."
            )
    verdict = judge(
        reached[PLAIN], reached[NORMALIZED], unit="steps", horizon=settings.steps, names=ARMS
    )
    # Where there was one init, the recipe names it, and a terminal has the more room.
    columns = tuple(key for key in rows[0] if key != "init" or len(settings.inits) > 1)
    medians = "medians of " if settings.seeds > 1 else ""
    tuned = "pair of init and learning rate" if len(settings.inits) > 1 else "learning rate"
    return Findings(
        summary=(
            f"To reach {level} test accuracy, the plain network took {took[PLAIN]}, the one with "
            f"BatchNorm {took[NORMALIZED]}: {medians}{counted(settings.seeds, 'seed')}, each "
            f"network at the best {tuned} of those tried for it."
        ),
        verdict=verdict,
        table=Table(columns, tuple(tuple(row[column] for column in columns) for row in rows)),
        recipe=(
            f"{settings.depth} hidden layers of {settings.width} sigmoid units; batches of "
            f"{settings.batch}; plain SGD at a constant rate on the cross-entropy, "
            f"{settings.steps} steps.",
            "One network is plain; the other has BatchNorm before each sigmoid, and no bias there. "
            "Both networks of a seed start from the same normal draws and see the same batches.",
            f"Scale of the initial weights: {', '.join(settings.inits)}. Learning rates: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}. The {tuned} is tuned for each "
            f"network by itself, {counted(settings.tuning_seeds, 'seed')} for each; fewest mean "
            f"steps win, and between equals the better mean final accuracy. {tuning.HOW}",
            f"The verdict comes from {counted(settings.seeds, 'other seed')}. What counts is the "
            f"first step with a test accuracy of {level} or more, looked at every "
            f"{settings.every} steps in eval mode, with running statistics. A run that never gets "
            f"there counts as {settings.steps} steps.",
        ),
        caveats=(*caveats, *verdict.caveats()),
        not_shown=(
            "Anything about convolutional networks or large data. The paper's factor of 14 was "
            "found with an Inception network on ImageNet; this run neither confirms nor denies it.",
            "That the plain network could not be helped in another way: a different activation, "
            "optimiser or schedule.",
            "Why there is a difference. The percentiles and gradients go along with it; nothing "
            "here shows that they cause it.",
        ),
    )


# What there is to see


def figures(settings: ConvergenceSettings, runs: Runs) -> list[Picture]:
    """Draw accuracy, the sweep, the last sigmoid's input, gradient norms and time per step."""
    from batchnorm.lab import plots

    best = {arm: select(runs, stage=EVALUATION, arm=arm) for arm in ARMS}
    corners = {arm: (best[arm][0].trial.init, best[arm][0].trial.rate) for arm in ARMS}
    x = best[PLAIN][0].measured["step"]
    level = f"{settings.threshold:.0%}"
    seeds = counted(settings.seeds, "seed")
    many = settings.seeds > 1
    bands = f"Lines: median of {seeds}; bands: lowest to highest seed." if many else "One seed."

    def quantiles(name: str, first: int) -> Any:
        def rows(arm: str, i: int) -> plots.Rows:
            return [[point[i] for point in r.measured[name]] for r in best[arm][:first]]

        return {
            arm: (x, {f"{p}%": rows(arm, i) for i, p in enumerate(PERCENTILES)}) for arm in ARMS
        }

    def swept(init: str, arm: str, rate: float) -> list[int | None]:
        found = select(runs, stage=SWEEP, arm=arm, init=init, rate=rate)
        return [steps_to(settings.threshold, r) for r in found]

    panels = {
        init: {arm: {rate: swept(init, arm, rate) for rate in settings.rates} for arm in ARMS}
        for init in settings.inits
    }
    always = {
        arm: sum(None not in steps for arms in panels.values() for steps in arms[arm].values())
        for arm in ARMS
    }
    norms = {arm: [r.measured["gradient_norm"][0] for r in best[arm]] for arm in ARMS}
    spread = {
        # A gradient that is zero or not finite has no ratio.
        arm: statistics.median([n[-1] / n[0] for n in norms[arm] if n[0] and n[-1]] or [math.nan])
        for arm in ARMS
    }
    clock = {arm: [r.timing["step_ms"] for r in best[arm]] for arm in ARMS}
    step_ms = {arm: statistics.median(clock[arm]) for arm in ARMS}
    slower = compared(
        step_ms[NORMALIZED] / step_ms[PLAIN], "as long as", "less time than", "as long as"
    )
    apart = {arm: compared(spread[arm], "larger", "smaller", "as large") for arm in ARMS}
    return [
        Picture(
            "accuracy",
            "Test accuracy by step",
            f"See where each line crosses the dotted one at {level}, and where it ends. {bands} "
            "Each network is at the best learning rate tried for it: "
            f"{' and '.join(f'{rate:g} ({arm})' for arm, (_, rate) in corners.items())}.",
            plots.curves(
                {arm: (x, [r.measured["accuracy"] for r in best[arm]]) for arm in ARMS},
                xlabel="training step (log scale)",
                ylabel="test accuracy",
                level=settings.threshold,
                level_label=level,
            ),
        ),
        Picture(
            "sweep",
            f"Steps to {level} by learning rate",
            f"Lower is faster. Every tuning seed ({settings.tuning_seeds}) got to {level} at "
            f"{always[PLAIN]} of {len(settings.rates) * len(settings.inits)} points of the sweep "
            f"without BatchNorm, at {always[NORMALIZED]} with it. A mark is a seed; an open mark, "
            f"on the dotted line, never got there in {settings.steps} steps. Lines join the "
            "medians; a ring is what was chosen for the evaluation.",
            plots.sweep(
                {f"initial weights: {init}": arms for init, arms in panels.items()},
                horizon=settings.steps,
                horizon_label=f"not reached in {settings.steps} steps",
                chosen={(f"initial weights: {i}", arm): r for arm, (i, r) in corners.items()},
                xlabel="learning rate",
                ylabel=f"steps to {level}",
            ),
        ),
        Picture(
            "inputs",
            "Input of the last sigmoids",
            "See how far and how fast the percentiles move. All units of the last hidden layer "
            f"over the test set, in eval mode. {bands}",
            plots.quantile_panels(
                quantiles("all_units", settings.seeds), xlabel="training step", ylabel="input"
            ),
        ),
        Picture(
            "one-input",
            "Input of one sigmoid",
            "The same for one unit, as in the paper's figure 1b and c: unit 0 of the first "
            "evaluation seed, settled before the run. One unit is an anecdote; the figure above "
            "is the evidence.",
            plots.quantile_panels(quantiles("unit_0", 1), xlabel="training step", ylabel="input"),
        ),
        Picture(
            "gradients",
            "Gradient norm by layer at the first step",
            "Layer 1 is next to the data. A line that climbs means that little of the gradient "
            "gets back to the first layers: against the first layer's, the last one's is "
            f"{apart[PLAIN]} in the plain network and {apart[NORMALIZED]} with BatchNorm. (The "
            "layers' matrices differ in size, so a level line is no law.) "
            + (f"Marks: median of {seeds}; strokes: lowest to highest seed." if many else bands),
            plots.by_layer(
                norms, xlabel="layer", ylabel="norm of the loss's gradient\nby the weights"
            ),
        ),
        Picture(
            "time",
            "Time per step",
            f"A step with BatchNorm took {slower} a plain one: {step_ms[NORMALIZED]:.2f} ms and "
            f"{step_ms[PLAIN]:.2f} ms, on one CPU thread, beside whatever else the machine did "
            "(with several jobs, other runs). The ratio is that of this library's layer as it is "
            "now, at a size where the cost of calls dominates that of arithmetic: expect another "
            f"one from a larger network. The table's “s to {level}” is the median over runs of "
            f"steps × the run's own ms/step. A mark is the median over the steps of a seed, {seeds}"
            f"{'; a stroke is their median' if many else ''}.",
            plots.strips(clock, xlabel="milliseconds per training step"),
        ),
    ]


EXPERIMENT = Experiment(
    name="convergence",
    claim="Batch normalization lets a network learn in fewer steps.",
    source="Ioffe & Szegedy 2015, figure 1 (arXiv:1502.03167)",
    recipe=2,
    trial=ConvergenceTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
