"""Statistics shared by processes: their small batches are one big batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm
from batchnorm.errors import ArgumentError
from batchnorm.lab import networks, ranks, training
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
from batchnorm.lab.verdict import Verdict, judge
from batchnorm.lab.words import counted
from batchnorm.sync import Synchronizer

EVEN, UNEVEN, AVERAGED, OWN = ARMS = (
    "synchronised",
    "synchronised, unequal",
    "plain averages, unequal",
    "not synchronised",
)

OUTPUTS, GRADIENTS, STATISTICS = PARTS = ("outputs", "gradients", "statistics")

#: Relative. In float64 rounding alone is ten decades smaller to begin with; what makes another
#: network is many decades larger.
TOLERANCE = 1e-6

#: Equal to the bit counts as this, which rounding can hardly be below: zero has no logarithm.
FLOOR = 2.0**-53


@dataclass(frozen=True, kw_only=True)
class SyncSettings(Settings):
    """How many processes; the first is the headline's. The batch is all processes' together."""

    worlds: tuple[int, ...]
    steps: int
    batch: int = 32
    rate: float = 0.05


@dataclass(frozen=True, kw_only=True)
class SyncTrial(Trial):
    """One process against several, in every way that they may normalize."""

    processes: int
    steps: int
    batch: int
    rate: float


Runs = Sequence[Run[SyncTrial]]

PROFILES = {
    "quick": SyncSettings(seeds=4, worlds=(2,), steps=8),
    "full": SyncSettings(seeds=8, worlds=(2, 4), steps=30),
}


def shares(arm: str, processes: int, batch: int) -> list[int]:
    """How many rows each process has.

    >>> shares(EVEN, 2, 32), shares(UNEVEN, 2, 32), shares(UNEVEN, 4, 32)
    ([16, 16], [20, 12], [11, 9, 7, 5])
    """
    steps = 2 * processes**2
    if batch % steps:
        raise ArgumentError(f"expected a batch that is a multiple of {steps}, got {batch}")
    unit = 0 if arm in (EVEN, OWN) else batch // steps
    return [batch // processes + (processes - 1 - 2 * rank) * unit for rank in range(processes)]


class PlainAverage(nn.Module):
    """What may come to mind first: the processes' means and mean squares, averaged.

    Right where all have equally many elements, and the control where they have not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean: Tensor
        self.running_var: Tensor
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.sync = Synchronizer(distributed.group.WORLD)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, in training."""
        local = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = self.sync.sum(local) / self.sync.size
        var = square - mean.square()
        count = x.numel() // x.shape[1] * self.sync.size
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * count / (count - 1), 0.1)
        scale = self.weight * (var + 1e-5).rsqrt()
        y: Tensor = (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return y


# The recipe


def build(channels: int, classes: int, seed: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """The network, in float64; the same weights however it is normalized."""
    return networks.resnet(channels, classes, norm, training.generator(seed)).double()


def train(
    net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], rate: float, part: slice, world: int
) -> Iterator[dict[str, list[Tensor]]]:
    """Train by SGD on this process's part of each batch; yield what came of each step.

    The loss is the sum over the part, divided by the mean number of rows of a process: so the
    average of all processes' gradients, as DistributedDataParallel makes it, is that of the mean
    loss of the whole batch, whatever the parts.
    """
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        outputs = net(x[part])
        loss = cross_entropy(outputs, y[part], reduction="sum") * world / len(x)
        loss.backward()
        yield {
            OUTPUTS: [outputs.detach()],
            GRADIENTS: [p.grad.clone() for p in net.parameters() if p.grad is not None],
            STATISTICS: [b.clone() for b in net.buffers() if b.is_floating_point()],
        }
        optimizer.step()


def train_in_rank(
    rank: int, world: int, batches: Any, channels: int, classes: int, trial: SyncTrial
) -> dict[str, list[dict[str, list[Tensor]]]]:
    """One process's part of every arm, with the gradients averaged over the processes."""
    norms: dict[str, Callable[[int], nn.Module]] = {
        EVEN: lambda channels: BatchNorm(channels, process_group="world"),
        UNEVEN: lambda channels: BatchNorm(channels, process_group="world"),
        AVERAGED: PlainAverage,
        OWN: BatchNorm,
    }
    results = {}
    for arm, norm in norms.items():
        rows = shares(arm, world, trial.batch)
        part = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        # Every process keeps the statistics that it has: nothing is to be made equal afterwards.
        net = DistributedDataParallel(
            build(channels, classes, trial.seed, norm), broadcast_buffers=False
        )
        results[arm] = list(train(net, batches, trial.rate, part, world))
        if rank:  # their gradients are rank 0's, and large
            for step in results[arm]:
                step[GRADIENTS] = []
    return results


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference in any of the tensors, relative to that tensor's largest value."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def run(trial: SyncTrial, data: Dataset) -> Run[SyncTrial]:
    """Train with one process here, with several elsewhere; their distance after each step."""
    x, y, _, _ = training.tensors(data, images=True)
    order = training.batches(len(x), trial.batch, trial.seed)
    batches = [(x[rows].double(), y[rows]) for rows in islice(order, trial.steps)]
    net = build(x.shape[1], data.classes, trial.seed, BatchNorm)
    alone = list(train(net, batches, trial.rate, slice(None), 1))
    everyones = ranks.together(
        train_in_rank, trial.processes, batches, x.shape[1], data.classes, trial
    )
    measured: dict[str, dict[str, list[float]]] = {}
    for arm in ARMS:
        measured[arm] = {part: [] for part in PARTS}
        for step, theirs in enumerate(alone):
            ours = [results[arm][step] for results in everyones]
            outputs = [torch.cat([one[OUTPUTS][0] for one in ours])]
            measured[arm][OUTPUTS].append(apart(outputs, theirs[OUTPUTS]))
            measured[arm][GRADIENTS].append(apart(ours[0][GRADIENTS], theirs[GRADIENTS]))
            measured[arm][STATISTICS].append(
                max(apart(one[STATISTICS], theirs[STATISTICS]) for one in ours)
            )
    return Run(trial, measured, {})


