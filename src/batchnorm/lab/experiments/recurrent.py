"""Batch normalization in an LSTM: statistics of each step, γ = 0.1."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm import BatchNormLSTM, recalibrate
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
from batchnorm.lab.verdict import Verdict, judge, judge_shares
from batchnorm.lab.words import counted
from batchnorm.layers.recurrent import PARTS

PLAIN, SMALL, ONE = ARMS = ("plain", "γ = 0.1", "γ = 1")

#: Not an arm: the same trained network as γ = 0.1, evaluated with common statistics.
POOLED = "γ = 0.1, pooled"

PERMUTED, ORDERED, ORTHOGONAL, LONGER = "permuted", "in order", "orthogonal start", "longer"


class Case(NamedTuple):
    """Are pixels permuted; do weights start as in the source; pixels a step; all that in words."""

    permuted: bool
    orthogonal: bool
    pixels: int
    words: str


# 4 pixels a step make digits sequences of 16.
CASES = {
    PERMUTED: Case(True, False, 4, "permuted pixels"),
    ORDERED: Case(False, False, 4, "pixels in order"),
    ORTHOGONAL: Case(True, True, 4, "permuted pixels and the source's initial weights"),
    LONGER: Case(True, False, 2, "permuted pixels, 2 a step"),
}

#: Added to a run's seed for what permutes the pixels: the same for all arms.
PERMUTATION_OFFSET = 3_000_000_000


@dataclass(frozen=True, kw_only=True)
class RecurrentSettings(Settings):
    """The network and its training; the first of the cases decides the claim."""

    tuning_seeds: int
    rates: tuple[float, ...]
    steps: int
    cases: tuple[str, ...]
    arms: tuple[str, ...] = ARMS
    # Steps between looks at the test accuracy.
    every: int = 20
    threshold: float = 0.8
    hidden: int = 32
    batch: int = 64
    # The source's; without it, the best learning rates lie near those that diverge.
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RecurrentTrial(ArmTrial):
    """One training run."""

    permuted: bool
    orthogonal: bool
    steps: int
    every: int
    hidden: int
    batch: int
    pixels: int
    clip: float


Runs = Sequence[Run[RecurrentTrial]]

PROFILES = {
    # The best rate is hard to tell from the next, and a wrong one costs more than BN gains: so each
    # has several seeds. The time that takes is γ = 1's.
    "quick": RecurrentSettings(
        seeds=8,
        tuning_seeds=3,
        rates=(0.1, 0.3, 1.0),
        steps=240,
        cases=(PERMUTED,),
        arms=(PLAIN, SMALL),
    ),
    "full": RecurrentSettings(
        seeds=8,
        tuning_seeds=4,
        rates=(0.03, 0.1, 0.3, 1.0, 3.0),
        steps=280,
        cases=(PERMUTED, ORDERED, ORTHOGONAL, LONGER),
    ),
}


class Reader(nn.Module):
    """Reads a few pixels at a time; the last state is classified."""

    def __init__(
        self, trial: RecurrentTrial, length: int, classes: int, *, pooled: bool = False
    ) -> None:
        super().__init__()
        self.lstm = BatchNormLSTM(
            trial.pixels,
            trial.hidden,
            max_length=1 if pooled else length,
            normalize=() if trial.arm == PLAIN else PARTS,
            gamma=1.0 if trial.arm == ONE else 0.1,
        )
        self.head = nn.Linear(trial.hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From (N, L, pixels)."""
        _, (h, _) = self.lstm(x.transpose(0, 1))
        y: Tensor = self.head(h[0])
        return y


@torch.no_grad()
def start_orthogonal(lstm: BatchNormLSTM) -> None:
    """Start as the source's code does, in all arms.

    Input weights are orthogonal; hidden ones orthogonal over the three gates, and the identity for
    the candidate; biases are zero, and one for the forget gate.
    """
    size = lstm.hidden_size
    nn.init.orthogonal_(lstm.weight_ih_l0)  # type: ignore[arg-type]
    gates = nn.init.orthogonal_(torch.empty(3 * size, size))
    parts = gates[: 2 * size], torch.eye(size), gates[2 * size :]  # i and f, g, o
    lstm.weight_hh_l0.copy_(torch.cat(parts))  # type: ignore[operator]
    biases = [p for name, p in lstm.named_parameters() if "bias" in name and len(p) == 4 * size]
    for bias in biases:
        bias.zero_()
    biases[0][size : 2 * size] = 1


def sequences(trial: RecurrentTrial, rows: Tensor) -> Tensor:
    """Rows as (N, L, pixels), permuted by the seed if the trial says so; zeros fill the last step.

    All rows of a seed are permuted alike.
    """
    if trial.permuted:
        order = training.generator(PERMUTATION_OFFSET + trial.seed)
        rows = rows[:, torch.randperm(rows.shape[1], generator=order)]
    rows = nn.functional.pad(rows, (0, -rows.shape[1] % trial.pixels))
    return rows.view(len(rows), -1, trial.pixels)


