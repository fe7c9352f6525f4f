"""Corrupted images: statistics of the test data in the place of those of training."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import BatchNorm, pause_statistics, recalibrate
from batchnorm.lab import networks, training
from batchnorm.lab.corruptions import STRENGTHS, corrupt
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
from batchnorm.lab.verdict import Verdict, judge, judge_shares, judge_within
from batchnorm.lab.words import counted

CLEAN = "clean"

#: Sizes of test batches; each divides the first, so that all of them see the same rows.
SIZES = (100, 20, 4)

TRAINED, RECALIBRATED, TENT = "as trained", "of all test rows", "TENT"

#: Points of accuracy on clean data that may go before something counts as lost.
TOLERANCE = 1

#: Kinds with which sorted streams lost to the statistics of training in a pilot.
HARD = ("noise", "blur")

#: Added to a run's seed for the noise and for the order of the test rows.
NOISE_OFFSET, STREAM_OFFSET = 3_000_000_000, 4_000_000_000

#: Test rows that go through the network at a time, about.
ROWS = 1000


def batches_of(size: int) -> str:
    """The name of an arm.

    >>> batches_of(4), in_order(4)
    ('batches of 4', 'batches of 4, sorted')
    """
    return f"batches of {size}"


def in_order(size: int) -> str:
    """The name of the arm whose stream is sorted by class."""
    return f"{batches_of(size)}, sorted"


@dataclass(frozen=True, kw_only=True)
class CorruptionSettings(Settings):
    """Training; every how many strengths are tried; TENT's steps."""

    steps: int
    every: int
    tent_steps: int
    tent_rate: float = 0.001
    rate: float = 0.1
    batch: int = 32


@dataclass(frozen=True, kw_only=True)
class CorruptionTrial(Trial):
    """One network, trained on clean images and tested on corrupted ones in every way."""

    steps: int
    every: int
    tent_steps: int
    tent_rate: float
    rate: float
    batch: int


Runs = Sequence[Run[CorruptionTrial]]

PROFILES = {
    "quick": CorruptionSettings(seeds=4, steps=250, every=2, tent_steps=50),
    "full": CorruptionSettings(seeds=8, steps=1500, every=1, tent_steps=50),
}


# The recipe


def by_batch(net: nn.Module, x: Tensor, y: Tensor, size: int) -> float:
    """Share of rows classified right if each batch is normalized by its own statistics.

    Several batches go through at once, as groups that do not see each other; it is a copy that does
    it, so nothing is updated.
    """
    copied = copy.deepcopy(net).train()
    for layer in copied.modules():
        if isinstance(layer, BatchNorm):
            layer.virtual_batch_size = size
    rows = size * max(1, ROWS // size)
    with torch.no_grad():
        right = [
            int((copied(part).argmax(1) == labels).sum())
            for part, labels in zip(x.split(rows), y.split(rows), strict=True)
        ]
    return sum(right) / len(y)


def tent(net: nn.Module, x: Tensor, *, steps: int, rate: float, size: int) -> nn.Module:
    """A copy whose γ and β have learnt to be sure of what they say: least entropy, no labels.

    Batch after batch of the stream, from its beginning again where it ends.
    """
    copied = copy.deepcopy(net).train()
    learnt = [p for m in copied.modules() if isinstance(m, BatchNorm) for p in m.parameters()]
    copied.requires_grad_(False)  # the weights' gradients would be work for nothing
    for parameter in learnt:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learnt, rate)
    batches = x.split(size)
    with pause_statistics(copied):
        for step in range(steps):
            logs = copied(batches[step % len(batches)]).log_softmax(1)
            optimizer.zero_grad()
            (-(logs.exp() * logs).sum(1).mean()).backward()
            optimizer.step()
    return copied


