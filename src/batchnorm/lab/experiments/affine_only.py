"""Training only γ and β: what normalization's own parameters can do with random weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
from batchnorm.lab.tuning import EVALUATION, SWEEP, ArmTrial, select
from batchnorm.lab.verdict import Verdict, judge, judge_shares
from batchnorm.lab.words import counted

ALL, AFFINE, RANDOM, HEAD = KINDS = ("all", "γ and β", "random weights", "head")

#: As many as γ and β are; the source's number, too.
WEIGHTS_A_CHANNEL = 2

#: A feature whose |γ| is smaller counts as switched off.
OFF = 0.01

#: Where the distribution of |γ| is looked at.
THRESHOLDS = (0.003, OFF, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, kw_only=True)
class AffineSettings(Settings):
    """The networks, by their blocks a stage; the first is the headline's."""

    tuning_seeds: int
    rates: tuple[float, ...]
    blocks: tuple[int, ...]
    steps: int
    batch: int = 64


@dataclass(frozen=True, kw_only=True)
class AffineTrial(ArmTrial):
    """One training run; the arm is the network, and what of it is trained."""

    blocks: int
    steps: int
    batch: int


Runs = Sequence[Run[AffineTrial]]

PROFILES = {
    # The arms' best rates lie two decades apart and more. Half-decades, so that no arm is far from
    # its own; 48 runs of 70 steps are half a minute.
    "quick": AffineSettings(
        seeds=4,
        tuning_seeds=1,
        rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        blocks=(1,),
        steps=70,
    ),
    "full": AffineSettings(
        seeds=8,
        tuning_seeds=2,
        rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        blocks=(1, 3),
        steps=300,
    ),
}


def network(blocks: int) -> str:
    """A network's name by its layers with weights, as He et al. 2016 count them.

    >>> network(1), network(3)
    ('ResNet-8', 'ResNet-20')
    """
    return f"ResNet-{6 * blocks + 2}"


def arm(blocks: int, kind: str) -> str:
    """The name of an arm.

    >>> arm(1, "head")
    'ResNet-8 (head)'
    """
    return f"{network(blocks)} ({kind})"


# The recipe


def build(trial: AffineTrial, channels: int, classes: int) -> tuple[nn.Sequential, int]:
    """The network with what is not trained held fast, and the number of parameters that are.

    All arms of a seed begin with the same weights and the same γ, uniform between 0 and 1 (as in
    the source); β begins at 0. Of a convolution that is trained in part each output channel has
    its own few weights, drawn once; the gradient of the others is put to zero, and SGD without
    weight decay leaves them as they are.
    """
    generator = training.generator(trial.seed)

    def normalization(channels: int) -> nn.Module:
        layer = BatchNorm(channels)
        nn.init.uniform_(layer.weight, generator=generator)
        return layer

    net = networks.resnet(channels, classes, normalization, generator, blocks=trial.blocks)
    (kind,) = (kind for kind in KINDS if trial.arm == arm(trial.blocks, kind))
    if kind == ALL:
        return net, sum(p.numel() for p in net.parameters())
    net.requires_grad_(False)
    if kind == HEAD:
        net[-1].requires_grad_(True)
    elif kind == AFFINE:
        for layer in _norms(net):
            layer.requires_grad_(True)
    else:
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                _train_in_part(module.weight, generator)
        return net, WEIGHTS_A_CHANNEL * sum(layer.num_features for layer in _norms(net))
    return net, sum(p.numel() for p in net.parameters() if p.requires_grad)


def _norms(net: nn.Module) -> list[BatchNorm]:
    return [module for module in net.modules() if isinstance(module, BatchNorm)]


def _train_in_part(weight: Tensor, generator: torch.Generator) -> None:
    scores = torch.rand(weight.flatten(1).shape, generator=generator)
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(WEIGHTS_A_CHANNEL).indices, 1)
    mask = chosen.view_as(weight)
    weight.requires_grad_(True).register_hook(lambda gradient: gradient * mask)


def run(trial: AffineTrial, data: Dataset) -> Run[AffineTrial]:
    """Train; the test error at the end, and the share of |γ| below each threshold."""
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data), images=True)
    net, trained = build(trial, x.shape[1], data.classes)
    before = _below(net)
    training.fit(net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed)
    measured = {
        "error": 1 - training.accuracy(net, x_test, y_test),
        "trained": trained,
        "below_before": before,
        "below": _below(net),
    }
    return Run(trial, measured, {})


