"""The scale of weights before normalization does not matter, and divides their gradient.

Normalization divides what comes by its standard deviation, and with it any factor a of the weights:
BN(a·W x) = BN(W x). The derivative by a·W is then 1/a of that by W, and both stand at right angles
to the weights, along which nothing changes. In training by plain SGD it follows that

- weights a times as large need a² times the learning rate for the same steps, in relation to them;
- ‖W‖² grows by the square of each step (Pythagoras): it cannot shrink without weight decay.

All of it is exact but for ε, which is added to the variance. Scaled networks are tested with the ε
that layers have; in training the small difference that it makes would grow from step to step, and
there it is next to nothing.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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
from batchnorm.lab.networks import nothing
from batchnorm.lab.tuning import select
from batchnorm.lab.verdict import Verdict, judge_within
from batchnorm.lab.words import counted

PLAIN, NORMALIZED = ARMS = ("plain", "BatchNorm")
SCALED, TRAINED = "scaled networks", "training"

#: How far from the theory a number may be, of it, and count as the same. ε = 1e-5 beside a variance
#: of about 1 changes each layer by 5e-6, which leaves room for many layers and smaller variances.
TOLERANCE = 1e-3

#: The layers' own ε, and that of the training: the rounding of float64 beside a variance of 1e-4.
EPSILON, NEARLY_NONE = 1e-5, 1e-12


@dataclass(frozen=True, kw_only=True)
class InvarianceSettings(Settings):
    """The factors that weights are multiplied by; `trained`: the one of the training.

    Of the factors those above 1 are judged: below, it is ε that is tested.
    """

    factors: tuple[float, ...] = (0.001, 0.01, 0.1, 10.0, 100.0, 1000.0)
    trained: float = 10.0
    rate: float = 0.1
    steps: int = 200
    depth: int = 3
    width: int = 100
    batch: int = 60


@dataclass(frozen=True, kw_only=True)
class InvarianceTrial(Trial):
    """One network, its weights times a factor, and their learning rate times `boost`."""

    arm: str
    factor: float
    boost: float
    rate: float
    steps: int
    eps: float
    depth: int
    width: int
    batch: int


Runs = Sequence[Run[InvarianceTrial]]

PROFILES = {
    "quick": InvarianceSettings(seeds=8),
    "full": InvarianceSettings(seeds=8, depth=10, steps=400),
}


def run(trial: InvarianceTrial, data: Dataset) -> Run[InvarianceTrial]:
    """Compare a network whose hidden weights are scaled with itself before; then train it.

    Measured are the change of the outputs and, a number a layer, of factor × gradient, both as a
    share of what they were; in training the loss, and for all hidden weights together how much
    ‖W‖² has grown and the sum of the squared steps.
    """
    x, y, _, _ = training.tensors(data)
    x = x.double()
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        functools.partial(BatchNorm, eps=trial.eps) if trial.arm == NORMALIZED else nothing,
        training.generator(trial.seed),
    ).double()
    hidden = [layer.weight for layer in net if isinstance(layer, nn.Linear)][:-1]
    others = [p for p in net.parameters() if all(p is not weight for weight in hidden)]
    first = next(training.batches(len(x), trial.batch, trial.seed))

    def look() -> tuple[Tensor, list[Tensor]]:
        outputs = net(x[first])
        loss = cross_entropy(outputs, y[first])
        return outputs.detach(), list(torch.autograd.grad(loss, hidden))

    outputs, gradients = look()
    with torch.no_grad():
        for weight in hidden:
            weight.mul_(trial.factor)
    scaled, divided = look()
    measured: dict[str, Any] = {
        "outputs": float((scaled - outputs).norm() / outputs.norm()),
        "gradients": [
            float((trial.factor * new - old).norm() / old.norm())
            for new, old in zip(divided, gradients, strict=True)
        ],
        "gradient_norm": math.hypot(*(float(g.norm()) for g in divided)),
    }
    if trial.steps:
        optimizer = torch.optim.SGD(others, trial.rate)
        optimizer.add_param_group({"params": hidden, "lr": trial.rate * trial.boost})
        start = squares(hidden)
        curves: dict[str, list[float]] = {"losses": [], "growth": [], "squared_steps": []}
        walked = 0.0
        order = training.batches(len(x), trial.batch, trial.seed)
        for _, rows in zip(range(trial.steps), order, strict=False):
            optimizer.zero_grad()
            loss = cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            before = [weight.detach().clone() for weight in hidden]
            optimizer.step()
            walked += squares([new - old for new, old in zip(hidden, before, strict=True)])
            curves["losses"].append(float(loss.detach()))
            curves["growth"].append((squares(hidden) - start) / start)
            curves["squared_steps"].append(walked / start)
        measured |= curves
    return Run(trial, measured, {})


def squares(parts: Sequence[Tensor]) -> float:
    """The sum of the squares of all elements."""
    return sum(float(part.detach().square().sum()) for part in parts)


def plan(settings: InvarianceSettings, _: Runs) -> list[InvarianceTrial]:
    """Both arms at every factor, and those that are trained, with every seed."""
    a = settings.trained
    kinds = [(SCALED, arm, factor, 1.0) for factor in settings.factors for arm in ARMS]
    kinds += [(TRAINED, arm, 1.0, 1.0) for arm in ARMS]
    kinds += [(TRAINED, NORMALIZED, a, boost) for boost in (1.0, a**2)]
    return [
        InvarianceTrial(
            stage=stage,
            seed=seed,
            arm=arm,
            factor=factor,
            boost=boost,
            rate=settings.rate,
            steps=settings.steps if stage == TRAINED else 0,
            eps=NEARLY_NONE if stage == TRAINED else EPSILON,
            depth=settings.depth,
            width=settings.width,
            batch=settings.batch,
        )
        for seed in range(settings.seeds)
        for stage, arm, factor, boost in kinds
    ]


def worst(settings: InvarianceSettings, runs: Runs, arm: str, key: str) -> list[float]:
    """The largest change of a seed, over the factors above 1 (and the layers)."""
    found = [
        [
            max(r.measured[key]) if key == "gradients" else r.measured[key]
            for r in select(runs, stage=SCALED, arm=arm, factor=factor)
        ]
        for factor in settings.factors
        if factor > 1
    ]
    return [max(seed) for seed in zip(*found, strict=True)]


def losses(runs: Runs, factor: float, boost: float = 1.0) -> list[list[float]]:
    """The normalized networks' training losses by step, a row a seed."""
    found = select(runs, stage=TRAINED, arm=NORMALIZED, factor=factor, boost=boost)
    return [r.measured["losses"] for r in found]


