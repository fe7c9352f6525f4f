"""Batch renormalization, where the normalization's batches are small or sorted by class."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import BatchNorm, Renorm
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
from batchnorm.lab.tuning import ArmTrial
from batchnorm.lab.verdict import Verdict, judge_shares
from batchnorm.lab.words import counted

PLAIN, RENORM = "BatchNorm", "renorm"
SORTED = ", sorted"

#: The paper's limits, and the parts of a training at which they begin to open and are open: those
#: that the layer's documentation recommends for trainings shorter than the paper's.
R_MAX, D_MAX = 3.0, 5.0
R_OPEN, D_OPEN = (0.1, 0.75), (0.1, 0.5)


@dataclass(frozen=True, kw_only=True)
class RenormSettings(Settings):
    """Sizes of the normalization's batch, drawn at random and sorted; the first is the headline's.

    The depth was chosen on other seeds so that a batch of 4 does harm which could be repaired.
    """

    tuning_seeds: int
    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    batch: int = 32
    width: int = 128
    depth: int = 6


@dataclass(frozen=True, kw_only=True)
class RenormTrial(ArmTrial):
    """One training run; the arm says how it is normalized, over how many samples of which order."""

    steps: int
    batch: int
    width: int
    depth: int


Runs = Sequence[Run[RenormTrial]]

PROFILES = {
    "quick": RenormSettings(
        seeds=4, tuning_seeds=1, sizes=(4,), rates=(0.003, 0.01, 0.03, 0.1, 0.3), steps=200
    ),
    "full": RenormSettings(
        seeds=8,
        tuning_seeds=2,
        sizes=(4, 8, 2),
        rates=(0.003, 0.01, 0.03, 0.1, 0.3),
        steps=700,
    ),
}


def arm(kind: str, size: int, *, in_order: bool = False) -> str:
    """The name of an arm.

    >>> arm(PLAIN, 32), arm(RENORM, 4, in_order=True)
    ('BatchNorm over 32', 'renorm over 4, sorted')
    """
    return f"{kind} over {size}{SORTED if in_order else ''}"


def pair(size: int, *, in_order: bool) -> tuple[str, str]:
    """The names of the arms without and with renormalization."""
    return arm(PLAIN, size, in_order=in_order), arm(RENORM, size, in_order=in_order)


def _arms(settings: RenormSettings) -> list[str]:
    orders = (False, True)
    small = [pair(size, in_order=in_order) for in_order in orders for size in settings.sizes]
    return [arm(PLAIN, settings.batch), *(name for names in small for name in names)]


def _parts(name: str) -> tuple[str, int, bool]:
    """Kind, size and order, of which `arm` made the name."""
    kind, _, size = name.removesuffix(SORTED).partition(" over ")
    return kind, int(size), name.endswith(SORTED)


def limits(steps: int) -> Renorm:
    """The paper's limits, opening in so many steps.

    >>> limits(1000)
    Renorm(r_max=3.0, d_max=5.0, r_steps=(100, 750), d_steps=(100, 500))
    """
    r_steps, d_steps = (
        (round(first * steps), round(last * steps)) for first, last in (R_OPEN, D_OPEN)
    )
    return Renorm(R_MAX, D_MAX, r_steps=r_steps, d_steps=d_steps)


def _norm(trial: RenormTrial) -> networks.Norm:
    kind, size, _ = _parts(trial.arm)
    groups = None if size == trial.batch else size
    renorm = limits(trial.steps) if kind == RENORM else None
    return lambda channels: BatchNorm(channels, virtual_batch_size=groups, renorm=renorm)


def by_class(y: Tensor, rows: Tensor) -> Tensor:
    """Put row numbers in the order of their classes.

    >>> by_class(torch.tensor([2, 0, 1, 0]), torch.tensor([3, 0, 2, 1])).tolist()
    [3, 1, 2, 0]
    """
    return rows[y[rows].argsort(stable=True)]


def run(trial: RenormTrial, data: Dataset) -> Run[RenormTrial]:
    """Train with momentum and a rate that ends at zero; the test error at the end, twice.

    `error` is that of evaluation, by the running statistics; `as_trained` that of the same rows
    when they are normalized as in training, in groups of that size and order. Renormalized, the two
    are one as long as r and d stay within their limits; only clipping can tell them apart.
    """
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data))
    sizes = [x.shape[1], *[trial.width] * trial.depth, data.classes]
    net = networks.mlp(sizes, _norm(trial), training.generator(trial.seed))
    _, _, in_order = _parts(trial.arm)
    training.fit(
        net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed,
        arrange=(lambda rows: by_class(y, rows)) if in_order else None,
    )  # fmt: skip
    measured = {
        "error": 1 - training.accuracy(net, x_test, y_test),
        "as_trained": _as_trained(net, x_test, y_test, trial),
    }
    return Run(trial, measured, {})


def _as_trained(net: nn.Module, x: Tensor, y: Tensor, trial: RenormTrial) -> float:
    """Share of rows that the network gets wrong in training's way; it stays as it is."""
    net = copy.deepcopy(net).train()
    for layer in net.modules():
        if isinstance(layer, BatchNorm):
            layer.momentum = 0.0  # the running statistics are those that training ended with
    _, size, in_order = _parts(trial.arm)
    # Whole groups only: a rest of one row could not be normalized.
    whole = len(x) - len(x) % size or len(x)
    order = torch.randperm(len(x), generator=training.generator(trial.seed))[:whole]
    wrong = 0
    with torch.no_grad():
        for drawn in order.split(trial.batch):
            rows = by_class(y, drawn) if in_order else drawn
            wrong += int((net(x[rows]).argmax(1) != y[rows]).sum())
    return wrong / whole


