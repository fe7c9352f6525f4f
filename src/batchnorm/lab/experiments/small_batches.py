"""Small batches: the normalization's batch shrinks, the optimizer's stays."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from batchnorm import BatchNorm
from batchnorm.lab import networks, training, tuning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Findings, Judged, Picture, Run, Settings
from batchnorm.lab.tuning import ArmTrial
from batchnorm.lab.verdict import Verdict, judge_shares
from batchnorm.lab.words import bands, counted

NETWORKS = MLP, CNN = "MLP", "CNN"
NORMALIZED, GROUPED = "BatchNorm", "GroupNorm"

#: Channels in a group of GroupNorm. A fixed number of groups, 32 say, leaves one or two channels to
#: each in a CNN this narrow; and the MLP has no positions: one unit alone would be a constant.
GROUP_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class SmallBatchSettings(Settings):
    """Sizes of the normalization's batch; `batch` is the optimizer's, and the largest of them.

    32 is where the source's figure begins. The headline is 4: of a batch of 2, normalization leaves
    a unit of the MLP nothing but which of two rows had more, and that it fails is no news.
    """

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
    # The CNN takes five times as long as the MLP; 100 steps are what half a minute allows.
    "quick": SmallBatchSettings(
        seeds=4, tuning_seeds=1, sizes=(32, 4, 2), rates=(0.03, 0.1, 0.3, 1.0), steps=100
    ),
    "full": SmallBatchSettings(
        seeds=8,
        tuning_seeds=4,  # of two, three rates came out alike for the CNN in groups of 4
        sizes=(32, 16, 8, 4, 2),
        rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        steps=400,
    ),
}


def arm(network: str, size: int | None) -> str:
    """The name of an arm: BatchNorm over so many samples, or GroupNorm.

    >>> arm("CNN", 4), arm("MLP", None)
    ('CNN, BatchNorm over 4', 'MLP, GroupNorm')
    """
    return f"{network}, {GROUPED if size is None else f'{NORMALIZED} over {size}'}"


def _arms(settings: SmallBatchSettings) -> list[str]:
    return [arm(network, size) for network in NETWORKS for size in (*settings.sizes, None)]


def norm(name: str, batch: int) -> networks.Norm:
    """Return the normalization of the arm of that name, for an optimizer's batch of that size."""
    if name.endswith(GROUPED):
        return lambda channels: nn.GroupNorm(max(1, channels // GROUP_SIZE), channels)
    size = int(name.rpartition(" ")[2])
    return lambda channels: BatchNorm(channels, virtual_batch_size=None if size == batch else size)


def run(trial: SmallBatchTrial, data: Dataset) -> Run[SmallBatchTrial]:
    """Train with momentum and a rate that ends at zero; the test and training error at the end."""
    network = trial.arm.partition(",")[0]
    # The MLP asks for images, too: data that the CNN cannot have is refused at the first trial.
    x, y, x_test, y_test = training.tensors(tuning.data_for(trial, data), images=True)
    made, weights = norm(trial.arm, trial.batch), training.generator(trial.seed)
    net: nn.Module
    if network == MLP:
        x, x_test = x.flatten(1), x_test.flatten(1)
        net = networks.mlp([x.shape[1], *[trial.width] * trial.depth, data.classes], made, weights)
    else:
        net = networks.resnet(x.shape[1], data.classes, made, weights)
    training.fit(net, x, y, rate=trial.rate, steps=trial.steps, batch=trial.batch, seed=trial.seed)
    measured = {
        "error": 1 - training.accuracy(net, x_test, y_test),
        "training_error": 1 - training.accuracy(net, x, y),
    }
    return Run(trial, measured, {})


def plan(settings: SmallBatchSettings, runs: Runs) -> list[SmallBatchTrial]:
    """Tune every arm's learning rate by itself, for the least mean error."""
    sizes = {key: getattr(settings, key) for key in ("steps", "batch", "width", "depth")}
    return tuning.plan(
        SmallBatchTrial(stage="", seed=0, arm="", rate=0.0, **sizes),
        runs,
        arms=_arms(settings),
        corners=[{"rate": rate} for rate in settings.rates],
        tuning_seeds=settings.tuning_seeds,
        seeds=settings.seeds,
    )


def _errors(runs: Runs, network: str, size: int | None) -> list[float]:
    return tuning.measured(runs, "error", arm=arm(network, size))


def _slower(settings: SmallBatchSettings, runs: Runs) -> list[str]:
    """A caveat for each network that GroupNorm has fitted less well than the small batch has."""
    caveats = []
    for network in NETWORKS:
        group, small = (
            statistics.fmean(tuning.measured(runs, "training_error", arm=arm(network, size)))
            for size in (None, settings.headline)
        )
        if group > small:
            caveats.append(
                f"After {settings.steps} steps the {network} with GroupNorm still got {group:.1%} "
                f"of the training rows wrong, with BatchNorm over {settings.headline} "
                f"{small:.1%}: it may only be slower."
            )
    return caveats


def analyse(settings: SmallBatchSettings, runs: Runs) -> Findings:
    """Judge the small batch against the large one, and against GroupNorm, in both networks."""
    small, large = settings.headline, settings.batch

    def better(network: str, size: int, other: int | None) -> Verdict:
        return judge_shares(
            _errors(runs, network, size),
            _errors(runs, network, other),
            errors=True,
            names=(arm(network, size), arm(network, other)),
        )

    def mean(network: str, size: int | None) -> str:
        return f"{statistics.fmean(_errors(runs, network, size)):.1%}"

    verdict = better(MLP, small, large)
    return Findings(
        summary=(
            f"Normalized over {small} samples instead of {large}, the MLP got "
            f"{mean(MLP, small)} of the test rows wrong instead of {mean(MLP, large)}, the CNN "
            f"{mean(CNN, small)} instead of {mean(CNN, large)}. With GroupNorm, to which the batch "
            f"is nothing, it was {mean(MLP, None)} and {mean(CNN, None)}."
        ),
        verdict=verdict,
        table=tuning.table(runs, "error", "test error"),
        recipe=(
            f"An MLP of {settings.depth} hidden layers of {settings.width} ReLU units, and a small "
            "residual CNN: three blocks of two convolutions, of "
            f"{', '.join(map(str, networks.STAGES))} channels. SGD with momentum 0.9 on batches of "
            f"{settings.batch}, {settings.steps} steps, the rate falling to zero by a cosine.",
            f"The optimizer's batch is always {settings.batch}; within it, BatchNorm normalizes "
            "groups of samples by themselves (virtual_batch_size). So the gradient is averaged "
            "over as many rows in every arm, and only the normalization's batch shrinks.",
            f"The main claim is judged in the MLP, by {small} samples against {large}. The source "
            "has CNNs; the MLP was chosen after a pilot in which the CNN, whose channels pool over "
            "positions as well as samples, showed no effect. The same sizes are judged in the CNN, "
            "apart.",
            f"GroupNorm has {GROUP_SIZE} channels to a group. All arms of a network and a seed "
            "start from the same weights and see the same batches.",
            "Learning rates, tuned for each arm by itself for the least mean error: "
            f"{', '.join(f'{rate:g}' for rate in settings.rates)}, "
            f"{counted(settings.tuning_seeds, 'seed')} for each; the verdicts come from "
            f"{counted(settings.seeds, 'other seed')}. {tuning.HOW}",
        ),
        caveats=(
            *_slower(settings, runs),
            *tuning.edges(runs, settings.rates),
            *verdict.caveats(),
        ),
        not_shown=(
            "The sizes of the source's losses, which were measured with deep networks on ImageNet.",
            "What spares a CNN, if it is spared. Its channels pool over positions as well as "
            "samples, but those of the source's networks do, too.",
            "Batches that are small for the optimizer, too: here its noise is kept the same.",
            "What noisier running averages add: here they take in all of the optimizer's "
            f"{settings.batch} rows at each step, however these were normalized.",
        ),
        also=(
            Judged(
                "In a CNN, too, batch normalization gets worse when its batches are small.",
                better(CNN, small, large),
            ),
            *(
                Judged(
                    f"Where the batches are small, GroupNorm is better than BatchNorm in {one}.",
                    better(network, small, None),
                )
                for network, one in ((MLP, "an MLP"), (CNN, "a CNN"))
            ),
        ),
    )


def figures(settings: SmallBatchSettings, runs: Runs) -> list[Picture]:
    """Draw the error by batch size, in both networks."""
    from batchnorm.lab import plots

    sizes = sorted(settings.sizes)

    def rows(network: str, kind: str) -> plots.Rows:
        # GroupNorm is trained once: its line is level by construction.
        of = [_errors(runs, network, size if kind == NORMALIZED else None) for size in sizes]
        return list(zip(*of, strict=True))

    return [
        Picture(
            "error",
            "Test error by the size of the normalization's batch",
            "Smaller batches are on the left. See whether a network's BatchNorm line rises there, "
            "and where it leaves its GroupNorm line, which uses no batch and is level by "
            f"construction. {bands(settings.seeds)} Every arm has its own learning rate.",
            plots.panels(
                {
                    network: {kind: (sizes, rows(network, kind)) for kind in (GROUPED, NORMALIZED)}
                    for network in NETWORKS
                },
                xlabel="samples normalized together (log scale)",
                ylabel="test error (log scale)",
                yscale="log",
                marks=True,
            ),
        )
    ]


EXPERIMENT = Experiment(
    name="small-batches",
    claim="Batch normalization gets worse when its batches are small.",
    source="Wu & He 2018, “Group normalization” (arXiv:1803.08494)",
    recipe=3,
    trial=SmallBatchTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
