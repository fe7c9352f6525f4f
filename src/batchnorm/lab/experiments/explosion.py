"""Gradients explode with depth in normalized networks before training, at a predicted rate.

The theory is of infinitely wide networks whose batch has gone through many layers. How many, and
how wide, follows for networks without an activation from the theory itself. The batch's centred
Gram matrix, divided by its mean eigenvalue, becomes the identity: a
channel's values over the batch are a normal draw with the Gram matrix before the layer, divided by
its own length; of a small deviation from the identity that leaves (B - 1)/(B + 1). Hence

- a deviation takes about B/2 layers to fall to 1/e, and after 2·B layers 2% of it are left;
- as many channels as the width leave a variance of about 1/width in each entry at every layer,
  which adds up to B/(4·width) where as much fades as comes. The eigenvalues then vary by
  B/(2·√width) of their mean: 0.7 at B = 32 and width 512. Small needs a width far above B²/4.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm import BatchNorm
from batchnorm.errors import InputError
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
from batchnorm.lab.tuning import select
from batchnorm.lab.verdict import Verdict, judge, judge_within
from batchnorm.lab.words import counted

PLAIN, RELU, LINEAR = "ReLU, no BatchNorm", "ReLU", "linear"

#: How far from the theory a rate may be and count as the same. Without growth the rate is 1, which
#: must lie outside: for networks without an activation that is so in batches of up to 51.
TOLERANCE = 0.02

#: Layers at each end that are not measured in a ReLU network: on other seeds than those of the
#: verdict, the rate was 1.51 in the first ten layers and 1.46 to 1.47 after them.
RELU_MARGIN = 10

#: Growth below so many tolerances is said to be coarsely tested.
COARSE = 5

#: Layers of which a point in the figure of the settling is the mean.
BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class ExplosionSettings(Settings):
    """The sizes of batches, in networks with ReLU and without an activation; the width of each.

    The linear network with the last batch size is also tried at the other widths. `window`: over
    how many layers the growth is measured. A layer of the linear network with batches of 8 varies
    by 5% around the rate; the mean of 64 by 0.6%, a third of the tolerance.
    """

    batch: int = 128
    linear: tuple[int, ...] = (8, 32)
    width: int = 512
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    window: int = 64

    @property
    def networks(self) -> list[tuple[str, int]]:
        """Activation and batch size of each network."""
        return [(PLAIN, self.batch), (RELU, self.batch), *((LINEAR, b) for b in self.linear)]


@dataclass(frozen=True, kw_only=True)
class ExplosionTrial(Trial):
    """One network at initialization."""

    network: str
    batch: int
    width: int
    depth: int


Runs = Sequence[Run[ExplosionTrial]]

PROFILES = {
    "quick": ExplosionSettings(seeds=8),
    "full": ExplosionSettings(
        seeds=8, linear=(8, 16, 32), width=1024, widths=(128, 256, 512, 1024, 2048)
    ),
}


def predicted(network: str, batch: int) -> float:
    """Growth of the squared gradient norm a layer: π/(π - 1), or (B - 2)/(B - 3) without ReLU.

    >>> round(predicted("ReLU", 128), 3), predicted("linear", 8)
    (1.467, 1.2)
    >>> predicted("ReLU, no BatchNorm", 128)  # He's weights are made for that
    1.0
    """
    if network == PLAIN:
        return 1.0
    return math.pi / (math.pi - 1) if network == RELU else (batch - 2) / (batch - 3)


def margin(network: str, batch: int) -> int:
    """Layers at each end where the data or the cotangent still shows."""
    return 2 * batch if network == LINEAR else RELU_MARGIN


def run(trial: ExplosionTrial, data: Dataset) -> Run[ExplosionTrial]:
    """One backward pass from a random cotangent: ‖gradient by a layer's output‖², layer by layer.

    With and without normalization the weights are the same; for their scale, He's, a normalized
    network does not care.
    """
    generator = training.generator(trial.seed)
    x = torch.tensor(data.x_train).flatten(1)
    h: Tensor = x[training.draw(len(x), trial.batch, generator)]
    if trial.network == LINEAR and h.shape[1] < trial.batch - 1:
        raise InputError(
            f"{data.name}: expected at least {trial.batch - 1} features, so that {trial.batch} "
            f"rows can point in as many directions as the theory needs; got {h.shape[1]}. Use "
            "other data."
        )
    h.requires_grad_()
    outputs: list[Tensor] = []
    for fan_in, fan_out in itertools.pairwise([h.shape[1], *[trial.width] * trial.depth]):
        linear = networks.dense(fan_in, fan_out, generator, bias=False).requires_grad_(False)
        h = linear(h)
        if trial.network == PLAIN:
            h = h.relu()
        else:
            h = BatchNorm(fan_out, activation="relu" if trial.network == RELU else None)(h)
        outputs.append(h)
    cotangent = torch.randn(h.shape, generator=generator)
    gradients = torch.autograd.grad(h, outputs, cotangent)
    return Run(trial, {"squared_norms": [float(g.square().sum()) for g in gradients]}, {})


def rate(run: Run[ExplosionTrial]) -> float:
    """Growth a layer, toward the data, between the margins: a geometric mean.

    >>> trial = ExplosionTrial(stage="", seed=0, network=RELU, batch=9, width=9, depth=23)
    >>> rate(Run(trial, {"squared_norms": [*[0] * 10, 18, 6, 2, *[0] * 10]}, {}))
    3.0
    """
    norms = run.measured["squared_norms"]
    skipped = margin(run.trial.network, run.trial.batch)
    first, last = norms[skipped], norms[-1 - skipped]
    return float((first / last) ** (1 / (len(norms) - 2 * skipped - 1)))


def plan(settings: ExplosionSettings, _: Runs) -> list[ExplosionTrial]:
    """Every network, and the last one at every width, with every seed."""
    wanted = [(*network, settings.width) for network in settings.networks]
    wanted += [(*settings.networks[-1], width) for width in settings.widths]
    return [
        ExplosionTrial(
            stage="networks",
            seed=seed,
            network=network,
            batch=batch,
            width=width,
            depth=2 * margin(network, batch) + settings.window + 1,
        )
        for seed in range(settings.seeds)
        for network, batch, width in dict.fromkeys(wanted)
    ]


def rates(runs: Runs, network: str, batch: int, width: int) -> list[float]:
    """The rate of each seed."""
    return [rate(r) for r in select(runs, network=network, batch=batch, width=width)]


def errors(runs: Runs, network: str, batch: int, width: int) -> list[float]:
    """How far each seed's rate is from the theory's, of it."""
    return [abs(r / predicted(network, batch) - 1) for r in rates(runs, network, batch, width)]


def analyse(settings: ExplosionSettings, runs: Runs) -> Findings:
    """Judge the distance of each network's rate from the theory's against the tolerance."""
    batch, width, last = settings.batch, settings.width, settings.linear[-1]
    plain, grown = (rates(runs, network, batch, width) for network in (PLAIN, RELU))
    narrow, wide = min(settings.widths), max(settings.widths)

    def near(network: str, batch: int) -> Verdict:
        return judge_within(TOLERANCE, errors(runs, network, batch, width), unit="relative error")

    verdict = near(RELU, batch)
    because = judge(
        plain, grown, unit="of growth a layer", higher_is_better=True, names=("plain", "BatchNorm")
    )
    nearer = judge(
        errors(runs, LINEAR, last, narrow),
        errors(runs, LINEAR, last, wide),
        unit="relative error",
        names=(f"width {narrow}", f"width {wide}"),
    )
    shares = {
        b: (statistics.fmean(rates(runs, LINEAR, b, width)) - 1) / (predicted(LINEAR, b) - 1)
        for b in settings.linear
    }
    tried = [(*network, width) for network in settings.networks]
    tried += [(LINEAR, last, other) for other in settings.widths if other != width]
    rows = [
        (
            network,
            str(batch),
            str(width),
            f"{predicted(network, batch):.3f}",
            f"{statistics.fmean(found):.3f} ({min(found):.3f}–{max(found):.3f})",
        )
        for network, batch, width in tried
        for found in [rates(runs, network, batch, width)]
    ]
    growth = statistics.fmean(grown)
    return Findings(
        summary=(
            "With batch normalization the squared gradient of a ReLU network grew by a factor of "
            f"{growth:.3f} a layer on its way back, where the theory says "
            f"{predicted(RELU, batch):.3f}. Through {settings.window} layers that is a factor of "
            f"{growth**settings.window:.0e}. With the same weights and no normalization "
            f"it grew by {statistics.fmean(plain):.3f} a layer."
        ),
        verdict=verdict,
        table=Table(("network", "batch", "width", "theory", "measured (range)"), tuple(rows)),
        recipe=(
            "Fully connected layers without biases, each followed by BatchNorm and, or not, ReLU. "
            "Weights are He's normal draws; nothing is trained.",
            "A batch of the data goes forward, and a random normal cotangent at the output back, "
            "once. The rate is the geometric mean, over "
            f"{counted(settings.window, 'layer')}, of the growth of ‖gradient by the layer's "
            "output‖².",
            "The layers at either end, where data and cotangent still show, are not measured: "
            f"{RELU_MARGIN} with ReLU; twice the batch size without an activation, where by the "
            "same theory differences in the batch fade by (B - 1)/(B + 1) a layer.",
            f"A rate counts as the predicted one within {TOLERANCE:.0%}; a seed goes the claim's "
            "way if it is closer than that.",
        ),
        caveats=(
            *(
                f"In batches of {b} the linear network's predicted growth is "
                f"{predicted(LINEAR, b) - 1:.1%} a layer, and beside it a tolerance of "
                f"{TOLERANCE:.0%} is coarse: what was measured is {share:.0%} of that growth."
                for b, share in shares.items()
                if predicted(LINEAR, b) - 1 < COARSE * TOLERANCE
            ),
            *verdict.caveats(),
        ),
        not_shown=(
            "What happens in training: the gradient of a network that has learned is another one, "
            "and residual connections change it, too.",
            "That the explosion does harm. Normalized layers do not care for the scale of their "
            "weights, so a large gradient is in part a large step of no consequence.",
            "That a network of usual size has exactly the predicted rates. They are limits, of "
            "infinite width and, with ReLU, of large batches.",
        ),
        also=(
            Judged(
                "Batch normalization is the cause: with the same weights and without it the "
                "gradient grows less.",
                because,
            ),
            *(
                Judged(
                    "Without an activation the gradient grows by (B - 2)/(B - 3) a layer: "
                    f"{predicted(LINEAR, b):.3f} in batches of {b}.",
                    near(LINEAR, b),
                )
                for b in settings.linear
            ),
            Judged(
                "The predicted rate is the limit of wide networks: without an activation, in "
                f"batches of {last}, that of width {wide} is nearer to it than that of {narrow}.",
                nearer,
            ),
        ),
    )


def figures(settings: ExplosionSettings, runs: Runs) -> list[Picture]:
    """Draw the squared norm by layer beside the theory, the growth by layer, and by width."""
    from batchnorm.lab import plots

    norms = {
        (network, batch): [
            r.measured["squared_norms"][::-1]
            for r in select(runs, network=network, batch=batch, width=settings.width)
        ]
        for network, batch in settings.networks[:3] + settings.networks[-1:]
    }
    names = {of: f"{of[0]}, {of[1]}" for of in norms}
    # As far back as the shallowest network goes.
    shown = range(min(len(rows[0]) for rows in norms.values()))
    settling = {
        names[of]: (
            [start + BLOCK / 2 for start in range(0, len(rows[0]) - BLOCK, BLOCK)],
            [
                [
                    (row[start + BLOCK] / row[start]) ** (1 / BLOCK) / predicted(*of)
                    for start in range(0, len(row) - BLOCK, BLOCK)
                ]
                for row in rows
            ],
        )
        for of, rows in norms.items()
        if of[0] != PLAIN
    }
    last = settings.linear[-1]
    by_width = [rates(runs, LINEAR, last, width) for width in settings.widths]
    bands = (
        f"Lines: median of {counted(settings.seeds, 'seed')}; bands: lowest to highest seed. The "
        "number after the activation is the batch size."
    )
    return [
        Picture(
            "gradient",
            "Squared gradient on its way back, before any training",
            "Left is the output, where each line begins at 1. A straight line is growth by the "
            "same factor at every layer; the thin black ones are what the theory predicts. "
            f"{bands}",
            plots.curves(
                {
                    names[of]: (shown, [[row[i] / row[0] for i in shown] for row in rows])
                    for of, rows in norms.items()
                },
                xlabel="layers back from the output",
                ylabel="squared norm of the gradient,\nrelative to the last layer's",
                xscale="linear",
                yscale="log",
                share=False,
                lines={names[of]: [predicted(*of) ** i for i in shown] for of in norms},
            ),
        ),
        Picture(
            "settling",
            "Growth against the theory by place in the network",
            f"1 is the predicted growth; a point is the mean over {counted(BLOCK, 'layer')}. See "
            "the ends, where cotangent and data still show, the longer the larger the batch: "
            f"{RELU_MARGIN} layers with ReLU and twice the batch size without are not measured. "
            f"{bands}",
            plots.curves(
                settling,
                xlabel="layers back from the output",
                ylabel="growth a layer / predicted growth",
                xscale="linear",
                share=False,
                level=1,
                like=list(names.values()),
            ),
        ),
        Picture(
            "width",
            "Growth by width, without an activation",
            "See whether the line nears the dotted one, the theory's, as the network gets wider. "
            f"{bands}",
            plots.curves(
                {f"{LINEAR}, {last}": (settings.widths, list(zip(*by_width, strict=True)))},
                xlabel="width",
                ylabel="growth a layer",
                share=False,
                marks=True,
                like=list(names.values()),
                level=predicted(LINEAR, last),
                level_label="theory",
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="explosion",
    claim="Before training, gradients in a batch-normalized ReLU network grow by π/(π - 1) = 1.467 "
    "a layer.",
    source="Yang et al. 2019, “A mean field theory of batch normalization” (arXiv:1902.08129)",
    recipe=2,
    trial=ExplosionTrial,
    profiles=PROFILES,
    plan=plan,
    run=run,
    analyse=analyse,
    figures=figures,
)