def apart(settings: InvarianceSettings, runs: Runs, boost: float) -> list[list[float]]:
    """How far the scaled weights' losses are from the others', of the first; a row a seed."""
    pairs = zip(losses(runs, 1.0), losses(runs, settings.trained, boost), strict=True)
    return [[abs(b - a) / one[0] for a, b in zip(one, other, strict=True)] for one, other in pairs]


def ratios(runs: Runs, arm: str) -> list[list[float]]:
    """‖W‖²'s growth by the sum of the squared steps, by step, a row a seed."""
    return [
        [
            growth / walked
            for growth, walked in zip(
                r.measured["growth"], r.measured["squared_steps"], strict=True
            )
        ]
        for r in select(runs, stage=TRAINED, arm=arm, factor=1.0)
    ]


def analyse(settings: InvarianceSettings, runs: Runs) -> Findings:
    """Judge each change against the tolerance."""

    def same(errors: Sequence[float]) -> Verdict:
        return judge_within(TOLERANCE, errors, unit="relative change")

    a, boost = settings.trained, settings.trained**2
    drift, slower = ([max(row) for row in apart(settings, runs, factor)] for factor in (boost, 1.0))
    outputs = worst(settings, runs, NORMALIZED, "outputs")
    gradients = worst(settings, runs, NORMALIZED, "gradients")
    verdict = same(outputs)
    most, least = max(settings.factors), min(settings.factors)
    small = select(runs, stage=SCALED, arm=NORMALIZED, factor=least)
    plain = worst(settings, runs, PLAIN, "outputs")
    growth = [
        r.measured["growth"][-1] for r in select(runs, stage=TRAINED, arm=NORMALIZED, factor=1.0)
    ]
    rows = []
    for factor in settings.factors:
        by_arm = {arm: select(runs, stage=SCALED, arm=arm, factor=factor) for arm in ARMS}
        norm = statistics.fmean(r.measured["gradient_norm"] for r in by_arm[NORMALIZED])
        change = {arm: max(r.measured["outputs"] for r in by_arm[arm]) for arm in ARMS}
        rows.append(
            (
                f"× {factor:g}",
                f"{change[PLAIN]:.1e}",
                f"{change[NORMALIZED]:.1e}",
                f"{norm:.4g}",
                f"{factor * norm:.4g}",
            )
        )
    return Findings(
        summary=(
            f"With all hidden weights up to {most:g} times as large, the outputs of the network "
            f"with BatchNorm changed by {max(outputs):.0e} of themselves at most, those of the "
            f"plain one by {min(plain):.0e} at least; factor × gradient changed by "
            f"{max(gradients):.0e} at most. Trained with {boost:g} times the learning rate, "
            f"weights {a:g} times as large had the same losses in {settings.steps} steps, to "
            f"{max(drift):.0e} of the first one; with the same rate they came to be "
            f"{min(slower):.0%} of it apart, or more."
        ),
        verdict=verdict,
        table=Table(
            ("weights", "plain changed", "BatchNorm changed", "‖gradient‖", "× factor"),
            tuple(rows),
        ),
        recipe=(
            f"{settings.depth} hidden layers of {settings.width} units with ReLU, with BatchNorm "
            f"before it or plain; a batch of {settings.batch}, cross-entropy, float64.",
            "All hidden weight matrices are multiplied by a factor. What changes is measured as "
            "‖difference‖ / ‖before‖: of the outputs, and of factor × gradient in each layer. The "
            "worst of the factors above 1 and of the layers counts.",
            f"Training: {settings.steps} steps of plain SGD at the rate {settings.rate:g}, without "
            f"momentum and weight decay; weights × {a:g} at that rate and at {boost:g} times that "
            "rate (γ, β and the head at the rate itself), with the same batches. There BatchNorm "
            f"has ε = {NEARLY_NONE:g}, elsewhere {EPSILON:g}.",
            f"A change counts as none below {TOLERANCE:g}.",
        ),
        caveats=(
            f"The invariance ends where the variance is no longer large beside ε: with weights × "
            f"{least:g} the outputs changed by up to "
            f"{max(r.measured['outputs'] for r in small):.0%}.",
            *verdict.caveats(),
        ),
        not_shown=(
            "What it does to a longer training: in this one ‖W‖² grew by "
            f"{statistics.fmean(growth):.2%}, which is too little to slow it.",
            "That weight decay has no effect. The function does not care for the scale of such "
            "weights, but their effective learning rate does.",
            "Anything of momentum or of optimizers that divide by the gradient's size, as Adam "
            "does: their steps scale otherwise.",
        ),
        also=(
            Judged("The gradient by weights a times as large is 1/a as large.", same(gradients)),
            Judged(
                "Weights a times as large, with a² times the learning rate, train the same.",
                same(drift),
            ),
            Judged(
                "Without weight decay ‖W‖² grows in training, by the square of every step.",
                same([abs(ratio[-1] - 1) for ratio in ratios(runs, NORMALIZED)]),
            ),
        ),
    )


