"""Normalized residual branches begin small: at block l they are 1/(l + 1) of the sum's variance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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

PLAIN, NORMALIZED = ARMS = ("plain", "BatchNorm")

#: How far from the theory the last block's ratio may be and count as the same: a network of finite
#: width and one batch is a few percent off.
TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class ResidualSettings(Settings):
    """The depths, in blocks."""

    depths: tuple[int, ...] = (32, 128)
    width: int = 256
    batch: int = 256


@dataclass(frozen=True, kw_only=True)
class ResidualTrial(Trial):
    """One network at initialization."""

    arm: str
    depth: int
    width: int
    batch: int


Runs = Sequence[Run[ResidualTrial]]

PROFILES = {
    "quick": ResidualSettings(seeds=8),
    "full": ResidualSettings(seeds=8, depths=(8, 32, 128, 512), width=512),
}


def predicted(arm: str, block: int) -> float:
    """Var(branch) / Var(sum) at a block, counted from 1.

    A normalized branch adds the variance 1 to what has become `block`; a plain one adds as much as
    there is.

    >>> predicted("BatchNorm", 3), predicted("plain", 3)
    (0.25, 0.5)
    """
    return 1 / (block + 1) if arm == NORMALIZED else 0.5


def run(trial: ResidualTrial, data: Dataset) -> Run[ResidualTrial]:
    """One forward pass through blocks x + W·relu(BN(x)), or x + W·relu(x)."""
    generator = torch.Generator().manual_seed(trial.seed)
    images = torch.tensor(data.x_train).flatten(1).double()  # a plain one doubles at each block
    rows = images[torch.randperm(len(images), generator=generator)[: trial.batch]]

    def linear(fan_in: int, gain: float) -> nn.Linear:
        layer: nn.Linear = nn.utils.skip_init(
            nn.Linear, fan_in, trial.width, bias=False, dtype=torch.float64
        )
        nn.init.normal_(layer.weight, std=math.sqrt(gain / fan_in), generator=generator)
        return layer

    with torch.no_grad():
        h: Tensor = linear(rows.shape[1], 1.0)(rows)
        h = BatchNorm(trial.width, dtype=torch.float64)(h)  # both arms begin with variance 1
        ratios = []
        for _ in range(trial.depth):
            inner = BatchNorm(trial.width, dtype=torch.float64)(h) if trial.arm == NORMALIZED else h
            branch = linear(trial.width, 2.0)(inner.relu())
            h = h + branch
            ratios.append(float(branch.var(0).mean() / h.var(0).mean()))
    return Run(trial, {"ratios": ratios}, {})


def plan(settings: ResidualSettings, _: Runs) -> list[ResidualTrial]:
    """Both arms at every depth, with every seed."""
    return [
        ResidualTrial(
            stage="networks",
            seed=seed,
            arm=arm,
            depth=depth,
            width=settings.width,
            batch=settings.batch,
        )
        for seed in range(settings.seeds)
        for depth in settings.depths
        for arm in ARMS
    ]


def last(runs: Runs, arm: str, depth: int) -> list[float]:
    """The last block's ratio, a value a seed."""
    found = [r for r in runs if (r.trial.arm, r.trial.depth) == (arm, depth)]
    return [r.measured["ratios"][-1] for r in found]


def analyse(settings: ResidualSettings, runs: Runs) -> Findings:
    """Judge the last block's ratio against the theory's, and the two arms against each other."""
    rows = []
    deepest = max(settings.depths)
    for depth in settings.depths:
        for arm in ARMS:
            values = last(runs, arm, depth)
            rows.append(
                (
                    arm,
                    str(depth),
                    f"{predicted(arm, depth):.4f}",
                    f"{statistics.fmean(values):.4f} ({min(values):.4f}–{max(values):.4f})",
                )
            )
    theory = predicted(NORMALIZED, deepest)
    errors = [abs(value / theory - 1) for value in last(runs, NORMALIZED, deepest)]
    verdict = judge(
        [TOLERANCE] * len(errors), errors, unit="relative error", names=("tolerance", "error")
    )
    smaller = judge(
        last(runs, PLAIN, deepest),
        last(runs, NORMALIZED, deepest),
        unit="of the variance",
        names=ARMS,
    )
    ours = statistics.fmean(last(runs, NORMALIZED, deepest))
    theirs = statistics.fmean(last(runs, PLAIN, deepest))
    return Findings(
        summary=(
            f"In the last of {deepest} blocks, a normalized branch had {ours:.4f} of the sum's "
            f"variance, where the theory says {theory:.4f}; a plain branch had {theirs:.2f}."
        ),
        verdict=verdict,
        table=Table(("network", "blocks", "theory", "measured (range)"), tuple(rows)),
        recipe=(
            f"Blocks x + W·relu(BN(x)) of {settings.width} units, or without BN; weights are "
            "normal draws with the variance 2/fan-in. Nothing is trained.",
            f"One batch of {settings.batch} goes through. The ratio is the mean over channels of "
            "the branch's variance by that of the sum's.",
            f"It counts as the predicted one within {TOLERANCE:.0%}.",
        ),
        caveats=verdict.caveats(),
        not_shown=(
            "That small branches are why deep residual networks train: here nothing is trained. "
            "The paper argues so, and trains without normalization by starting branches small.",
            "What happens with two layers in a branch, or with convolutions.",
        ),
        also=(Judged("Without normalization the branch has much more of the variance.", smaller),),
    )


def figures(settings: ResidualSettings, runs: Runs) -> list[Picture]:
    """Draw the ratio by block in the deepest network."""
    from batchnorm.lab import plots

    deepest = max(settings.depths)
    series = {
        arm: [r.measured["ratios"] for r in runs if (r.trial.arm, r.trial.depth) == (arm, deepest)]
        for arm in ARMS
    }
    return [
        Picture(
            "branches",
            "How much of the variance a branch adds",
            f"See how far the branches fall below the plain network's one half. Marks: median of "
            f"{counted(settings.seeds, 'seed')}; strokes: lowest to highest seed; dotted: the "
            "theory.",
            plots.by_layer(
                series,
                xlabel="block",
                ylabel="variance of the branch /\nvariance of the sum",
                lines={
                    arm: [predicted(arm, block) for block in range(1, deepest + 1)] for arm in ARMS
                },
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="residual",
    claim="At initialization, batch normalization shrinks the residual branch of block l to "
    "1/(l + 1) of the variance.",
    source="De & Smith 2020, “Batch normalization biases residual blocks towards the identity "
    "function in deep networks” (arXiv:2002.10444)",
    recipe=1,
    trial=ResidualTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
