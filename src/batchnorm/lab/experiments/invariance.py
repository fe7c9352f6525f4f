"""The scale of weights before a batch norm does not matter, and divides their gradient."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm
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

#: How far a ratio may be from the theory's. ε = 1e-5 in the variance, beside a variance of about 1,
#: changes the output by 5e-6 of itself; layers with a smaller one, by more.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class InvarianceSettings(Settings):
    """The factors that weights are multiplied by."""

    factors: tuple[float, ...] = (1.0, 10.0, 100.0)
    depth: int = 3
    width: int = 100
    batch: int = 60


@dataclass(frozen=True, kw_only=True)
class InvarianceTrial(Trial):
    """One network at initialization."""

    factor: float
    depth: int
    width: int
    batch: int


Runs = Sequence[Run[InvarianceTrial]]

PROFILES = {
    "quick": InvarianceSettings(seeds=8),
    "full": InvarianceSettings(seeds=8, factors=(0.1, 1.0, 10.0, 100.0, 1000.0), depth=10),
}


def run(trial: InvarianceTrial, data: Dataset) -> Run[InvarianceTrial]:
    """Loss, and the norm of its gradient by each hidden layer's weights."""
    generator = torch.Generator().manual_seed(trial.seed)
    x, y = torch.tensor(data.x_train).flatten(1).double(), torch.tensor(data.y_train)
    rows = torch.randperm(len(x), generator=generator)[: trial.batch]
    layers: list[nn.Module] = []
    for fan_in in [x.shape[1], *[trial.width] * (trial.depth - 1)]:
        linear = nn.utils.skip_init(nn.Linear, fan_in, trial.width, bias=False)
        nn.init.normal_(linear.weight, std=fan_in**-0.5, generator=generator)
        layers += [linear, BatchNorm(trial.width), nn.Sigmoid()]
    head = nn.utils.skip_init(nn.Linear, trial.width, data.classes, bias=False)
    nn.init.normal_(head.weight, std=trial.width**-0.5, generator=generator)
    net = nn.Sequential(*layers, head).double()
    weights: list[Any] = [net[3 * layer].weight for layer in range(trial.depth)]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(trial.factor)
    loss = cross_entropy(net(x[rows]), y[rows])
    norms = [float(g.norm()) for g in torch.autograd.grad(loss, weights)]
    return Run(trial, {"loss": float(loss.detach()), "gradient_norms": norms}, {})


def plan(settings: InvarianceSettings, _: Runs) -> list[InvarianceTrial]:
    """Every factor with every seed."""
    return [
        InvarianceTrial(
            stage="networks",
            seed=seed,
            factor=factor,
            depth=settings.depth,
            width=settings.width,
            batch=settings.batch,
        )
        for seed in range(settings.seeds)
        for factor in settings.factors
    ]


def _errors(settings: InvarianceSettings, runs: Runs) -> tuple[list[float], list[float]]:
    """For each seed the worst relative error: of the loss, and of gradient · factor."""
    losses, gradients = [], []
    for seed in range(settings.seeds):
        by_factor = {r.trial.factor: r.measured for r in runs if r.trial.seed == seed}
        one = by_factor[1.0]
        others = [(f, m) for f, m in by_factor.items() if f != 1.0]
        losses.append(max(abs(m["loss"] / one["loss"] - 1) for _, m in others))
        gradients.append(
            max(
                abs(factor * own / base - 1)
                for factor, measured in others
                for own, base in zip(measured["gradient_norms"], one["gradient_norms"], strict=True)
            )
        )
    return losses, gradients


def analyse(settings: InvarianceSettings, runs: Runs) -> Findings:
    """Judge both errors against the tolerance."""
    losses, gradients = _errors(settings, runs)
    verdicts = [
        judge(
            [TOLERANCE] * len(errors), errors, unit="relative error", names=("tolerance", "error")
        )
        for errors in (losses, gradients)
    ]
    rows = []
    for factor in settings.factors:
        measured = [r.measured for r in runs if r.trial.factor == factor]
        norm = statistics.fmean(m["gradient_norms"][0] for m in measured)
        rows.append(
            (
                f"{factor:g}",
                f"{statistics.fmean(m['loss'] for m in measured):.6f}",
                f"{norm:.4g}",
                f"{factor * norm:.6g}",
            )
        )
    most = max(settings.factors)
    return Findings(
        summary=(
            f"With all hidden weights {most:g} times as large, the loss changed by "
            f"{max(losses):.1g} of itself at most, and gradient × factor by {max(gradients):.1g}."
        ),
        verdict=verdicts[0],
        table=Table(("factor", "loss", "‖gradient‖, layer 1", "× factor"), tuple(rows)),
        recipe=(
            f"{settings.depth} hidden layers of {settings.width} sigmoid units with BatchNorm, a "
            f"batch of {settings.batch}, cross-entropy, float64. Nothing is trained.",
            "All hidden weight matrices are multiplied by a factor. What remains of a difference "
            "is ε's doing.",
            f"It counts as none below {TOLERANCE:g} of the value.",
        ),
        caveats=verdicts[0].caveats(),
        not_shown=(
            "What it means for training: weight decay on such weights changes the learning rate, "
            "not the function.",
        ),
        also=(
            Judged(
                "The gradient of weights that are a times as large is 1/a as large.", verdicts[1]
            ),
        ),
    )


def figures(settings: InvarianceSettings, runs: Runs) -> list[Picture]:
    """Draw the gradient's norm by layer for each factor."""
    from batchnorm.figures import LOOKS
    from batchnorm.lab import plots

    series = {
        f"weights × {factor:g}": [
            r.measured["gradient_norms"] for r in runs if r.trial.factor == factor
        ]
        for factor in settings.factors[: len(LOOKS)]
    }
    return [
        Picture(
            "gradients",
            "Gradient norm by layer, for weights of three sizes",
            "The lines are parallel: each is the one above divided by the ratio of the factors. "
            f"Marks: median of {counted(settings.seeds, 'seed')}; strokes: lowest to highest.",
            plots.by_layer(
                series,
                xlabel="layer",
                ylabel="norm of the loss's gradient\nby the weights",
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="invariance",
    claim="A network with batch normalization computes the same whatever the scale of the weights "
    "before it.",
    source="Ioffe & Szegedy 2015, section 3.3 (arXiv:1502.03167)",
    recipe=1,
    trial=InvarianceTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