def _below(net: nn.Module) -> list[float]:
    gammas: Tensor = torch.cat([layer.weight.detach() for layer in _norms(net)]).abs()
    return [int((gammas < threshold).sum()) / len(gammas) for threshold in THRESHOLDS]


def plan(settings: AffineSettings, runs: Runs) -> list[AffineTrial]:
    """Tune every arm's learning rate by itself."""
    return [
        trial
        for blocks in settings.blocks
        for trial in tuning.plan(
            AffineTrial(
                stage="", seed=0, arm="", rate=0.0,
                blocks=blocks, steps=settings.steps, batch=settings.batch,
            ),
            runs,
            arms=[arm(blocks, kind) for kind in KINDS],
            corners=[{"rate": rate} for rate in settings.rates],
            tuning_seeds=settings.tuning_seeds,
            seeds=settings.seeds,
        )
    ]  # fmt: skip


# What the runs say


def _errors(runs: Runs, blocks: int, kind: str) -> list[float]:
    return tuning.measured(runs, "error", arm=arm(blocks, kind))


def _off(runs: Runs, blocks: int, kind: str, when: str = "below") -> list[float]:
    found = select(runs, stage=EVALUATION, arm=arm(blocks, kind))
    return [r.measured[when][THRESHOLDS.index(OFF)] for r in found]


def _better(runs: Runs, control: tuple[int, str], treated: tuple[int, str]) -> Verdict:
    return judge_shares(
        _errors(runs, *control),
        _errors(runs, *treated),
        errors=True,
        names=(arm(*control), arm(*treated)),
    )


def _also(settings: AffineSettings, runs: Runs) -> list[Judged]:
    first, *deeper = settings.blocks
    others = [
        Judged(
            "Training only γ and β gives better accuracy than training only the head.",
            _better(runs, (first, HEAD), (first, AFFINE)),
        ),
        Judged(
            f"Training only γ and β switches features off: more of the |γ| end below {OFF:g} than "
            "when everything is trained.",
            judge(
                [100 * share for share in _off(runs, first, ALL)],
                [100 * share for share in _off(runs, first, AFFINE)],
                unit="points more of all γ",
                higher_is_better=True,
                names=(arm(first, ALL), arm(first, AFFINE)),
            ),
        ),
    ]
    if deeper:
        deepest = deeper[-1]
        others += [
            Judged(
                "In a deeper network, too, training only γ and β gives better accuracy than "
                "training as many random weights.",
                _better(runs, (deepest, RANDOM), (deepest, AFFINE)),
            ),
            Judged(
                "With only γ and β trained, a deeper network is more accurate.",
                _better(runs, (first, AFFINE), (deepest, AFFINE)),
            ),
        ]
    return others


