"""Test error of one network with running statistics from five sources.

    python benchmarks/recalibration.py [--json FILE]        about three minutes

A small convolutional network is trained on scikit-learn's digits at a learning rate so high that
its running averages lag behind its weights. Then its running statistics are replaced, and the test
error taken, by: nothing (the running average), torch's `update_bn`, the estimator of fvcore's
`precise_bn` in words of our own, `recalibrate`, and `recalibrate(method="layerwise")`. All get the
same training images in the same batches. Five ways to bring them are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from batchnorm import BatchNorm, Moments, recalibrate
from batchnorm.bench.environment import environment
from batchnorm.figures import INK, style
from batchnorm.lab import data, plots

SEEDS = range(12)
EPOCHS = 8
BATCH = 64
RATE = 0.1
WIDTH = 16
#: Of the convolutions: from 8 × 8 positions to 2 × 2.
STRIDES = (1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1)

#: In units of the images' standard deviation.
OFFSET = 10_000.0

#: Title, samples in a batch of recalibration, sorted by class, what is added to every pixel.
SETTINGS = (
    ("shuffled, batches of 64", 64, False, 0.0),
    ("shuffled, batches of 4", 4, False, 0.0),
    ("sorted by class, batches of 64", 64, True, 0.0),
    ("sorted by class, batches of 640, 640 and 13", 640, True, 0.0),
    ("all pixels 10 000 σ higher, batches of 64", 64, False, OFFSET),
)

Batches = list[Tensor]


def nothing(model: nn.Module, batches: Batches) -> None:
    """The running average of training stays."""


def precise(model: nn.Module, batches: Batches) -> None:
    """What fvcore's `precise_bn` estimates, restated.

    Each batch is normalised by itself. Its mean and the mean of its squares, (var + mean²), are
    averaged in float32 with the number of values as weights; the variance is what is left of the
    second when the square of the first is subtracted.
    """
    sums: dict[nn.Module, tuple[float, Tensor, Tensor]] = {}

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        n = x.numel() / x.shape[1]
        mean = x.mean((0, 2, 3))
        square = x.var((0, 2, 3), correction=0) + mean.square()
        total, old_mean, old_square = sums.get(layer, (0.0, mean, square))
        share = n / (total + n)
        sums[layer] = total + n, old_mean.lerp(mean, share), old_square.lerp(square, share)

    layers = norms(model)
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
        for layer in layers:
            _, mean, square = sums[layer]
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(square - mean.square())
    for hook in hooks:
        hook.remove()


def update(model: nn.Module, batches: Batches) -> None:
    """torch's."""
    update_bn(batches, model)


def ours(method: str) -> Callable[[nn.Module, Batches], object]:
    """`recalibrate`."""
    return lambda model, batches: recalibrate(model, batches, method=method)


ESTIMATORS: dict[str, Callable[[nn.Module, Batches], object]] = {
    "running average": nothing,
    "torch's update_bn": update,
    "fvcore's estimator": precise,
    'recalibrate, "batch"': ours("batch"),
    'recalibrate, "layerwise"': ours("layerwise"),
}


def norms(model: nn.Module) -> list[Any]:
    """The batch normalization layers."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def network() -> nn.Module:
    """Convolutions with batch normalization after each, and one on the images as they come."""
    parts: list[nn.Module] = [BatchNorm(1)]
    for index, stride in enumerate(STRIDES):
        parts += [
            nn.Conv2d(WIDTH if index else 1, WIDTH, 3, stride, 1, bias=False),
            BatchNorm(WIDTH, activation="relu"),
        ]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(4 * WIDTH, 10))


def train(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """A trained network, on shuffled batches of `BATCH`; the incomplete last one is dropped."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            if len(index) == BATCH:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
    return model