def plan(settings: SyncSettings, _: Runs) -> list[SyncTrial]:
    """Every number of processes with every seed."""
    return [
        SyncTrial(
            stage="training",
            seed=seed,
            processes=processes,
            steps=settings.steps,
            batch=settings.batch,
            rate=settings.rate,
        )
        for seed in range(settings.seeds)
        for processes in settings.worlds
    ]


# What the runs say


def _of(runs: Runs, processes: int) -> list[Run[SyncTrial]]:
    return [r for r in runs if r.trial.processes == processes]


def _farthest(runs: Runs, processes: int, arm: str, parts: Sequence[str] = PARTS) -> list[float]:
    """The largest distance in any of the parts after any step, a number a seed."""
    return [max(max(r.measured[arm][part]) for part in parts) for r in _of(runs, processes)]


def _equal(runs: Runs, processes: int, arm: str, *, claimed: bool = True) -> Verdict:
    """Judge in decades: the differences are ratios, and a decade is a decade at either end."""
    distances = [math.log10(max(d, FLOOR)) for d in _farthest(runs, processes, arm)]
    bounds = [math.log10(TOLERANCE)] * len(distances)
    return judge(
        bounds if claimed else distances,
        distances if claimed else bounds,
        unit="decades",
        names=("tolerance", "distance") if claimed else ("distance", "tolerance"),
    )


def _listed(rows: Sequence[int]) -> str:
    """Rows of each process, as in "20 + 12"."""
    return " + ".join(map(str, rows))


