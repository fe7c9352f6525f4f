"""Ghost batches: parts of a large batch, normalized by themselves, regularise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchnorm import BatchNorm
from batchnorm.lab import networks, training, tuning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Findings, Judged, Picture, Run, Settings, Table
from batchnorm.lab.tuning import ArmTrial
from batchnorm.lab.verdict import Verdict, judge, judge_shares
from batchnorm.lab.words import bands, counted

WHOLE = "whole batch"


@dataclass(frozen=True, kw_only=True)
class GhostSettings(Settings):
    """The large batch, and the sizes of the groups that it is normalized in.

    640 is about half of the digits' training rows: two steps an epoch. The headline is the size of
    the groups that the claim is judged with, and of the small batches that it is compared with: 32
    samples are enough for an MLP to be normalized by (`small_batches`).
    """

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
    """One training run; `steps` and `batch` are those of the large batch."""

    steps: int
    batch: int
    width: int
    depth: int


Runs = Sequence[Run[GhostTrial]]

PROFILES = {
    # 80 steps are 40 epochs of the digits, and 50 runs what half a minute allows.
    "quick": GhostSettings(
        seeds=4,
        tuning_seeds=1,
        sizes=(160, 32, 8),
        rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        steps=80,
    ),
    "full": GhostSettings(
        seeds=8,
        tuning_seeds=2,
        sizes=(320, 160, 64, 32, 16, 8),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        steps=400,
    ),
}


def arm(size: int) -> str:
    """The name of an arm with the large batch.

    >>> arm(32)
    'groups of 32'
    """
    return f"groups of {size}"


def small(size: int) -> str:
    """The name of the arm that is trained with small batches.

    >>> small(32)
    'batches of 32'
    """
    return f"batches of {size}"


def run(trial: GhostTrial, data: Dataset) -> Run[GhostTrial]:
    """Train with momentum and a rate that ends at zero; the test and training error at the end.

    Both are in evaluation, with running statistics: the same network on other rows.
    Small batches get as many steps more as they have fewer rows: all arms see as many rows.
    """
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data))
    size = None if trial.arm == WHOLE else int(trial.arm.rpartition(" ")[2])
    steps, batch, group = trial.steps, trial.batch, size
    if size and trial.arm == small(size):
        steps, batch, group = trial.steps * trial.batch // size, size, None
    net = networks.mlp(
        [x.shape[1], *[trial.width] * trial.depth, data.classes],
        lambda channels: BatchNorm(channels, virtual_batch_size=group),
        training.generator(trial.seed),
    )
    training.fit(net, x, y, rate=trial.rate, steps=steps, batch=batch, seed=trial.seed)
    measured = {
        "error": 1 - training.accuracy(net, x_test, y_test),
        "training_error": 1 - training.accuracy(net, x, y),
    }
    return Run(trial, measured, {})


def plan(settings: GhostSettings, runs: Runs) -> list[GhostTrial]:
    """Tune every arm's learning rate by itself, for the least mean error."""
    sizes = {key: getattr(settings, key) for key in ("steps", "batch", "width", "depth")}
    return tuning.plan(
        GhostTrial(stage="", seed=0, arm="", rate=0.0, **sizes),
        runs,
        arms=[small(settings.headline), WHOLE, *map(arm, settings.sizes)],
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
    )


def _by_size(settings: GhostSettings, runs: Runs) -> dict[int, list[float]]:
    """The errors of the large batch's arms by the size of their groups, in rising order."""
    errors = {size: tuning.measured(runs, "error", arm=arm(size)) for size in settings.sizes}
    errors[settings.batch] = tuning.measured(runs, "error", arm=WHOLE)
    return dict(sorted(errors.items()))


def slopes(errors: dict[int, list[float]]) -> list[float]:
    """Return what each seed's error rises by with each doubling of the groups: least squares.

    >>> slopes({8: [0.25, 0.5], 16: [0.5, 0.5], 32: [0.75, 0.5]})
    [0.25, 0.0]
    """
    places = np.log2(list(errors))
    places -= places.mean()
    values = np.array(list(errors.values()))
    # From the first on, so that errors that are all equal have a slope of zero to the last bit: a
    # slope of rounding errors would be judged like any other.
    rises = places @ (values - values[0]) / (places @ places)
    return [float(rise) for rise in rises]