def run(trial: CorruptionTrial, data: Dataset) -> Run[CorruptionTrial]:
    """Train on clean images; accuracy of each arm by corruption, a number for each strength.

    And how many classes a batch of each size holds in the sorted stream, on average.
    """
    x, y, x_test, y_test = training.tensors(data, images=True)
    net = networks.resnet(x.shape[1], data.classes, BatchNorm, training.generator(trial.seed))
    training.fit(net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed)

    # In a random order, and as many as make whole batches of every size.
    rows = len(x_test) - len(x_test) % SIZES[0] or len(x_test)
    stream = torch.randperm(len(x_test), generator=training.generator(STREAM_OFFSET + trial.seed))
    x_test, y_test = x_test[stream[:rows]], y_test[stream[:rows]]
    noise = training.generator(NOISE_OFFSET + trial.seed)
    accuracy: dict[str, dict[str, list[float]]] = {}

    order = y_test.argsort(stable=True)

    def look(kind: str, images: Tensor) -> None:
        found = {TRAINED: training.accuracy(net, images, y_test)}
        for size in SIZES:
            found[batches_of(size)] = by_batch(net, images, y_test, size)
            found[in_order(size)] = by_batch(net, images[order], y_test[order], size)
        whole = copy.deepcopy(net)
        recalibrate(whole, images.split(ROWS))
        found[RECALIBRATED] = training.accuracy(whole, images, y_test)
        for arm, value in found.items():
            accuracy.setdefault(arm, {}).setdefault(kind, []).append(value)

    look(CLEAN, x_test)
    low, high = float(x.min()), float(x.max())
    for kind, strengths in STRENGTHS.items():
        for strength in strengths[:: trial.every]:
            images = corrupt(x_test, kind, strength, low, high, noise)
            look(kind, images)
        sure = tent(net, images, steps=trial.tent_steps, rate=trial.tent_rate, size=SIZES[0])
        accuracy.setdefault(TENT, {})[kind] = [by_batch(sure, images, y_test, SIZES[0])]
    classes = {
        str(size): statistics.fmean(len(part.unique()) for part in y_test[order].split(size))
        for size in SIZES
    }
    return Run(trial, {"accuracy": accuracy, "classes": classes}, {})


def plan(settings: CorruptionSettings, _: Runs) -> list[CorruptionTrial]:
    """A network a seed: its arms are ways to test it."""
    fields = ("steps", "every", "tent_steps", "tent_rate", "rate", "batch")
    shared = {key: getattr(settings, key) for key in fields}
    return [
        CorruptionTrial(stage="networks", seed=seed, **shared) for seed in range(settings.seeds)
    ]


# What the runs say


def clean(runs: Runs, arm: str) -> list[float]:
    """Accuracy on clean images, a number a seed."""
    return [r.measured["accuracy"][arm][CLEAN][0] for r in runs]


def corrupted(runs: Runs, arm: str, *, strongest: bool = False) -> list[float]:
    """Mean accuracy over the corruptions and their strengths (or at the strongest), by seed."""
    first = -1 if strongest else 0
    of_runs = [r.measured["accuracy"][arm] for r in runs]
    return [statistics.fmean(v for k in STRENGTHS for v in a[k][first:]) for a in of_runs]


def gains(runs: Runs, arm: str, kind: str) -> list[float]:
    """Points of accuracy above the statistics of training, of a kind of images, by seed."""
    of_runs = [r.measured["accuracy"] for r in runs]
    return [
        100 * (statistics.fmean(a[arm][kind]) - statistics.fmean(a[TRAINED][kind])) for a in of_runs
    ]


