"""Ghost batches: statistics of a part of a large batch regularise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm import BatchNorm
from batchnorm.lab import networks, training, tuning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Findings, Judged, Picture, Run, Settings
from batchnorm.lab.tuning import ArmTrial
from batchnorm.lab.verdict import Verdict, judge
from batchnorm.lab.words import counted

WHOLE = "whole batch"


@dataclass(frozen=True, kw_only=True)
class GhostSettings(Settings):
    """The large batch, and the groups that it is normalized in."""

    tuning_seeds: int
    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    headline: int = 32
    batch: int = 640
    width: int = 128
    depth: int = 3


@dataclass(frozen=True, kw_only=True)
class GhostTrial(ArmTrial):
    """One training run."""

    steps: int
    batch: int
    width: int
    depth: int


Runs = Sequence[Run[GhostTrial]]

PROFILES = {
    "quick": GhostSettings(seeds=4, tuning_seeds=1, sizes=(160, 32), rates=(0.1, 0.3), steps=120),
    "full": GhostSettings(
        seeds=8,
        tuning_seeds=2,
        sizes=(320, 160, 64, 32, 16, 8),
        rates=(0.03, 0.1, 0.3, 1.0),
        steps=600,
    ),
}


def arm(size: int) -> str:
    """The name of an arm.

    >>> arm(32)
    'groups of 32'
    """
    return f"groups of {size}"


def run(trial: GhostTrial, data: Dataset) -> Run[GhostTrial]:
    """Train with momentum and a rate that ends at zero; the test error at the end."""
    x, y, x_test, y_test = training.tensors(data)
    size = None if trial.arm == WHOLE else int(trial.arm.rpartition(" ")[2])
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        lambda channels: BatchNorm(channels, virtual_batch_size=size),
        training.generator(trial.seed),
    )
    training.fit(net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed)
    return Run(trial, {"error": 1 - training.accuracy(net, x_test, y_test)}, {})


def plan(settings: GhostSettings, runs: Runs) -> list[GhostTrial]:
    """Tune every arm's learning rate by itself."""
    sizes = {key: getattr(settings, key) for key in ("steps", "batch", "width", "depth")}
    return tuning.plan(
        GhostTrial(stage="", seed=0, arm="", rate=0.0, **sizes),
        runs,
        arms=[WHOLE, *map(arm, settings.sizes)],
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
        score=lambda swept: statistics.fmean(r.measured["error"] for r in swept),
    )


def analyse(settings: GhostSettings, runs: Runs) -> Findings:
    """Judge the headline's groups, and the smallest, against the whole batch."""

    def errors(name: str) -> list[float]:
        return tuning.measured(runs, "error", arm=name)

    def better(size: int) -> Verdict:
        return judge(
            errors(WHOLE),
            errors(arm(size)),
            unit="of the test rows wrong",
            names=(WHOLE, arm(size)),
        )

    verdict = better(settings.headline)
    others = [size for size in settings.sizes if size != settings.headline]
    return Findings(
        summary=(
            f"With batches of {settings.batch} normalized as a whole, "
            f"{statistics.fmean(errors(WHOLE)):.1%} of the test rows came out wrong; in groups "
            f"of {settings.headline}, {statistics.fmean(errors(arm(settings.headline))):.1%}."
        ),
        verdict=verdict,
        table=tuning.table(runs, "error", "test error"),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units; SGD with "
            f"momentum 0.9 on batches of {settings.batch}, {settings.steps} steps, the rate "
            "falling to zero by a cosine. Each arm normalizes groups of samples by themselves.",
            f"Learning rates, tuned for each arm by itself: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}.",
        ),
        caveats=(*tuning.edges(runs, settings.rates), *verdict.caveats()),
        not_shown=(
            "That ghost batches close the gap of large-batch training, the source's claim: a small "
            "batch of the optimizer is not among the arms.",
            "Whether another regulariser does as much.",
        ),
        also=tuple(
            Judged(f"Groups of {size} generalise better than the whole batch.", better(size))
            for size in others
        ),
    )


def figures(settings: GhostSettings, runs: Runs) -> list[Picture]:
    """Draw the error by group size."""
    from batchnorm.lab import plots

    sizes = sorted([*settings.sizes, settings.batch])
    columns = [
        tuning.measured(runs, "error", arm=WHOLE if size == settings.batch else arm(size))
        for size in sizes
    ]
    return [
        Picture(
            "error",
            "Test error by the size of the groups",
            "The rightmost is the whole batch. See whether the line falls to the left. Line: "
            f"median of {counted(settings.seeds, 'seed')}; band: lowest to highest seed.",
            plots.curves(
                {"BatchNorm": (sizes, [list(row) for row in zip(*columns, strict=True)])},
                xlabel="samples normalized together (log scale)",
                ylabel="test error",
                level=statistics.median(columns[-1]),
                level_label="whole batch",
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="ghost",
    claim="Normalizing parts of a large batch by themselves generalises better.",
    source="Hoffer et al. 2017, “Train longer, generalize better” (arXiv:1705.08741)",
    recipe=1,
    trial=GhostTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