def plan(settings: RenormSettings, runs: Runs) -> list[RenormTrial]:
    """Tune every arm's learning rate by itself."""
    sizes = {key: getattr(settings, key) for key in ("steps", "batch", "width", "depth")}
    return tuning.plan(
        RenormTrial(stage="", seed=0, arm="", rate=0.0, **sizes),
        runs,
        arms=_arms(settings),
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
    )


# What the runs say


def _errors(runs: Runs, name: str) -> list[float]:
    return tuning.measured(runs, "error", arm=name)


def repaired(plain: float, ours: float, large: float) -> str:
    """Say how much of the harm that the small batch does is gone, of its mean errors.

    >>> [repaired(0.1, ours, 0.02) for ours in (0.04, 0.2)], repaired(0.02, 0.01, 0.02)
    (['75% of the harm', 'none of the harm'], 'no harm, as there was none')
    """
    harm, gone = plain - large, plain - ours
    if harm <= 0:
        return "no harm, as there was none"
    return f"{gone / harm:.0%} of the harm" if gone > 0 else "none of the harm"


def analyse(settings: RenormSettings, runs: Runs) -> Findings:
    """Judge renormalization against normalization over as few samples."""
    small, *others = settings.sizes
    large = arm(PLAIN, settings.batch)
    means = {name: statistics.fmean(_errors(runs, name)) for name in _arms(settings)}
    (plain, ours), (plain_sorted, ours_sorted) = (
        [means[name] for name in pair(small, in_order=in_order)] for in_order in (False, True)
    )

    def better(size: int, *, in_order: bool) -> Verdict:
        names = pair(size, in_order=in_order)
        return judge_shares(*(_errors(runs, name) for name in names), errors=True, names=names)

    best = tuning.table(runs, "error", "test error")
    seen = [statistics.fmean(tuning.measured(runs, "as_trained", arm=r[0])) for r in best.rows]
    verdict = better(small, in_order=False)
    also = {
        "Renormalization helps where small batches are sorted by class, too.": better(
            small, in_order=True
        ),
        **{
            f"Renormalization helps over {size} samples{SORTED * in_order}, too.": better(
                size, in_order=in_order
            )
            for size in others
            for in_order in (False, True)
        },
    }
    return Findings(
        summary=(
            f"With {small} samples normalized together instead of {settings.batch}, {plain:.1%} of "
            f"the test rows came out wrong instead of {means[large]:.1%}; with renormalization, "
            f"{ours:.1%}: it repaired {repaired(plain, ours, means[large])}. With the {small} from "
            f"samples sorted by class: {plain_sorted:.1%}, and {ours_sorted:.1%} with "
            f"renormalization, which repaired {repaired(plain_sorted, ours_sorted, means[large])}."
        ),
        verdict=verdict,
        table=Table(
            (*best.columns, "normalized as in training"),
            tuple((*row, f"{error:.1%}") for row, error in zip(best.rows, seen, strict=True)),
        ),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units; SGD with "
            f"momentum 0.9 on batches of {settings.batch}, {settings.steps} steps, the rate "
            "falling to zero by a cosine.",
            f"The optimizer's batch is always {settings.batch}, and all arms of a seed see the "
            "same ones; within it, groups of samples are normalized by themselves "
            "(virtual_batch_size). Sorted: the samples of each batch are put in the order of their "
            "classes first, so that most groups are of one class or two.",
            f"Renormalization has the paper's limits, {R_MAX:g} for r and {D_MAX:g} for d. They "
            f"open from {R_OPEN[0]:.0%} of the steps on, to {D_OPEN[1]:.0%} (d) and "
            f"{R_OPEN[1]:.0%} (r) of them; until then it is plain normalization.",
            f"Learning rates, tuned for each arm by itself: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each. {tuning.HOW}",
            "The test error is that of evaluation, by running statistics. In the last column the "
            "same rows are normalized in groups, and sorted, as they were in training. With "
            "renormalization that is the same, except where r or d met their limits and were "
            "clipped.",
        ),
        caveats=(*tuning.edges(runs, settings.rates), *verdict.caveats()),
        not_shown=(
            f"How much harm a small batch usually does: the depth, {settings.depth} hidden layers, "
            "was chosen on other seeds so that there is harm to repair; small-batches has a "
            "shallower network.",
            "That a renormalized network learns better because training saw the network of "
            "evaluation. That the two agree follows from the formula, for any network.",
            "Groups that come one after another, as in gradient accumulation: here the running "
            f"statistics take in the {settings.batch} samples of a step together.",
            "The best limits: those of the paper were taken as they are, and only their "
            "schedule was made shorter.",
            "The sizes of the source's gains, which were measured on ImageNet.",
        ),
        also=tuple(Judged(claim, outcome) for claim, outcome in also.items()),
    )


