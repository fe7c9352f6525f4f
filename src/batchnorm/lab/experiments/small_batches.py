"""Small batches: the normalization's batch shrinks, the optimizer's stays."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm import BatchNorm
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
from batchnorm.lab.tuning import EVALUATION, ArmTrial, select
from batchnorm.lab.verdict import Verdict, judge
from batchnorm.lab.words import counted

MLP, CNN = "MLP", "CNN"
GROUPS = "GroupNorm"

#: Channels in a group of GroupNorm: Wu & He's 16.
GROUP_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class SmallBatchSettings(Settings):
    """Sizes of the normalization's batch, the largest of them the optimizer's own."""

    tuning_seeds: int
    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    headline: int = 4
    batch: int = 32
    width: int = 128
    depth: int = 3


@dataclass(frozen=True, kw_only=True)
class SmallBatchTrial(ArmTrial):
    """One training run; the arm is the network, and how it is normalized."""

    steps: int
    batch: int
    width: int
    depth: int


Runs = Sequence[Run[SmallBatchTrial]]

PROFILES = {
    "quick": SmallBatchSettings(
        seeds=4, tuning_seeds=1, sizes=(32, 4, 2), rates=(0.03, 0.1), steps=250
    ),
    "full": SmallBatchSettings(
        seeds=8,
        tuning_seeds=2,
        sizes=(32, 16, 8, 4, 2),
        rates=(0.01, 0.03, 0.1, 0.3),
        steps=1200,
    ),
}


def arm(network: str, size: int | None) -> str:
    """The name of an arm: BatchNorm over so many samples, or GroupNorm.

    >>> arm("CNN", 4), arm("MLP", None)
    ('CNN, BatchNorm over 4', 'MLP, GroupNorm')
    """
    return f"{network}, {GROUPS if size is None else f'BatchNorm over {size}'}"


def _arms(settings: SmallBatchSettings) -> dict[str, tuple[str, int | None]]:
    return {
        arm(network, size): (network, size)
        for network in (MLP, CNN)
        for size in (*settings.sizes, None)
    }


def _norm(name: str, batch: int) -> networks.Norm:
    if name.endswith(GROUPS):
        return lambda channels: nn.GroupNorm(max(1, channels // GROUP_SIZE), channels)
    size = int(name.rpartition(" ")[2])
    return lambda channels: BatchNorm(channels, virtual_batch_size=None if size == batch else size)


def run(trial: SmallBatchTrial, data: Dataset) -> Run[SmallBatchTrial]:
    """Train with momentum and a rate that ends at zero; the test error at the end."""
    network = trial.arm.partition(",")[0]
    x, y, x_test, y_test = training.tensors(data, images=network == CNN)
    norm, weights = _norm(trial.arm, trial.batch), training.generator(trial.seed)
    net: nn.Module
    if network == MLP:
        net = networks.mlp([x.shape[1], *[trial.width] * trial.depth, data.classes], norm, weights)
    else:
        net = networks.resnet(x.shape[1], data.classes, norm, weights)
    training.fit(net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed)
    return Run(trial, {"error": 1 - training.accuracy(net, x_test, y_test)}, {})


def plan(settings: SmallBatchSettings, runs: Runs) -> list[SmallBatchTrial]:
    """Tune every arm's learning rate by itself."""
    sizes = {key: getattr(settings, key) for key in ("steps", "batch", "width", "depth")}
    return tuning.plan(
        SmallBatchTrial(stage="", seed=0, arm="", rate=0.0, **sizes),
        runs,
        arms=list(_arms(settings)),
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
        score=lambda swept: statistics.fmean(r.measured["error"] for r in swept),
    )


def _errors(runs: Runs, name: str) -> list[float]:
    return [r.measured["error"] for r in select(runs, stage=EVALUATION, arm=name)]