def analyse(settings: AffineSettings, runs: Runs) -> Findings:
    """Judge γ and β against as many random weights and the head; what is off, against all."""
    first = settings.blocks[0]
    mean = {kind: statistics.fmean(_errors(runs, first, kind)) for kind in KINDS}
    off = {kind: statistics.fmean(_off(runs, first, kind)) for kind in (ALL, AFFINE)}
    count: dict[str, int] = {}
    rows = []
    for name in dict.fromkeys(r.trial.arm for r in runs):
        found = select(runs, stage=EVALUATION, arm=name)
        errors = [r.measured["error"] for r in found]
        count[name] = found[0].measured["trained"]
        rows.append(
            (
                name,
                f"{count[name]:,}",
                f"{found[0].trial.rate:g}",
                f"{statistics.fmean(errors):.1%} ({min(errors):.1%}–{max(errors):.1%})",
            )
        )
    verdict = _better(runs, (first, RANDOM), (first, AFFINE))
    return Findings(
        summary=(
            f"With only γ and β trained, {count[arm(first, AFFINE)]:,} of "
            f"{count[arm(first, ALL)]:,} parameters, {network(first)} got {mean[AFFINE]:.1%} of "
            f"the test rows wrong; with {count[arm(first, RANDOM)]:,} random weights trained "
            f"instead, {mean[RANDOM]:.1%}; with the head's {count[arm(first, HEAD)]:,} parameters, "
            f"{mean[HEAD]:.1%}; with everything, {mean[ALL]:.1%}. Below {OFF:g} ended "
            f"{off[AFFINE]:.1%} of the |γ| where only γ and β were trained, and {off[ALL]:.1%} "
            f"where all was; {statistics.fmean(_off(runs, first, ALL, 'below_before')):.1%} began "
            "there."
        ),
        verdict=verdict,
        table=Table(("trained", "parameters", "rate", "test error (range)"), tuple(rows)),
        recipe=(
            "Residual networks as He et al. 2016 have them for CIFAR, with stages of "
            f"{', '.join(map(str, networks.STAGES))} channels and "
            f"{' or '.join(map(str, settings.blocks))} blocks in each; convolutions are He's "
            "normal draws, γ is uniform between 0 and 1, β zero, and all arms of a seed begin with "
            "the same.",
            "What is not trained keeps its first value, the head included; running statistics are "
            "updated everywhere. Random weights: "
            f"{WEIGHTS_A_CHANNEL} of each convolution's output channel, drawn once, which are as "
            "many as γ and β.",
            f"SGD with momentum 0.9 on batches of {settings.batch}, {settings.steps} steps, the "
            "rate falling to zero by a cosine; no weight decay. Learning rates, tuned for each arm "
            f"by itself: {', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each. {tuning.HOW}",
        ),
        caveats=(*tuning.edges(runs, settings.rates), *verdict.caveats()),
        not_shown=(
            "The source's sizes: its 82% are those of far deeper networks on CIFAR-10.",
            "Whether features are switched off in a training as long as the source's, which has "
            "weight decay, too.",
            "That γ and β do better than any other choice of as many parameters: random ones are "
            "one choice, and the head is another.",
        ),
        also=tuple(_also(settings, runs)),
    )


# What there is to see


def figures(settings: AffineSettings, runs: Runs) -> list[Picture]:
    """Draw the errors, the error by learning rate, and the distribution of |γ|."""
    from batchnorm.lab import plots

    first = settings.blocks[0]
    seeds = counted(settings.seeds, "seed")
    swept: dict[str, Any] = {}
    for kind in KINDS:
        columns = [
            [
                r.measured["error"]
                for r in select(runs, stage=SWEEP, arm=arm(first, kind), rate=rate)
            ]
            for rate in settings.rates
        ]
        swept[kind] = (settings.rates, [list(row) for row in zip(*columns, strict=True)])
    gammas: dict[str, Any] = {
        f"{kind} trained": (
            THRESHOLDS,
            [r.measured["below"] for r in select(runs, stage=EVALUATION, arm=arm(first, kind))],
        )
        for kind in (ALL, AFFINE)
    }
    start = select(runs, stage=EVALUATION, arm=arm(first, ALL))
    gammas["at the start"] = (THRESHOLDS, [r.measured["below_before"] for r in start])
    return [
        Picture(
            "error",
            "Test error by what is trained",
            f"Further left is better. A mark is a seed, a stroke the median of {seeds}; every arm "
            "at its own learning rate. γ and β are as many parameters as the random weights.",
            plots.strips(
                {
                    arm(blocks, kind): [100 * e for e in _errors(runs, blocks, kind)]
                    for blocks in settings.blocks
                    for kind in KINDS
                },
                xlabel="test rows wrong, %",
            ),
        ),
        Picture(
            "rates",
            f"Test error by learning rate, {network(first)}",
            "Lower is better: see whether one line stays below another at every rate, or whether "
            "their order is a matter of the rate. Marks: median of "
            f"{counted(settings.tuning_seeds, 'tuning seed')}.",
            plots.curves(
                swept, xlabel="learning rate (log scale)", ylabel="test error", marks=True
            ),
        ),
        Picture(
            "gammas",
            f"How small the γ are, {network(first)}",
            f"The share of all |γ| below each size. Switched off would be a line that starts high "
            f"on the left: at {OFF:g}, where it counts. Marks: median of {seeds}; bands: lowest "
            "to highest seed.",
            plots.curves(
                gammas, xlabel="|γ| (log scale)", ylabel="share of γ that are smaller", marks=True
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="affine-only",
    claim="Training only γ and β gives better accuracy than training as many other weights, chosen "
    "at random.",
    source="Frankle, Schwab & Morcos 2021, “Training BatchNorm and only BatchNorm” "
    "(arXiv:2003.00152)",
    recipe=2,
    trial=AffineTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