def analyse(settings: CorruptionSettings, runs: Runs) -> Findings:
    """Judge statistics of test batches against those of training, shuffled and sorted by class."""
    large, _, small = SIZES
    of_batches, of_sorted = batches_of(large), in_order(large)

    def better(control: str, treated: str, *, strongest: bool = False) -> Verdict:
        return judge_shares(
            corrupted(runs, control, strongest=strongest),
            corrupted(runs, treated, strongest=strongest),
            names=(control, treated),
        )

    def everywhere(arm: str, kinds: Sequence[str], sign: int = 1) -> Verdict:
        """Judge the kind that speaks least for a gain (or, with a sign of -1, for a loss)."""
        by_kind = [[sign * value for value in gains(runs, arm, kind)] for kind in kinds]
        least = [min(values) for values in zip(*by_kind, strict=True)]
        return judge(
            [0.0] * len(least),
            least,
            unit="points of accuracy",
            higher_is_better=True,
            names=(TRAINED, arm),
        )

    lost = [-gain for gain in gains(runs, of_batches, CLEAN)]
    nothing_lost = judge_within(TOLERANCE, lost, unit="points of accuracy lost")
    verdict = better(TRAINED, of_batches)

    def share(values: Sequence[float]) -> str:
        return f"{statistics.fmean(values):.1%}"

    def mean(arm: str, *, strongest: bool = False) -> str:
        return share(corrupted(runs, arm, strongest=strongest))

    def by_kind(arm: str) -> str:
        found = {kind: statistics.fmean(gains(runs, arm, kind)) for kind in STRENGTHS}
        kinds = sorted(found, key=found.__getitem__, reverse=True)
        return ", ".join(f"{kind} {found[kind]:+.1f}" for kind in kinds)

    def cell(arm: str, kind: str) -> str:
        found = [100 * statistics.fmean(r.measured["accuracy"][arm][kind]) for r in runs]
        spread = f"±{statistics.stdev(found):.1f}" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.1f}{spread}"

    def classes(size: int) -> str:
        return f"{statistics.fmean(r.measured['classes'][str(size)] for r in runs):.1f}"

    arms = [TRAINED, RECALIBRATED, *(name(s) for name in (batches_of, in_order) for s in SIZES)]
    return Findings(
        summary=(
            f"Of corrupted images, networks got {mean(TRAINED)} right with the statistics of "
            f"training and {mean(of_batches)} with those of each test batch of {large}, means over "
            f"all kinds. By kind, the gain in points was: {by_kind(of_batches)}. With batches of "
            f"{small} it was: {by_kind(batches_of(small))}. With batches of {large} in a stream "
            f"sorted by class: {by_kind(of_sorted)}. On clean images the statistics of training "
            f"gave {share(clean(runs, TRAINED))}, batches of {large} "
            f"{share(clean(runs, of_batches))}, sorted {share(clean(runs, of_sorted))}. At the "
            f"strongest corruptions, TENT had {mean(TENT)}, the same batches without it "
            f"{mean(of_batches, strongest=True)}."
        ),
        verdict=verdict,
        table=Table(
            ("statistics (% right)", *(CLEAN, *STRENGTHS)),
            tuple((arm, *(cell(arm, kind) for kind in (CLEAN, *STRENGTHS))) for arm in arms),
        ),
        recipe=(
            "A small residual CNN of three blocks with BatchNorm, trained on clean images: SGD "
            f"with momentum 0.9, batches of {settings.batch}, {settings.steps} steps, a rate of "
            f"{settings.rate:g} that falls to zero by a cosine. One network a seed; all arms test "
            "that network, on the same test rows.",
            "Pixels count from 0 (the darkest of the training images) to 1 (the brightest), and "
            "are cut off there. Noise: normal draws with a standard deviation of "
            f"{_listed('noise', settings)}. Contrast: of each pixel's distance from the mean of "
            f"its image is left {_listed('contrast', settings)}. Brightness: "
            f"{_listed('brightness', settings)} is added. Blur: by a Gaussian of "
            f"{_listed('blur', settings)} pixels. The strengths are those of ImageNet-C and, for "
            "the blur, CIFAR-10-C; results of a kind are means over its strengths (in the table "
            "with the standard deviation over seeds).",
            f"Test batches of {', '.join(map(str, SIZES))}, in random order or sorted by class, "
            "are normalized by their own statistics, of which no trace stays. Sorted, batches hold "
            f"{', '.join(map(classes, SIZES))} classes on average: the fewer, the harder. "
            f"“{RECALIBRATED.capitalize()}”: the running statistics are replaced by those of the "
            "whole corrupted test set (recalibrate), which knows no order.",
            f"TENT, at the strongest corruptions only: {settings.tent_steps} steps of Adam at "
            f"{settings.tent_rate:g} on γ and β, against the entropy of what the network says of "
            f"test batches of {large}; the stream begins again where it ends. Then the stream is "
            "classified once more.",
            "Where a claim is on several kinds at once, each seed counts with the kind that speaks "
            f"least for it. {HARD[0].capitalize()} and {HARD[1]} were chosen for sorted streams "
            "after a pilot.",
        ),
        caveats=verdict.caveats(),
        not_shown=(
            "That statistics of the test data make up for every shift: these corruptions change "
            "the mean and variance of pixels, which is what they can repair.",
            "That the mean over kinds speaks for any one of them: another choice of corruptions "
            "would have given another mean.",
            "Gains of the size found on ImageNet-C, or how a network fares that has been trained "
            "with corrupted images.",
            "The best that can be done with small batches or sorted streams: statistics can be "
            "mixed with those of training, and streams shuffled in a memory.",
            "TENT at its best: its rate is the source's, and was not tuned.",
        ),
        also=(
            Judged(
                f"Batches of {small} are enough to do better than the statistics of training with "
                "every kind of corruption.",
                everywhere(batches_of(small), list(STRENGTHS)),
                ours=True,
            ),
            Judged(
                f"On clean images the statistics of test batches of {large} cost at most "
                f"{TOLERANCE} point of accuracy.",
                nothing_lost,
                ours=True,
            ),
            Judged(
                f"On corrupted images in a stream sorted by class, batches of {large} do worse "
                "than in random order.",
                better(of_sorted, of_batches),
            ),
            Judged(
                f"In a stream sorted by class, batches of {large} do worse than the statistics of "
                f"training, both with {HARD[0]} and with {HARD[1]}.",
                everywhere(of_sorted, HARD, -1),
                ours=True,
            ),
            Judged(
                "Where the corruptions are strongest, TENT does better than the statistics of test "
                "batches alone.",
                better(of_batches, TENT, strongest=True),
            ),
        ),
    )