def analyse(settings: SmallBatchSettings, runs: Runs) -> Findings:
    """Judge the small batch against the large one, and against GroupNorm, in both networks."""
    small, large = settings.headline, settings.batch

    def hurt(network: str, other: int | None) -> Verdict:
        return judge(
            _errors(runs, arm(network, small)),
            _errors(runs, arm(network, other)),
            unit="of the test rows wrong",
            names=(arm(network, small), arm(network, other)),
        )

    rows = []
    for name in _arms(settings):
        errors = _errors(runs, name)
        rate = select(runs, stage=EVALUATION, arm=name)[0].trial.rate
        rows.append(
            (
                name,
                f"{rate:g}",
                f"{statistics.fmean(errors):.1%} ({min(errors):.1%}–{max(errors):.1%})",
            )
        )
    mean = {name: statistics.fmean(_errors(runs, name)) for name in _arms(settings)}
    verdict = hurt(MLP, large)
    caveats = [
        caveat
        for name in _arms(settings)
        if (
            caveat := tuning.edge(select(runs, stage=EVALUATION, arm=name)[0].trial, settings.rates)
        )
    ]
    return Findings(
        summary=(
            f"Normalized over {small} samples instead of {large}, the MLP got "
            f"{mean[arm(MLP, small)]:.1%} of the test rows wrong instead of "
            f"{mean[arm(MLP, large)]:.1%}, the CNN {mean[arm(CNN, small)]:.1%} instead of "
            f"{mean[arm(CNN, large)]:.1%}. GroupNorm, which does not care: "
            f"{mean[arm(MLP, None)]:.1%} and {mean[arm(CNN, None)]:.1%}."
        ),
        verdict=verdict,
        table=Table(("network", "rate", "test error (range)"), tuple(rows)),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units, and a small "
            "residual CNN of three blocks. SGD with momentum 0.9 on batches of "
            f"{settings.batch}, {settings.steps} steps, the rate falling to zero by a cosine.",
            f"The optimizer's batch is always {settings.batch}; within it, BatchNorm normalizes "
            "groups of samples by themselves (virtual_batch_size). So the noise of the gradient "
            "is the same, and only the normalization's batch shrinks.",
            f"Learning rates, tuned for each arm by itself: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each.",
        ),
        caveats=(*caveats, *verdict.caveats()),
        not_shown=(
            "The sizes of the source's loss, which were measured on ImageNet.",
            "Batches so small that the optimizer's own noise matters: here it is kept the same.",
        ),
        also=(
            Judged(
                f"They hurt the CNN, too, where each channel pools over positions as well "
                f"({small} against {large}).",
                hurt(CNN, large),
            ),
            Judged(f"GroupNorm is better than BatchNorm over {small} in the MLP.", hurt(MLP, None)),
            Judged(f"GroupNorm is better than BatchNorm over {small} in the CNN.", hurt(CNN, None)),
        ),
    )


def figures(settings: SmallBatchSettings, runs: Runs) -> list[Picture]:
    """Draw the error by batch size, both networks."""
    from batchnorm.lab import plots

    sizes = sorted(settings.sizes)
    series: dict[str, Any] = {
        network: (
            sizes,
            [
                list(of_seed)
                for of_seed in zip(*(_errors(runs, arm(network, s)) for s in sizes), strict=True)
            ],
        )
        for network in (MLP, CNN)
    }
    groups = statistics.fmean(_errors(runs, arm(MLP, None)))
    return [
        Picture(
            "error",
            "Test error by the size of the normalization's batch",
            "Left is smaller. See whether a line rises to the left. Dotted: the MLP with "
            f"GroupNorm. Lines: median of {counted(settings.seeds, 'seed')}; bands: lowest to "
            "highest seed; every arm at its own learning rate.",
            plots.curves(
                series,
                xlabel="samples normalized together (log scale)",
                ylabel="test error",
                level=groups,
                level_label="GroupNorm",
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="small-batches",
    claim="Batch normalization gets worse when its batches are small.",
    source="Wu & He 2018, “Group normalization” (arXiv:1803.08494)",
    recipe=1,
    trial=SmallBatchTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