def analyse(settings: SyncSettings, runs: Runs) -> Findings:
    """Judge the distance of several processes from one against the tolerance."""
    first, *others = settings.worlds
    verdict = _equal(runs, first, EVEN)
    farthest = {arm: max(_farthest(runs, first, arm)) for arm in ARMS}
    even, uneven = (_listed(shares(arm, first, settings.batch)) for arm in (EVEN, UNEVEN))
    also = [
        Judged(
            f"Synchronised batches of unequal size ({uneven} rows) equal one big batch, too.",
            _equal(runs, first, UNEVEN),
        ),
        Judged(
            "To average the processes' means and mean squares is not enough where their batches "
            f"differ in size ({uneven} rows).",
            _equal(runs, first, AVERAGED, claimed=False),
        ),
        Judged(
            "Without synchronisation it is another network, though gradients are averaged "
            f"({even} rows).",
            _equal(runs, first, OWN, claimed=False),
        ),
    ]
    for processes in others:
        for arm in (EVEN, UNEVEN):
            rows = _listed(shares(arm, processes, settings.batch))
            also.append(
                Judged(
                    f"{processes} synchronised processes equal one big batch, too ({rows} rows).",
                    _equal(runs, processes, arm),
                )
            )
    table = [
        (
            str(processes),
            arm,
            *(f"{max(_farthest(runs, processes, arm, [part])):.0e}" for part in PARTS),
        )
        for processes in settings.worlds
        for arm in ARMS
    ]
    return Findings(
        summary=(
            f"Through {counted(settings.steps, 'training step')}, {first} processes with {even} "
            f"rows and synchronised statistics were never further than {farthest[EVEN]:.0e} from "
            f"one process with all {settings.batch}, in outputs, gradients and running "
            f"statistics, relative to the largest value; with {uneven} rows, never further than "
            f"{farthest[UNEVEN]:.0e}. Plain averages of statistics got as far as "
            f"{farthest[AVERAGED]:.1g} there; processes that each had their own, "
            f"{farthest[OWN]:.1g}."
        ),
        verdict=verdict,
        table=Table(("processes", "normalization", *PARTS), tuple(table)),
        recipe=(
            "A residual network of three blocks, in float64, trained by SGD with momentum 0.9 at "
            f"{settings.rate:g} on batches of {settings.batch}, {settings.steps} steps: once by "
            "one process, and once by several (gloo, on one machine), each with its share of "
            "every batch.",
            "DistributedDataParallel averages gradients in all arms. Each process's loss is the "
            "sum over its rows by the mean number of rows a process has, so that the average is "
            "the gradient of the whole batch's mean loss for shares of any size.",
            "Each training goes its own way from the same weights: nothing is set back to the "
            "other's in between. The distance of a step is the largest difference in any tensor, "
            "relative to the largest value of that tensor in the one process; a seed's is the "
            "largest of all steps, and of outputs, gradients and running statistics.",
            f"It counts as equal below {TOLERANCE:g}; the verdict is on how many decades it lies "
            "from there.",
        ),
        caveats=verdict.caveats(),
        not_shown=(
            "That a model gets better by it: whether small batches hurt is another experiment's "
            "claim.",
            "Equality to the bit. Sums in another order are rounded otherwise; in float32 that "
            "is some billion times as much, and a long training lets it grow.",
            "GPUs and NCCL, or what the messages cost.",
        ),
        also=tuple(also),
    )


# What there is to see


def figures(settings: SyncSettings, runs: Runs) -> list[Picture]:
    """Draw the distance by step, a figure for each number of processes."""
    from batchnorm.lab import plots

    steps = list(range(1, settings.steps + 1))
    pictures = []
    for processes in settings.worlds:
        series: dict[str, Any] = {
            arm: (
                steps,
                [
                    [max(values) for values in zip(*r.measured[arm].values(), strict=True)]
                    for r in _of(runs, processes)
                ],
            )
            for arm in ARMS
        }
        pictures.append(
            Picture(
                f"distance-{processes}",
                f"Distance of {processes} processes from one, by step",
                "Lines at the bottom are rounding, and the same network; lines at the top are "
                "another one. Dotted: where they count as equal. The largest of outputs, "
                f"gradients and running statistics. Lines: median of "
                f"{counted(settings.seeds, 'seed')}; bands: lowest to highest seed.",
                plots.curves(
                    series,
                    xlabel="training step",
                    ylabel="largest relative difference",
                    xscale="linear",
                    yscale="log",
                    share=False,
                    level=TOLERANCE,
                    level_label="equal below",
                ),
            )
        )
    return pictures


EXPERIMENT = Experiment(
    name="sync",
    claim="Small batches whose statistics are synchronised over processes equal one big batch.",
    source="Peng et al. 2018, “MegDet: a large mini-batch object detector” (arXiv:1711.07240)",
    recipe=1,
    trial=SyncTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