def _listed(kind: str, settings: CorruptionSettings) -> str:
    return ", ".join(f"{strength:g}" for strength in STRENGTHS[kind][:: settings.every])


def figures(settings: CorruptionSettings, runs: Runs) -> list[Picture]:
    """Draw accuracy by strength, a panel for each corruption; and by the size of test batches."""
    from batchnorm.lab import plots

    large = SIZES[0]
    of_batches = batches_of(large)
    bands = (
        f"Lines: median of {counted(settings.seeds, 'seed')}; bands: lowest to highest seed."
        if settings.seeds > 1
        else "One seed."
    )

    def by_strength(kind: str, arm: str) -> Any:
        places = [0, *range(1, len(STRENGTHS[kind]) + 1, settings.every)]
        of_runs = [r.measured["accuracy"][arm] for r in runs]
        return places, [accuracy[CLEAN] + accuracy[kind] for accuracy in of_runs]

    def by_size(kind: str, name: Any) -> Any:
        sizes = sorted(SIZES)
        of_runs = [r.measured["accuracy"] for r in runs]
        return sizes, [[statistics.fmean(a[name(s)][kind]) for s in sizes] for a in of_runs]

    arms = (TRAINED, of_batches, in_order(large))
    return [
        Picture(
            "strength",
            "Test accuracy by strength of the corruption",
            "See how far apart the first two lines are at the right, and that the third, of the "
            "very same images in another order, lies low also where nothing is corrupted (0). "
            f"{bands}",
            plots.panels(
                {kind: {arm: by_strength(kind, arm) for arm in arms} for kind in STRENGTHS},
                xlabel="strength (0: clean)",
                ylabel="test accuracy",
                columns=2,
                xscale="linear",
                marks=True,
            ),
        ),
        Picture(
            "batches",
            "Accuracy on corrupted images by the size of test batches",
            "See where the lines of test batches are above that of the statistics of training, "
            "which know no batches and no order, and where below: it differs by kind. Mean over "
            f"strengths. {bands}",
            plots.panels(
                {
                    kind: {
                        TRAINED: by_size(kind, lambda _: TRAINED),
                        "random order": by_size(kind, batches_of),
                        "sorted by class": by_size(kind, in_order),
                    }
                    for kind in STRENGTHS
                },
                xlabel="rows in a batch (log scale)",
                ylabel="test accuracy",
                columns=2,
                marks=True,
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="corruption",
    claim="On corrupted images a network does better with the statistics of the test batch than "
    "with those of training.",
    source="Schneider et al. 2020 (arXiv:2006.16971); Wang et al. 2021, “Tent” (arXiv:2006.10726); "
    "on sorted streams, Gong et al. 2022, “NOTE” (arXiv:2208.05117)",
    recipe=2,
    trial=CorruptionTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
