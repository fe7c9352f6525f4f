"""Gradients explode with depth in normalized networks before training, at a predicted rate."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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

RELU, LINEAR = "ReLU", "linear"

#: How far from the theory a rate may be and count as the same.
TOLERANCE = 0.02

#: Layers at the input's end that still depend on the data, and at the loss's end on the cotangent.
#: In between the rate is constant to the eye (see the figure).
FIRST, LAST = 8, 4


@dataclass(frozen=True, kw_only=True)
class ExplosionSettings(Settings):
    """The networks: activation and batch size of each."""

    networks: tuple[tuple[str, int], ...]
    depth: int = 30
    width: int = 512


@dataclass(frozen=True, kw_only=True)
class ExplosionTrial(Trial):
    """One network at initialization."""

    activation: str
    batch: int
    depth: int
    width: int


Runs = Sequence[Run[ExplosionTrial]]

PROFILES = {
    "quick": ExplosionSettings(seeds=8, networks=((RELU, 128), (LINEAR, 8), (LINEAR, 32))),
    "full": ExplosionSettings(
        seeds=8,
        networks=((RELU, 128), (RELU, 512), (LINEAR, 8), (LINEAR, 16), (LINEAR, 32), (LINEAR, 128)),
    ),
}


def predicted(activation: str, batch: int) -> float:
    """Growth of the squared gradient norm a layer: π/(π − 1), or (B − 2)/(B − 3) without ReLU.

    >>> round(predicted("ReLU", 128), 3), predicted("linear", 8)
    (1.467, 1.2)
    """
    return math.pi / (math.pi - 1) if activation == RELU else (batch - 2) / (batch - 3)


def run(trial: ExplosionTrial, data: Dataset) -> Run[ExplosionTrial]:
    """One backward pass from a random cotangent; squared norms of the gradient at each layer."""
    generator = torch.Generator().manual_seed(trial.seed)
    x = torch.tensor(data.x_train).flatten(1)
    h: Tensor = x[torch.randperm(len(x), generator=generator)[: trial.batch]]
    sizes = [h.shape[1], *[trial.width] * trial.depth]
    inputs: list[Tensor] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt(1 / fan_in), generator=generator)
        h = BatchNorm(fan_out, activation="relu" if trial.activation == RELU else None)(linear(h))
        h.retain_grad()
        inputs.append(h)
    h.backward(torch.randn(h.shape, generator=generator))
    norms = [float(i.grad.square().sum()) for i in inputs if i.grad is not None]
    return Run(trial, {"squared_norms": norms}, {})


def rate(run: Run[ExplosionTrial]) -> float:
    """Growth a layer, toward the input: of the straight line through the logarithms."""
    logs = np.log(run.measured["squared_norms"])[FIRST:-LAST]
    return float(np.exp(-np.polyfit(np.arange(len(logs)), logs, 1)[0]))


def plan(settings: ExplosionSettings, _: Runs) -> list[ExplosionTrial]:
    """Every network with every seed."""
    return [
        ExplosionTrial(
            stage="networks",
            seed=seed,
            activation=activation,
            batch=batch,
            depth=settings.depth,
            width=settings.width,
        )
        for seed in range(settings.seeds)
        for activation, batch in settings.networks
    ]


def _of(runs: Runs, activation: str, batch: int) -> list[Run[ExplosionTrial]]:
    return [r for r in runs if (r.trial.activation, r.trial.batch) == (activation, batch)]


def analyse(settings: ExplosionSettings, runs: Runs) -> Findings:
    """Judge the distance of each network's rate from the theory's against the tolerance."""
    rows, verdicts = [], []
    for activation, batch in settings.networks:
        rates = [rate(r) for r in _of(runs, activation, batch)]
        theory = predicted(activation, batch)
        # The rate is of what grows: by how much a layer adds to 1 would be too strict at B = 128.
        errors = [abs(value / theory - 1) for value in rates]
        verdicts.append(
            judge(
                [TOLERANCE] * len(errors),
                errors,
                unit="relative error",
                names=("tolerance", "error"),
            )
        )
        rows.append(
            (
                activation,
                str(batch),
                f"{theory:.3f}",
                f"{statistics.fmean(rates):.3f} ({min(rates):.3f}–{max(rates):.3f})",
                f"{statistics.fmean(errors):.1%}",
            )
        )
    first = [rate(r) for r in _of(runs, *settings.networks[0])]
    whole = statistics.fmean(first) ** settings.depth
    others = [
        Judged(
            f"Without an activation the growth is (B − 2)/(B − 3): with batches of {batch}, "
            f"{predicted(activation, batch):.3f}."
            if activation == LINEAR
            else f"The growth with ReLU is π/(π − 1) with batches of {batch}, too.",
            verdict,
        )
        for (activation, batch), verdict in zip(settings.networks[1:], verdicts[1:], strict=True)
    ]
    return Findings(
        summary=(
            f"In a ReLU network with batch normalization the squared gradient grew by a factor of "
            f"{statistics.fmean(first):.3f} a layer on its way back; the theory says "
            f"{predicted(*settings.networks[0]):.3f}. Through {settings.depth} layers that is a "
            f"factor of {whole:,.0f}."
        ),
        verdict=verdicts[0],
        table=Table(
            ("activation", "batch", "theory", "measured (range)", "mean error"), tuple(rows)
        ),
        recipe=(
            f"{settings.depth} fully connected layers of {settings.width} units, each followed by "
            "BatchNorm and, or not, ReLU. Weights are normal draws; nothing is trained.",
            "A random cotangent at the output is taken back through the network once. The rate is "
            f"the slope of log ‖gradient‖² over the layers, without the first {FIRST} and the last "
            f"{LAST}, where data and cotangent still show.",
            f"It counts as the predicted one within {TOLERANCE:.0%}; a seed goes the claim's way "
            "if it is closer than that.",
        ),
        caveats=verdicts[0].caveats(),
        not_shown=(
            "What happens in training: the gradient of a network that has learned is another one, "
            "and residual connections change it, too.",
            "That the explosion does harm. Normalized layers do not care for the scale of their "
            "weights, so a large gradient is in part a large step of no consequence.",
        ),
        also=tuple(others),
    )


def figures(settings: ExplosionSettings, runs: Runs) -> list[Picture]:
    """Draw the squared norm by layer, and the theory's slope beside it."""
    from batchnorm.figures import LOOKS
    from batchnorm.lab import plots

    chosen = settings.networks[: len(LOOKS)]
    series: dict[str, Any] = {}
    for activation, batch in chosen:
        name = f"{activation}, batches of {batch}"
        rows = [r.measured["squared_norms"] for r in _of(runs, activation, batch)]
        series[name] = [[value / row[-1] for value in row] for row in rows]
    return [
        Picture(
            "gradient",
            "Squared gradient by layer, before any training",
            "Layer 1 is next to the data; each line is relative to its last layer. A straight line "
            f"is growth by the same factor at every layer. Marks: median of "
            f"{counted(settings.seeds, 'seed')}; strokes: lowest to highest seed; dotted: the "
            "slope that the theory predicts.",
            plots.by_layer(
                series,
                xlabel="layer",
                ylabel="squared norm of the gradient,\nrelative to the last layer's",
                lines={
                    f"{activation}, batches of {batch}": [
                        predicted(activation, batch) ** (settings.depth - layer)
                        for layer in range(1, settings.depth + 1)
                    ]
                    for activation, batch in chosen
                },
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="explosion",
    claim="Before training, gradients in a batch-normalized ReLU network grow by π/(π − 1) = 1.467 "
    "a layer.",
    source="Yang et al. 2019, “A mean field theory of batch normalization” (arXiv:1902.08129)",
    recipe=1,
    trial=ExplosionTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