# What there is to see


def figures(settings: RenormSettings, runs: Runs) -> list[Picture]:
    """Draw every seed's error in evaluation and as trained; and the error by size, if several."""
    from batchnorm.lab import plots

    large, small = arm(PLAIN, settings.batch), settings.sizes[0]
    names = [large, *pair(small, in_order=False), *pair(small, in_order=True)]
    marks = f"A mark is a seed, of {settings.seeds}; a stroke is their median."

    def strips(key: str) -> Any:
        of_arms = {name: tuning.measured(runs, key, arm=name) for name in names}
        return plots.strips(of_arms, xlabel="share of the test rows that came out wrong")

    pictures = [
        Picture(
            "error",
            "Test error",
            "See how far renormalization takes each small batch back toward the first line, and "
            f"whether it gets there. Every arm is at its own learning rate. {marks}",
            strips("error"),
        ),
        Picture(
            "as-trained",
            "Test error, normalized as in training",
            "The same networks and rows as above, but normalized in groups, as they were in "
            "training. Compare each line with its own above. The renormalized ones agree by "
            "construction: within the limits of r and d, training's output is that of evaluation, "
            f"and only clipping can separate the two. {marks}",
            strips("as_trained"),
        ),
    ]
    if len(settings.sizes) > 1:
        sizes = sorted(settings.sizes)
        series: dict[str, Any] = {}
        for in_order in (False, True):
            for i, kind in enumerate((PLAIN, RENORM)):
                columns = [_errors(runs, pair(s, in_order=in_order)[i]) for s in sizes]
                rows = [list(row) for row in zip(*columns, strict=True)]
                series[f"{kind}{SORTED * in_order}"] = sizes, rows
        picture = Picture(
            "sizes",
            "Test error by the size of the normalization's batch",
            "See where renormalization helps, and how much harm is left above the dotted line, "
            f"{large}. Lines: median of {counted(settings.seeds, 'seed')}; bands: lowest to "
            "highest seed.",
            plots.curves(
                series,
                xlabel="samples normalized together (log scale)",
                ylabel="test error (log scale)",
                yscale="log",
                level=statistics.median(_errors(runs, large)),
                level_label=large,
                marks=True,
            ),
        )
        pictures.append(picture)
    return pictures


EXPERIMENT = Experiment(
    name="renorm",
    claim="Where batches are small, batch renormalization trains better networks than batch "
    "normalization.",
    source="Ioffe 2017, “Batch renormalization” (arXiv:1702.03275)",
    recipe=2,
    trial=RenormTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
