"""Batch normalization in an LSTM: statistics of each step, γ = 0.1."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm import BatchNormLSTM
from batchnorm.lab import training, tuning
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

PLAIN, SMALL, ONE, POOLED = ARMS = (
    "plain LSTM",
    "BN, γ = 0.1",
    "BN, γ = 1",
    "BN, one set of statistics",
)

#: Added to a run's seed for what permutes the pixels: the same for both arms.
PERMUTATION_OFFSET = 3_000_000_000


@dataclass(frozen=True, kw_only=True)
class RecurrentSettings(Settings):
    """The network and its training; whether pixels come in order, or permuted."""

    tuning_seeds: int
    rates: tuple[float, ...]
    steps: int
    permuted: tuple[bool, ...]
    hidden: int = 32
    batch: int = 64
    pixels: int = 4


@dataclass(frozen=True, kw_only=True)
class RecurrentTrial(ArmTrial):
    """One training run."""

    permuted: bool
    steps: int
    hidden: int
    batch: int
    pixels: int


Runs = Sequence[Run[RecurrentTrial]]

PROFILES = {
    "quick": RecurrentSettings(
        seeds=4, tuning_seeds=1, rates=(0.3, 1.0), steps=250, permuted=(False,)
    ),
    "full": RecurrentSettings(
        seeds=8, tuning_seeds=2, rates=(0.1, 0.3, 1.0, 3.0), steps=1000, permuted=(False, True)
    ),
}


class Reader(nn.Module):
    """Reads a few pixels at a time; the last state is classified."""

    def __init__(self, trial: RecurrentTrial, features: int, classes: int) -> None:
        super().__init__()
        steps = -(-features // trial.pixels)
        normalize = () if trial.arm == PLAIN else ("input", "hidden", "cell")
        self.lstm = BatchNormLSTM(
            trial.pixels,
            trial.hidden,
            # One set of statistics for all steps is that of the first, and of all after it.
            max_length=1 if trial.arm == POOLED else steps,
            normalize=normalize,
            gamma=1.0 if trial.arm == ONE else 0.1,
        )
        self.head = nn.Linear(trial.hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From (L, N, pixels)."""
        _, (h, _) = self.lstm(x.transpose(0, 1))
        y: Tensor = self.head(h[0])
        return y


def run(trial: RecurrentTrial, data: Dataset) -> Run[RecurrentTrial]:
    """Train with momentum and a rate that ends at zero; the test accuracy at the end."""
    x, y, x_test, y_test = training.tensors(data)
    if trial.permuted:
        order = torch.Generator().manual_seed(PERMUTATION_OFFSET + trial.seed)
        columns = torch.randperm(x.shape[1], generator=order)
        x, x_test = x[:, columns], x_test[:, columns]
    lost = -x.shape[1] % trial.pixels
    x, x_test = (nn.functional.pad(rows, (0, lost)) for rows in (x, x_test))
    x, x_test = (rows.view(len(rows), -1, trial.pixels) for rows in (x, x_test))
    with torch.random.fork_rng():  # torch's own initialization draws from the global generator
        torch.manual_seed(trial.seed)
        net = Reader(trial, x.shape[1] * trial.pixels, data.classes)
    training.fit(net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed)
    return Run(trial, {"accuracy": training.accuracy(net, x_test, y_test)}, {})


def _arms(settings: RecurrentSettings) -> list[tuple[bool, str]]:
    return [(permuted, arm) for permuted in settings.permuted for arm in ARMS]


def plan(settings: RecurrentSettings, runs: Runs) -> list[RecurrentTrial]:
    """Tune every arm's learning rate by itself, in both orders of pixels."""
    sizes = {key: getattr(settings, key) for key in ("steps", "hidden", "batch", "pixels")}
    wanted = []
    for permuted in settings.permuted:
        wanted += tuning.plan(
            RecurrentTrial(stage="", seed=0, arm="", rate=0.0, permuted=permuted, **sizes),
            [r for r in runs if r.trial.permuted == permuted],
            arms=ARMS,
            corners=[{"rate": rate} for rate in settings.rates],
            tuning_seeds=settings.tuning_seeds,
            seeds=settings.seeds,
            score=lambda swept: -statistics.fmean(r.measured["accuracy"] for r in swept),
        )
    return wanted