def analyse(settings: GhostSettings, runs: Runs) -> Findings:
    """Judge groups against the whole batch, small batches against it, and the trend."""
    group, few = arm(settings.headline), small(settings.headline)
    by_size = _by_size(settings, runs)

    def errors(name: str) -> list[float]:
        return tuning.measured(runs, "error", arm=name)

    def better(name: str) -> Verdict:
        return judge_shares(errors(WHOLE), errors(name), errors=True, names=(WHOLE, name))

    def mean(name: str) -> str:
        return f"{statistics.fmean(errors(name)):.1%}"

    rises = [100 * rise for rise in slopes(by_size)]
    trend = judge(
        rises, [0.0] * len(rises), unit="points fewer errors for each halving of the groups"
    )
    verdict = better(group)
    table = tuning.table(runs, "error", "test error")
    fitted = {
        row[0]: statistics.fmean(tuning.measured(runs, "training_error", arm=row[0]))
        for row in table.rows
    }
    low, high = (f"{end(fitted.values()):.1%}" for end in (min, max))
    left = f"{low}, in every arm" if low == high else f"{low} to {high}, by arm"
    return Findings(
        summary=(
            f"With batches of {settings.batch} normalized as a whole, {mean(WHOLE)} of the test "
            f"rows came out wrong; in groups of {settings.headline}, {mean(group)}. Trained with "
            f"batches of {settings.headline} for as many epochs, it was {mean(few)}. From groups "
            f"of {min(by_size)} to the whole batch, each doubling added "
            f"{statistics.fmean(rises):+.2f} points to the error. The training error at the end "
            f"was {left}."
        ),
        verdict=verdict,
        table=Table(
            (*table.columns, "training error"),
            tuple((*row, f"{fitted[row[0]]:.1%}") for row in table.rows),
        ),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units; SGD with "
            f"momentum 0.9 on batches of {settings.batch}, {settings.steps} steps, the rate "
            "falling to zero by a cosine.",
            "One arm normalizes each batch as a whole, others in groups of samples by themselves "
            "(virtual_batch_size); the running statistics take in all groups together, once a "
            "step. All start from a seed's same weights and see the same batches.",
            f"A further arm is trained with batches of {settings.headline}, normalized as a whole: "
            f"as many epochs, in {settings.steps * settings.batch // settings.headline} steps.",
            "Learning rates, tuned for each arm by itself for the least mean error: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each; the verdicts come from "
            f"{counted(settings.seeds, 'other seed')}. {tuning.HOW}",
        ),
        caveats=(*tuning.edges(runs, settings.rates), *verdict.caveats()),
        not_shown=(
            "Anything about large batches on large data: of a set as small as the digits, a batch "
            f"of {settings.batch} is a good part.",
            f"That small batches are better for their size: they also take "
            f"{settings.batch // settings.headline} times as many steps.",
            "Whether another regulariser, such as dropout or weight decay, does as much.",
            "That ghost batches save anything: the large batch is normalized in parts on one "
            "machine, and takes as long.",
            "That every smaller size is better than the next larger: the trend is one slope over "
            "all sizes, and the figure has each.",
        ),
        also=(
            Judged(
                "Large batches generalise worse than small ones, after as many epochs.",
                better(few),
            ),
            Judged("On average over the sizes, smaller groups generalise better.", trend),
        ),
    )


def figures(settings: GhostSettings, runs: Runs) -> list[Picture]:
    """Draw the error by group size."""
    from batchnorm.lab import plots

    by_size, few = _by_size(settings, runs), small(settings.headline)
    sizes = list(by_size)
    # They are normalized as a whole: their line is level by construction, to be compared with.
    level = [[error] * len(sizes) for error in tuning.measured(runs, "error", arm=few)]
    return [
        Picture(
            "error",
            "Test error by the size of the groups",
            f"The rightmost mark of the batches of {settings.batch} is the whole batch. See "
            f"whether their line falls to the left, and whether it gets to that of the {few}, "
            "which are small for the optimizer, too, and have no groups: a level line. "
            f"{bands(settings.seeds)} Every arm has its own learning rate.",
            plots.curves(
                {
                    few: (sizes, level),
                    f"batches of {settings.batch}, in groups": (
                        sizes,
                        list(zip(*by_size.values(), strict=True)),
                    ),
                },
                xlabel="samples normalized together (log scale)",
                ylabel="test error",
                marks=True,
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="ghost",
    claim="In training with large batches, normalizing small parts of them by themselves "
    "generalises better.",
    source="Hoffer et al. 2017, “Train longer, generalize better” (arXiv:1705.08741)",
    recipe=3,
    trial=GhostTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
