"""What normalization costs: memory and time in training; in inference nothing, if folded."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, fold
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
from batchnorm.lab.verdict import Verdict, judge, judge_within
from batchnorm.lab.words import counted

STACK, RESNET = "conv", "ResNet"

PLAIN, TORCHS, OURS = "plain", "torch's", "BatchNorm"
FUSED, RECOMPUTED, FOLDED = "fused ReLU", "recomputed", "folded"
CHECKPOINTED = "plain, checkpointed"

#: What is measured of a network, and of a stack of convolutions besides.
EVERYWHERE = (PLAIN, TORCHS, OURS)
STACKS = (PLAIN, CHECKPOINTED, TORCHS, OURS, FUSED, RECOMPUTED)

KEPT, STEP, INFERENCE = "kept", "step", "inference"

#: How much more than without normalization counts as nothing.
TOLERANCE = 0.05

MIB = 2**20

#: Processor time, which others on the machine take nothing of; Windows' ticks are too long for it.
CLOCK = time.perf_counter if sys.platform == "win32" else time.process_time

#: Inference takes a third of a step or less, and is timed so many times together.
REPEATS = 3

#: Of SGD in the steps that are timed: what is learnt does not matter, but must stay finite.
RATE = 0.001


@dataclass(frozen=True, kw_only=True)
class CostSettings(Settings):
    """The networks: kind, and channels of a stack or blocks in a stage of a residual network."""

    networks: tuple[tuple[str, int], ...]
    batch: int
    rounds: int
    depth: int = 6


@dataclass(frozen=True, kw_only=True)
class CostTrial(Trial):
    """One network in all its forms."""

    network: str
    size: int
    depth: int
    batch: int
    rounds: int


Runs = Sequence[Run[CostTrial]]

PROFILES = {
    "quick": CostSettings(
        seeds=8, networks=((STACK, 16), (STACK, 32), (RESNET, 1)), batch=64, rounds=9
    ),
    "full": CostSettings(
        seeds=8,
        networks=((STACK, 16), (STACK, 64), (RESNET, 1), (RESNET, 2)),
        batch=128,
        rounds=31,
    ),
}


# The recipe


class Recomputed(nn.Sequential):
    """Layers that keep their input only, and are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Sequential."""
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


def stack(
    arm: str, channels: int, classes: int, width: int, depth: int, generator: torch.Generator
) -> nn.Sequential:
    """Convolutions, each followed by normalization (or none) and ReLU; a pool and a dense head.

    Recomputed (and checkpointed) is all between the outputs of one convolution and of the next.
    """
    layers: list[nn.Module] = []
    after: list[nn.Module] = []
    for index in range(depth):
        fan_in = width if index else channels
        layer = networks.convolution(fan_in, width, generator, bias=arm in (PLAIN, CHECKPOINTED))
        if arm in (RECOMPUTED, CHECKPOINTED) and after:
            layers.append(Recomputed(*after, layer))
        else:
            layers += [*after, layer]
        if arm in (FUSED, RECOMPUTED):
            after = [BatchNorm(width, activation="relu")]
        else:
            norm = norm_of(arm)(width)
            after = [nn.ReLU()] if norm is None else [norm, nn.ReLU()]
    head = networks.dense(width, classes, generator, gain=1.0)
    return nn.Sequential(*layers, *after, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def norm_of(arm: str) -> networks.Norm:
    """What stands after each convolution."""
    others: dict[str, networks.Norm] = {
        PLAIN: networks.nothing,
        CHECKPOINTED: networks.nothing,
        TORCHS: nn.BatchNorm2d,
    }
    return others.get(arm, BatchNorm)


def arms_of(network: str) -> tuple[str, ...]:
    """The forms of a network that are trained; a residual one has sums before some ReLUs."""
    return EVERYWHERE if network == RESNET else STACKS


def build(trial: CostTrial, arm: str, channels: int, classes: int) -> nn.Sequential:
    """The network; all arms of a seed have the same weights."""
    weights = training.generator(trial.seed)
    if trial.network == RESNET:
        return networks.resnet(channels, classes, norm_of(arm), weights, blocks=trial.size)
    return stack(arm, channels, classes, trial.size, trial.depth, weights)


def ratios(
    calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int, seed: int
) -> dict[str, float]:
    """Time of each call as a multiple of the first one's: the median over rounds.

    In each round every call is timed, so many repeats together, in an order drawn anew: whatever
    else the machine does meets all of them alike. A round before the first does not count.
    """
    first = next(iter(calls))
    shuffle = random.Random(seed).shuffle  # noqa: S311 - an order, not a secret
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        order = list(calls)
        shuffle(order)
        seconds = {}
        for name in order:
            start = CLOCK()
            for _ in range(repeats):
                calls[name]()
            seconds[name] = CLOCK() - start
        for name in calls if number else ():
            found[name].append(seconds[name] / seconds[first])
    return {name: statistics.median(values) for name, values in found.items()}


def run(trial: CostTrial, data: Dataset) -> Run[CostTrial]:
    """Bytes kept for a backward pass; times of a training step and of inference by the plain's."""
    x, y, _, _ = training.tensors(data, images=True)
    rows = next(training.batches(len(x), min(trial.batch, len(x)), trial.seed))
    x, y = x[rows], y[rows]
    nets: dict[str, nn.Module] = {
        arm: build(trial, arm, x.shape[1], data.classes) for arm in arms_of(trial.network)
    }

    def step_of(net: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(net.parameters(), RATE)

        def step() -> None:
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()

        return step

    def inference_of(net: nn.Module) -> Callable[[], None]:
        net.eval()

        def infer() -> None:
            with torch.no_grad():
                net(x)

        return infer

    def loss_of(net: nn.Module) -> Callable[[], Tensor]:
        return lambda: cross_entropy(net(x), y)

    kept = {arm: training.saved_bytes(net, loss_of(net)) for arm, net in nets.items()}
    steps = ratios({arm: step_of(net) for arm, net in nets.items()}, trial.rounds, 1, trial.seed)
    # Recomputing is for backward passes.
    used = {arm: net for arm, net in nets.items() if arm not in (CHECKPOINTED, RECOMPUTED)}
    used[FOLDED] = fold(nets[OURS], x)
    calls = {arm: inference_of(net) for arm, net in used.items()}
    inference = ratios(calls, trial.rounds, REPEATS, trial.seed)
    return Run(trial, {KEPT: kept}, {STEP: steps, INFERENCE: inference})


def plan(settings: CostSettings, _: Runs) -> list[CostTrial]:
    """Every network with every seed."""
    return [
        CostTrial(
            stage="networks",
            seed=seed,
            network=network,
            size=size,
            depth=settings.depth,
            batch=settings.batch,
            rounds=settings.rounds,
        )
        for seed in range(settings.seeds)
        for network, size in settings.networks
    ]


# What the runs say


def multiple(run: Run[CostTrial], what: str, arm: str) -> float | None:
    """What an arm keeps or takes, as a multiple of the plain network's; None if it has no part."""
    if what != KEPT:
        found: float | None = run.timing[what].get(arm)
        return found
    kept = run.measured[KEPT]
    return kept[arm] / kept[PLAIN] if arm in kept else None


def by_seed(runs: Runs, what: str, arm: str) -> list[float]:
    """The mean multiple over the networks that have the arm, a number a seed."""
    means = []
    for seed in sorted({r.trial.seed for r in runs}):
        found = [multiple(r, what, arm) for r in runs if r.trial.seed == seed]
        means.append(statistics.fmean(value for value in found if value is not None))
    return means


def _of(runs: Runs, network: tuple[str, int]) -> Runs:
    return [r for r in runs if (r.trial.network, r.trial.size) == network]


def _multiples(runs: Runs, what: str, arm: str) -> list[float]:
    found = [multiple(r, what, arm) for r in runs]
    return [value for value in found if value is not None]


def analyse(settings: CostSettings, runs: Runs) -> Findings:
    """Judge multiples of what the plain network keeps and takes, means over the networks."""
    plains = {
        KEPT: "the plain network's memory",
        STEP: "the plain network's step",
        INFERENCE: "the plain network's inference",
    }

    def more(what: str, arm: str, than: str = PLAIN) -> Verdict:
        control, treated = by_seed(runs, what, arm), by_seed(runs, what, than)
        return judge(control, treated, unit=f"times {plains[what]}", names=(arm, than))

    def more_than_checkpoints() -> Verdict:
        """Judge what recomputing adds to a step against what checkpoints add to a plain one."""
        plain = [value - 1 for value in by_seed(runs, STEP, CHECKPOINTED)]
        pairs = zip(by_seed(runs, STEP, RECOMPUTED), by_seed(runs, STEP, FUSED), strict=True)
        added = [recomputed - kept for recomputed, kept in pairs]
        names = RECOMPUTED, CHECKPOINTED
        return judge(added, plain, unit=f"times {plains[STEP]}", names=names)

    def no_more(what: str, arm: str) -> Verdict:
        extra = [100 * (value - 1) for value in by_seed(runs, what, arm)]
        return judge_within(100 * TOLERANCE, extra, unit=f"% above {plains[what]}")

    stacks = [r for r in runs if r.trial.network == STACK]

    def mean(what: str, arm: str, of: Runs = runs) -> str:
        return f"{statistics.fmean(by_seed(of, what, arm)):.2f}"

    def cell(of: Runs, what: str, arm: str) -> str:
        values = _multiples(of, what, arm)
        if not values:
            return "–"
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    rows = []
    for network in settings.networks:
        of = _of(runs, network)
        kept = of[0].measured[KEPT]
        for arm in (*STACKS, FOLDED):
            if arm in kept or arm == FOLDED:
                mib = f"{kept[arm] / MIB:.2f}" if arm in kept else "–"
                times = (
                    ("1", "1") if arm == PLAIN else (cell(of, STEP, arm), cell(of, INFERENCE, arm))
                )
                rows.append((_name(network), arm, mib, *times))
    verdict = more(KEPT, OURS)
    within = f"{TOLERANCE:.0%}"
    return Findings(
        summary=(
            f"Over all networks, those with BatchNorm kept {mean(KEPT, OURS)} times the memory of "
            f"plain ones for the backward pass; a training step took {mean(STEP, OURS)} times as "
            f"long ({mean(STEP, TORCHS)} times with torch's layer), inference "
            f"{mean(INFERENCE, OURS)} times, and {mean(INFERENCE, FOLDED)} times with BatchNorm "
            "folded into the convolutions. Over the stacks of convolutions alone, BatchNorm kept "
            f"{mean(KEPT, OURS, stacks)} times the memory, {mean(KEPT, FUSED, stacks)} with ReLU "
            f"fused, {mean(KEPT, RECOMPUTED, stacks)} if both were computed again; a step took "
            f"{mean(STEP, OURS, stacks)}, {mean(STEP, FUSED, stacks)} and "
            f"{mean(STEP, RECOMPUTED, stacks)} times as long as the plain one, which took "
            f"{mean(STEP, CHECKPOINTED, stacks)} times as long with the same checkpoints."
        ),
        verdict=verdict,
        table=Table(
            ("network", "normalization", "MiB kept", "step (range)", "inference (range)"),
            tuple(rows),
        ),
        recipe=(
            f"“{STACK}, N”: {settings.depth} convolutions of 3×3 with N channels, each followed by "
            f"BatchNorm (or nothing, and a bias) and ReLU. “{RESNET}, N”: a small residual CNN of "
            f"three stages with N blocks each. Batches of {settings.batch} of the data's images; "
            "all forms of a network have the same weights.",
            "Memory: the bytes of all tensors that autograd keeps from the forward pass for the "
            "backward pass (saved_tensors_hooks), each once, parameters apart.",
            "Time: of a step of forward pass, backward pass and SGD, and of inference. "
            f"{counted(settings.rounds, 'round')}, in each of which all forms are timed in an "
            "order drawn anew; the median over rounds of the ratio to the plain network's. It is "
            "the processor's time, of one thread. Times do not repeat exactly; those that were "
            "judged are in results.json.",
            f"“{FUSED}”: BatchNorm does ReLU, too. “{RECOMPUTED.capitalize()}”: so, and what lies "
            "between the outputs of two convolutions is checkpointed (torch.utils.checkpoint). "
            f"“{CHECKPOINTED}”: no BatchNorm, but the same checkpoints around ReLU: what these "
            "cost by themselves. It is taken off where recomputing is judged: what that adds to a "
            "step with fused BatchNorm, against what checkpoints add to a plain step. "
            f"“{FOLDED.capitalize()}”: batchnorm.fold. Verdicts are on means over the networks "
            f"that have the forms in question; as nothing counts what is within {within}.",
        ),
        caveats=(
            "What is kept does not depend on the seed: on memory the seeds agree because there is "
            "no chance in it, not because there were many.",
            *verdict.caveats(),
        ),
        not_shown=(
            "The cost on a GPU, or on many cores: there arithmetic is cheaper against memory.",
            "The cost in a large network: a convolution's work grows with the square of its "
            "channels, the normalization's with their number.",
            "What recomputing costs in large layers: torch's checkpoints cost much the same in "
            "any, so they weigh most where, as here, layers are small.",
            "The most memory that is in use at any time: workspaces and gradients come on top.",
            "What is gained for that price: a network that learns faster may need fewer steps.",
        ),
        also=(
            Judged("A training step takes longer with BatchNorm than without.", more(STEP, OURS)),
            Judged(
                "A training step takes longer with torch's own layer than without.",
                more(STEP, TORCHS),
                ours=True,
            ),
            Judged(
                "Computed again in the backward pass, BatchNorm keeps no more memory than a plain "
                f"network does (within {within}).",
                no_more(KEPT, RECOMPUTED),
            ),
            Judged(
                "To compute BatchNorm again in the backward pass takes time, beyond that of the "
                "checkpoints themselves.",
                more_than_checkpoints(),
                ours=True,
            ),
            Judged(
                "Inference takes longer with BatchNorm, not folded.",
                more(INFERENCE, OURS),
                ours=True,
            ),
            Judged(
                f"Folded, BatchNorm costs nothing in inference (within {within}).",
                no_more(INFERENCE, FOLDED),
            ),
        ),
    )


def _name(network: tuple[str, int]) -> str:
    return f"{network[0]}, {network[1]}"


def figures(settings: CostSettings, runs: Runs) -> list[Picture]:
    """Draw the multiples of every network and form: memory, step, inference."""
    from batchnorm.lab import plots

    seeds = counted(settings.seeds, "seed")

    def drawn(what: str, xlabel: str) -> Any:
        series = {
            f"{_name(network)}: {arm}": values
            for network in settings.networks
            for arm in (*STACKS[1:], FOLDED)
            if (values := _multiples(_of(runs, network), what, arm))
        }
        return plots.strips(series, xlabel=xlabel, level=1)

    return [
        Picture(
            "memory",
            "Memory kept for the backward pass",
            "See what keeps about twice as much as the plain network (dotted), and what does not. "
            f"A mark is a seed, a stroke the median of {seeds}: marks lie on each other, for there "
            "is no chance in it.",
            drawn(KEPT, "bytes kept, plain network = 1"),
        ),
        Picture(
            "step",
            "Time of a training step",
            "See what is right of the dotted line, a step of the plain network. A mark is a seed, "
            f"a stroke the median of {seeds}.",
            drawn(STEP, "time of a step, plain network = 1"),
        ),
        Picture(
            "inference",
            "Time of inference",
            "See that “folded” lies at the dotted line, the plain network's inference, or how far "
            f"off. A mark is a seed, a stroke the median of {seeds}.",
            drawn(INFERENCE, "time of inference, plain network = 1"),
        ),
    ]


EXPERIMENT = Experiment(
    name="cost",
    claim="In training, batch normalization makes a network keep more memory.",
    source="Rota Bulò et al. 2018, “In-place activated BatchNorm” (arXiv:1712.02616), on memory; "
    "Brock et al. 2021 (arXiv:2102.06171), on time; Jacob et al. 2018 (arXiv:1712.05877), on "
    "folding",
    recipe=2,
    trial=CostTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