@torch.no_grad()
def test_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that evaluation takes for another digit; NaN answers are wrong."""
    scores = model.eval()(x)
    right = (scores.argmax(1) == y) & scores.isfinite().all(1)
    return 1 - right.double().mean().item()


@torch.no_grad()
def inconsistency(model: nn.Module, x: Tensor) -> float:
    """How far running variances are from those of what evaluation brings to the layers.

    The root mean square over layers and channels of the logarithm of their ratio; a variance that
    is not positive is infinitely far.
    """
    logs: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        var = Moments.of(inputs[0]).variance(1)
        logs.append((layer.running_var.double() / var).log())  # type: ignore[operator]

    hooks = [layer.register_forward_pre_hook(look) for layer in norms(model)]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    value = float(torch.cat(logs).square().mean().sqrt())
    return value if value == value else float("inf")


def measure() -> list[dict[str, Any]]:
    """A row for each setting, seed and estimator."""
    digits = data.load("digits")
    x_train, x_test = (torch.from_numpy(x).unsqueeze(1) for x in (digits.x_train, digits.x_test))
    y_train, y_test = torch.from_numpy(digits.y_train), torch.from_numpy(digits.y_test)
    rows = []
    for seed in SEEDS:
        models = {
            offset: train(seed, x_train + offset, y_train)
            for offset in sorted({offset for *_, offset in SETTINGS})
        }
        for title, size, by_class, offset in SETTINGS:
            order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed))
            if by_class:
                order = order[y_train[order].argsort(stable=True)]
            batches = list((x_train[order] + offset).split(size))
            if len(batches[-1]) == 1:
                batches.pop()
            for name, estimate in ESTIMATORS.items():
                model = copy.deepcopy(models[offset])
                estimate(model, batches)
                rows.append(
                    {
                        "setting": title,
                        "seed": seed,
                        "estimator": name,
                        "test_error": test_error(model, x_test + offset, y_test),
                        "inconsistency": inconsistency(model, torch.cat(batches)),
                    }
                )
    return rows


def of(rows: list[dict[str, Any]], title: str, name: str, what: str) -> list[float]:
    """What was found with every seed."""
    return [row[what] for row in rows if (row["setting"], row["estimator"]) == (title, name)]


#: Okabe and Ito's colours, each with a mark of its own.
LOOKS = (("#000000", "x"), ("#D55E00", "s"), ("#E69F00", "D"), ("#0072B2", "o"), ("#009E73", "^"))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Every network's test error as a mark, and the median as a stroke, of all on one axis."""
    figure = Figure((plots.WIDTH, 1.75 * len(SETTINGS) + 0.4))
    grid = figure.subplots(len(SETTINGS), 1, sharex=True)
    for axes, (title, *_) in zip(grid, SETTINGS, strict=True):
        for place, ((colour, mark), name) in enumerate(zip(LOOKS, ESTIMATORS, strict=True)):
            errors = [100 * error for error in of(rows, title, name, "test_error")]
            axes.plot(
                errors,
                [-place] * len(errors),
                mark,
                color=colour,
                markersize=5.5,
                markerfacecolor="none",
                clip_on=False,
            )
            middle = statistics.median(errors)
            axes.vlines(middle, -place - 0.36, -place + 0.36, color=INK, linewidth=2)
        axes.set_yticks([-place for place in range(len(ESTIMATORS))], list(ESTIMATORS))
        axes.set(title=title[0].upper() + title[1:], ylim=(-len(ESTIMATORS) + 0.4, 0.6))
        axes.grid(visible=False, axis="y")
    grid[-1].set(xscale="log", xlabel="test error, %")
    grid[-1].set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    grid[-1].xaxis.set_minor_locator(NullLocator())
    return figure


def page(content: dict[str, Any], figure: str) -> str:
    """The results as a page."""
    of_where, rows = content["environment"], content["rows"]
    words = [
        "# Where running statistics come from, and what it does to the test error\n",
        f"Made by `python benchmarks/recalibration.py`, {of_where['date']}: batchnorm "
        f"{of_where['batchnorm']} ({(of_where['commit'] or 'unknown')[:10]}), torch "
        f"{of_where['torch']}, {of_where['cpu']}, seeds {min(SEEDS)} to {max(SEEDS)}.\n",
        f"{len(SEEDS)} networks of {len(STRIDES)} convolutions, {WIDTH} channels, 8 × 8 "
        "positions at first and 2 × 2 at last, each trained on the "
        f"1 293 training digits for {EPOCHS} epochs in batches of {BATCH} (SGD, learning rate "
        f"{RATE}, momentum 0.9; BN momentum 0.1). Then the running statistics are replaced, from "
        "the same images; nothing else differs. 504 test images: one of them is 0.2 %.\n",
        f"![Test error by source of the running statistics]({figure})\n",
        "A mark is a network, a stroke the median.\n",
        "| training images for recalibration | statistics from | test error, median (lowest to "
        "highest) | networks worse, better than layerwise | inconsistency, median |",
        "|---|---|---:|---:|---:|",
    ]
    for title, *_ in SETTINGS:
        for name in ESTIMATORS:
            errors = of(rows, title, name, "test_error")
            best = of(rows, title, list(ESTIMATORS)[-1], "test_error")
            worse = sum(a > b for a, b in zip(errors, best, strict=True))
            better = sum(a < b for a, b in zip(errors, best, strict=True))
            off = statistics.median(of(rows, title, name, "inconsistency"))
            words.append(
                f"| {title} | {name} | {statistics.median(errors):.1%} ({min(errors):.1%} to "
                f"{max(errors):.1%}) | {worse}, {better} | {off:.1g} |"
            )
    words += [
        "\nInconsistency: "
        + (inconsistency.__doc__ or "").split("\n\n")[1].strip().replace("\n    ", " "),
        "\n`update_bn` and fvcore's estimator normalise by batches, as `recalibrate` does by "
        'default; "layerwise" by the new statistics. fvcore\'s estimator, restated here from its '
        "description: each batch's mean and mean of squares, averaged in float32 with the number "
        "of values as weights.",
    ]
    return "\n".join(words) + "\n"


def main() -> None:
    """Measure, print the page, and write all three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write; page and figure go beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are too small for two to be of use
    rows = measure()
    content = {"environment": environment("cpu", min(SEEDS)), "rows": rows}
    figure = (arguments.json or Path("recalibration.json")).with_suffix(".svg")
    text = page(content, figure.name)
    sys.stdout.write(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(text)
        with style():
            draw(rows).savefig(figure, metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main()