def run(trial: RecurrentTrial, data: Dataset) -> Run[RecurrentTrial]:
    """Train; the test accuracy with the training set's statistics of each step.

    In the evaluation also as training goes on, and at its end with statistics of all steps pooled,
    and how far each step is from these.
    """
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data))
    x, x_test = sequences(trial, x), sequences(trial, x_test)
    length = x.shape[1]
    with torch.random.fork_rng():  # torch's own initialization draws from the global generator
        torch.manual_seed(trial.seed)
        net = Reader(trial, length, data.classes)
        if trial.orthogonal:
            start_orthogonal(net.lstm)
        common = Reader(trial, length, data.classes, pooled=True)

    def accuracy(of: Reader) -> float:
        if trial.arm != PLAIN:
            # In training batches have their own statistics, so that this changes nothing there.
            recalibrate(of, training.chunks(x))
        return training.accuracy(of, x_test, y_test)

    looks: dict[str, list[Any]] = {"step": [], "accuracies": []}

    def look(step: int) -> None:
        if step % trial.every == 0:
            looks["step"].append(step)
            looks["accuracies"].append(accuracy(net))

    evaluation = trial.stage == EVALUATION
    training.fit(
        net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed,
        clip=trial.clip, after=look if evaluation else None,
    )  # fmt: skip
    measured: dict[str, Any] = {"accuracy": accuracy(net)}
    if evaluation:
        measured |= looks
        if trial.arm == SMALL:
            with torch.no_grad():
                for parameter, own in zip(common.parameters(), net.parameters(), strict=True):
                    parameter.copy_(own)
            measured |= {"pooled": accuracy(common), "spread": spread(net, common, length)}
    return Run(trial, measured, {})


def spread(net: Reader, common: Reader, length: int) -> dict[str, list[float]]:
    """The standard deviation of each step over that of all steps pooled, by what is normalized.

    Both are root mean squares over the channels.
    """
    found = {}
    for part in PARTS:
        norm, pooled = (of.lstm.norms[0][part] for of in (net, common))  # type: ignore[index]
        steps = [norm.banks[f"step{step}"].running_var for step in range(length - 1)]
        steps.append(norm.running_var)
        found[part] = [float((var.mean() / pooled.running_var.mean()).sqrt()) for var in steps]
    return found


def plan(settings: RecurrentSettings, runs: Runs) -> list[RecurrentTrial]:
    """Tune every arm's learning rate by itself, in every case."""
    names = ("steps", "every", "hidden", "batch", "clip")
    shared = {key: getattr(settings, key) for key in names}
    wanted = []
    for case in settings.cases:
        wanted += tuning.plan(
            RecurrentTrial(stage="", seed=0, arm="", rate=0.0, **_fields(case), **shared),
            _of(runs, case),
            arms=settings.arms,
            corners=[{"rate": rate} for rate in settings.rates],
            tuning_seeds=settings.tuning_seeds,
            seeds=settings.seeds,
            score=lambda swept: -statistics.fmean(r.measured["accuracy"] for r in swept),
        )  # fmt: skip
    return wanted


def _fields(case: str) -> dict[str, Any]:
    return {key: value for key, value in CASES[case]._asdict().items() if key != "words"}


def _of(runs: Runs, case: str) -> Runs:
    return select(runs, **_fields(case))


def _accuracies(runs: Runs, case: str, name: str) -> list[float]:
    if name == POOLED:
        return tuning.measured(_of(runs, case), "pooled", arm=SMALL)
    return tuning.measured(_of(runs, case), "accuracy", arm=name)


def steps_to(threshold: float, run: Run[RecurrentTrial]) -> int | None:
    """The first look at which the accuracy is there; None: never."""
    looks = zip(run.measured["step"], run.measured["accuracies"], strict=True)
    return next((step for step, accuracy in looks if accuracy >= threshold), None)