def _accuracies(runs: Runs, arm: str, *, permuted: bool) -> list[float]:
    found = select(runs, stage=EVALUATION, arm=arm, permuted=permuted)
    return [r.measured["accuracy"] for r in found]


def analyse(settings: RecurrentSettings, runs: Runs) -> Findings:
    """Judge γ = 0.1 against the plain LSTM, against γ = 1, and against one set of statistics."""

    def better(other: str, *, permuted: bool) -> Verdict:
        return judge(
            _accuracies(runs, other, permuted=permuted),
            _accuracies(runs, SMALL, permuted=permuted),
            unit="of accuracy",
            higher_is_better=True,
            names=(other, SMALL),
        )

    rows = []
    for permuted, arm in _arms(settings):
        values = _accuracies(runs, arm, permuted=permuted)
        rate = select(runs, stage=EVALUATION, arm=arm, permuted=permuted)[0].trial.rate
        rows.append(
            (
                arm,
                "permuted" if permuted else "in order",
                f"{rate:g}",
                f"{statistics.fmean(values):.1%} ({min(values):.1%}–{max(values):.1%})",
            )
        )
    first = settings.permuted[0]
    mean = {arm: statistics.fmean(_accuracies(runs, arm, permuted=first)) for arm in ARMS}
    verdict = better(PLAIN, permuted=first)
    also = [
        Judged("γ = 0.1 is a better start than γ = 1.", better(ONE, permuted=first)),
        Judged(
            "Statistics of each step are better than one set for all.",
            better(POOLED, permuted=first),
        ),
    ]
    if True in settings.permuted and not first:
        also.append(
            Judged("With permuted pixels, too, it learns better.", better(PLAIN, permuted=True))
        )
    caveats = [
        caveat
        for permuted, arm in _arms(settings)
        if (
            caveat := tuning.edge(
                select(runs, stage=EVALUATION, arm=arm, permuted=permuted)[0].trial,
                settings.rates,
            )
        )
    ]
    return Findings(
        summary=(
            f"Reading digits {settings.pixels} pixels at a time, the plain LSTM got "
            f"{mean[PLAIN]:.1%} of the test rows right, with BN and γ = 0.1 {mean[SMALL]:.1%}, "
            f"with γ = 1 {mean[ONE]:.1%}, and with one set of running statistics for all steps "
            f"{mean[POOLED]:.1%}."
        ),
        verdict=verdict,
        table=Table(("network", "pixels", "rate", "accuracy (range)"), tuple(rows)),
        recipe=(
            f"An LSTM of {settings.hidden} units reads {settings.pixels} pixels a step; a linear "
            f"layer classifies its last state. SGD with momentum 0.9, batches of {settings.batch}, "
            f"{settings.steps} steps, the rate falling to zero by a cosine.",
            "BN normalizes input, hidden state and cell (Cooijmans et al.), with running "
            "statistics of each step; in the last arm all steps share one set.",
            f"Learning rates, tuned for each arm by itself: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}.",
        ),
        caveats=(*dict.fromkeys(caveats), *verdict.caveats()),
        not_shown=(
            "Long sequences: these have few steps, so that little can vanish or explode.",
            "Whether other normalizations, such as layer normalization, do as well.",
        ),
        also=tuple(also),
    )


def figures(settings: RecurrentSettings, runs: Runs) -> list[Picture]:
    """Draw every seed's accuracy, arm by arm."""
    from batchnorm.lab import plots

    pictures = []
    for permuted in settings.permuted:
        order = "permuted" if permuted else "in order"
        pictures.append(
            Picture(
                "permuted" if permuted else "ordered",
                f"Test accuracy, pixels {order}",
                f"A mark is one of {counted(settings.seeds, 'seed')}, a stroke their median; every "
                "arm at its own learning rate.",
                plots.strips(
                    {arm: _accuracies(runs, arm, permuted=permuted) for arm in ARMS},
                    xlabel="test accuracy",
                ),
            )
        )
    return pictures


EXPERIMENT = Experiment(
    name="recurrent",
    claim="Batch normalization with statistics of each step lets an LSTM learn better.",
    source="Cooijmans et al. 2016, “Recurrent batch normalization” (arXiv:1603.09025)",
    recipe=1,
    trial=RecurrentTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