def figures(settings: InvarianceSettings, runs: Runs) -> list[Picture]:
    """Draw the outputs' change by factor, the training losses, and the growth of the weights."""
    from batchnorm.lab import plots

    a = settings.trained
    steps = range(1, settings.steps + 1)
    changes = {
        arm: [
            [r.measured["outputs"] for r in select(runs, stage=SCALED, arm=arm, seed=seed)]
            for seed in range(settings.seeds)
        ]
        for arm in ARMS
    }
    bands = f"Lines: median of {counted(settings.seeds, 'seed')}; bands: lowest to highest seed."
    return [
        Picture(
            "outputs",
            "How much the outputs change with the scale of the weights",
            "With BatchNorm the change is small, and the same for every factor above 1: what "
            "remains is the ε of the unscaled network. To the left, small weights bring the "
            f"variance near to ε, and the invariance ends. {bands}",
            plots.curves(
                {arm: (settings.factors, changes[arm]) for arm in ARMS},
                xlabel="factor of the hidden weights",
                ylabel="‖change of the outputs‖ / ‖outputs‖",
                yscale="log",
                share=False,
                marks=True,
                level=TOLERANCE,
                level_label="counts as none",
            ),
        ),
        Picture(
            "training",
            f"Training with weights {a:g} times as large",
            f"With {a**2:g} times the learning rate the losses are those of the network whose "
            f"weights were not scaled, but for rounding; at the same rate they are not. {bands}",
            plots.curves(
                {
                    "same rate": (steps, apart(settings, runs, 1.0)),
                    f"rate × {a**2:g}": (steps, apart(settings, runs, a**2)),
                },
                xlabel="training step",
                ylabel="distance from the loss with weights × 1,\nof the first loss",
                xscale="linear",
                yscale="log",
                share=False,
                level=TOLERANCE,
                level_label="counts as none",
            ),
        ),
        Picture(
            "growth",
            "Growth of the hidden weights",
            "1 is where ‖W‖² grows by the square of every step, no more and no less. So it does "
            "before normalization, where the gradient stands at right angles to the weights; in "
            f"the plain network it need not. {bands}",
            plots.curves(
                {arm: (steps, ratios(runs, arm)) for arm in ARMS},
                xlabel="training step",
                ylabel="growth of ‖W‖² /\nsum of the squared steps",
                xscale="linear",
                share=False,
                level=1,
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="invariance",
    claim="A network with batch normalization computes the same whatever the scale of the weights "
    "before it.",
    source="Ioffe & Szegedy 2015, section 3.3 (arXiv:1502.03167); on training, van Laarhoven 2017, "
    "“L2 regularization versus batch and weight normalization” (arXiv:1706.05350)",
    recipe=2,
    trial=InvarianceTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