def analyse(settings: RecurrentSettings, runs: Runs) -> Findings:
    """Judge γ = 0.1 against the plain LSTM, against γ = 1, and against pooled statistics."""
    first, *others = settings.cases

    def better(other: str, case: str = first) -> Verdict:
        names = other, SMALL
        return judge_shares(*(_accuracies(runs, case, arm) for arm in names), names=names)

    def steps(arm: str) -> list[int | None]:
        found = select(_of(runs, first), stage=EVALUATION, arm=arm)
        return [steps_to(settings.threshold, r) for r in found]

    rows: list[tuple[str, ...]] = []
    caveats: list[str] = []
    for case in settings.cases:
        table = tuning.table(_of(runs, case), "accuracy", "test accuracy")
        columns = table.columns
        rows += [(case, *row) for row in table.rows]
        found = tuning.edges(_of(runs, case), settings.rates)
        caveats += [f"{CASES[case].words.capitalize()}: {caveat}" for caveat in found]
    mean = {
        (case, name): f"{statistics.fmean(_accuracies(runs, case, name)):.1%}"
        for case in settings.cases
        for name in (*settings.arms, POOLED)
    }
    verdict = better(PLAIN)
    level = f"{settings.threshold:.0%}"
    return Findings(
        summary=(
            f"Reading {CASES[first].pixels} pixels a step ({first}), the plain LSTM got "
            f"{mean[first, PLAIN]} of the test rows right, with BN and γ = 0.1 "
            f"{mean[first, SMALL]}. With the statistics of all steps pooled, instead of each "
            f"step's, the same network got {mean[first, POOLED]}."
            + (f" With γ = 1 it was {mean[first, ONE]}." if ONE in settings.arms else "")
            + "".join(
                f" With {CASES[case].words}: plain {mean[case, PLAIN]}, γ = 0.1 "
                f"{mean[case, SMALL]}."
                for case in others
            )
        ),
        verdict=verdict,
        table=Table(("case", *columns), tuple(rows)),
        recipe=(
            f"An LSTM of {settings.hidden} units reads {CASES[first].pixels} pixels a step "
            f"({CASES[first].words}); a linear layer classifies its last state. SGD with momentum "
            f"0.9 on batches of {settings.batch}, gradients cut to a norm of {settings.clip:g}, "
            f"{settings.steps} steps, the rate falling to zero by a cosine.",
            "BN normalizes the input's and the state's part of the gates, and the cell "
            "(BatchNormLSTM). Evaluation uses the training set's statistics of each step "
            "(recalibrate); pooled, the same weights are evaluated with those of all steps "
            "together.",
            "Weights start as torch draws them for an LSTM. The source's start, in all arms: "
            "orthogonal matrices, the identity from the state to the candidate, and a bias of 1 "
            "for the forget gate.",
            f"Learning rates, tuned for each arm by itself: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each. {tuning.HOW}",
        ),
        caveats=(*caveats, *verdict.caveats()),
        not_shown=(
            f"Long sequences: these have {len(spreads(runs, first)[PARTS[0]][0])} steps, the "
            "source's 784.",
            "Training with pooled statistics: in training, each step has its batch's own.",
        ),
        also=(
            *(
                [Judged("γ = 0.1 is a better start than γ = 1.", better(ONE))]
                if ONE in settings.arms
                else []
            ),
            Judged("Statistics of each step are better than those of all pooled.", better(POOLED)),
            Judged(
                f"With BN and γ = 0.1 it learns faster: fewer steps to {level}.",
                judge(
                    steps(PLAIN),
                    steps(SMALL),
                    unit="steps",
                    horizon=settings.steps,
                    names=(PLAIN, SMALL),
                ),
            ),
            *(
                Judged(f"It learns better with {CASES[case].words}, too.", better(PLAIN, case))
                for case in others
            ),
        ),
    )


def spreads(runs: Runs, case: str) -> dict[str, list[list[float]]]:
    """By what is normalized, a row a seed."""
    found = select(_of(runs, case), stage=EVALUATION, arm=SMALL)
    return {part: [r.measured["spread"][part] for r in found] for part in PARTS}


def figures(settings: RecurrentSettings, runs: Runs) -> list[Picture]:
    """Draw how accuracy grows, every seed's at the end, and how unlike the steps are."""
    from batchnorm.lab import plots

    first = settings.cases[0]
    seeds = counted(settings.seeds, "seed")
    bands = f"Lines: median of {seeds}; bands: lowest to highest seed."
    progress = []
    for case in settings.cases:
        found = {arm: select(_of(runs, case), stage=EVALUATION, arm=arm) for arm in settings.arms}
        progress.append(
            Picture(
                case.replace(" ", "-"),
                f"Test accuracy by training step: {case}",
                "See which line rises first, and which ends highest; each arm at its own learning "
                f"rate. {bands}",
                plots.curves(
                    {
                        arm: (of[0].measured["step"], [r.measured["accuracies"] for r in of])
                        for arm, of in found.items()
                    },
                    xlabel="training step",
                    ylabel="test accuracy",
                    xscale="linear",
                ),
            )
        )
    by_step = {
        part: (list(range(1, len(rows[0]) + 1)), rows)
        for part, rows in spreads(runs, first).items()
    }
    return [
        *progress,
        Picture(
            "seeds",
            f"Test accuracy of every seed: {first}",
            f"A mark is one of {seeds}, a stroke their median. The last line is the network with "
            "γ = 0.1 again, evaluated with the statistics of all time steps pooled.",
            plots.strips(
                {name: _accuracies(runs, first, name) for name in (*settings.arms, POOLED)},
                xlabel="test accuracy",
            ),
        ),
        Picture(
            "spread",
            "Standard deviation at each time step, over that of all pooled",
            "After training with γ = 0.1. Where a line is far from the dotted one, common "
            f"statistics normalize that step wrongly. {bands}",
            plots.curves(
                by_step,
                xlabel="time step",
                ylabel="standard deviation / pooled",
                level=1.0,
                xscale="linear",
                share=False,
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="recurrent",
    claim="Batch normalization with statistics of each step and γ = 0.1 lets an LSTM learn better.",
    source="Cooijmans et al. 2016, “Recurrent batch normalization” (arXiv:1603.09025)",
    recipe=3,
    trial=RecurrentTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
