"""What a gap between training and evaluation costs: accuracy lost, beside what `diagnose` measures.

    python benchmarks/gap.py [--json FILE]        about six minutes

Small networks are trained on scikit-learn's digits in many ways, from careful to reckless, and left
with the running statistics that they have. `diagnose` gives the gap and what exact statistics would
leave of it; test accuracy is taken in evaluation, and again after `recalibrate`. The thresholds of
`batchnorm.tools.diagnosis.whole` come from here.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm import diagnose, recalibrate
from batchnorm.bench.environment import environment
from batchnorm.lab.data import load

SEEDS = (0, 1)
SIZES = (16, 64, 128)

#: Optimizer, learning rate, epochs, whether the rate ends at zero (by a cosine).
WAYS = (
    ("SGD", 0.05, 5, False),
    ("SGD", 0.2, 5, False),
    ("SGD", 1.0, 4, False),
    ("SGD", 3.0, 4, False),
    ("Adam", 0.003, 5, False),
    ("Adam", 0.03, 4, False),
    ("Adam", 0.1, 4, False),
    ("SGD", 0.2, 12, True),
    ("SGD", 1.0, 12, True),
    ("Adam", 0.003, 12, True),
)

#: Of the excess √(gap² − recalibrated²): see the page that `page` writes.
BANDS = (0.0, 0.1, 0.25, 0.35, 0.7, math.inf)

#: A loss of accuracy that anyone would notice.
NOTICED = 0.03


def conv(fan_in: int, fan_out: int) -> list[nn.Module]:
    """A convolution and its normalization."""
    return [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out)]


class Block(nn.Module):
    """A residual block of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(*conv(16, 16), nn.ReLU(), *conv(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of x and the branch."""
        return (x + self.branch(x)).relu()


def cnn() -> nn.Module:
    """Three convolutions."""
    pool, head = nn.MaxPool2d(2), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    body = [*conv(1, 16), nn.ReLU(), *conv(16, 32), nn.ReLU(), pool, *conv(32, 32), nn.ReLU()]
    return nn.Sequential(*body, *head)


def residual() -> nn.Module:
    """Three blocks after a convolution."""
    body = [*conv(1, 16), nn.ReLU(), Block(), Block(), Block(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """Two hidden layers."""
    body = [nn.Flatten(), nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    body += [nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(64, 10))


NETWORKS = {"CNN": cnn, "residual": residual, "MLP": mlp}


def train(model: nn.Module, x: Tensor, y: Tensor, way: tuple[Any, ...], size: int) -> list[Tensor]:
    """Train, and return the batches of one more epoch."""
    kind, rate, epochs, cosine = way
    optimizer = getattr(torch.optim, kind)(model.parameters(), rate)
    per_epoch = len(x) // size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: per_epoch * size].split(size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            if cosine:
                schedule.step()
    return [x[rows] for rows in torch.randperm(len(x))[: per_epoch * size].split(size)]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In evaluation."""
    with torch.no_grad():
        return float((copy.deepcopy(model).eval()(x).argmax(1) == y).float().mean())


def measure() -> list[dict[str, Any]]:
    """One row for each training."""
    data = load("digits")
    x, y = torch.tensor(data.x_train)[:, None], torch.tensor(data.y_train)
    x_test, y_test = torch.tensor(data.x_test)[:, None], torch.tensor(data.y_test)
    rows = []
    for (name, make), size, way, seed in itertools.product(NETWORKS.items(), SIZES, WAYS, SEEDS):
        torch.manual_seed(seed)
        model = make()
        batches = train(model, x, y, way, size)
        diagnosis = diagnose(model, batches)
        gap, before = diagnosis.gap, accuracy(model, x_test, y_test)
        recalibrate(model, batches)
        after = accuracy(model, x_test, y_test)
        rows.append(
            {
                "network": name,
                "batch": size,
                "optimizer": way[0],
                "rate": way[1],
                "epochs": way[2],
                "cosine": way[3],
                "seed": seed,
                "gap": gap.value,
                "gap_error": gap.error,
                "recalibrated": gap.recalibrated,
                "excess": math.sqrt(max(0.0, gap.value**2 - gap.recalibrated**2)),
                "accuracy": before,
                "accuracy_recalibrated": after,
                "codes": sorted({finding.code for finding in diagnosis.findings}),
            }
        )
    return rows


def page(content: dict[str, Any]) -> str:
    """Markdown."""
    rows, where = content["rows"], content["environment"]
    lines = [
        "# What a gap between training and evaluation costs",
        "",
        f"Made by `python benchmarks/gap.py`, {where['date']}: batchnorm {where['batchnorm']} "
        f"({where['commit']}), torch {where['torch']}, {where['cpu']}, seeds "
        f"{', '.join(map(str, SEEDS))}.",
        "",
        f"{len(rows)} trainings on digits: {', '.join(NETWORKS)}; batches of "
        f"{', '.join(map(str, SIZES))}; {len(WAYS)} ways, some of them reckless. *Excess* is "
        "√(gap² − recalibrated²), what exact running statistics take off the gap; *lost*, how many "
        "points of test accuracy `recalibrate` brings back.",
        "",
        f"| excess | trainings | lost: median (lowest to highest) | lost {NOTICED:.0%} or more | "
        "with a finding BN101 |",
        "|---|---:|---:|---:|---:|",
    ]
    for low, high in itertools.pairwise(BANDS):
        band = [row for row in rows if low <= row["excess"] < high]
        lost = [row["accuracy_recalibrated"] - row["accuracy"] for row in band]
        points = [100 * value for value in lost] or [math.nan]
        lines.append(
            f"| {low:g} to {high:g} | {len(band)} | {statistics.median(points):.1f} "
            f"({min(points):.1f} to {max(points):.1f}) | "
            f"{sum(value >= NOTICED for value in lost)} | "
            f"{sum('BN101' in row['codes'] for row in band)} |"
        )
    ending = [row["excess"] for row in rows if row["cosine"]]
    left = {
        size: statistics.median(row["recalibrated"] for row in rows if row["batch"] == size)
        for size in SIZES
    }
    lines += [
        "",
        f"Where the learning rate ends at zero, the excess is at most {max(ending):.2f}. With "
        "exact statistics the gap is still "
        + ", ".join(f"{value:.2f} with batches of {size}" for size, value in left.items())
        + " (medians): what training's own noise makes of it.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the page, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write; the page goes beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = {"environment": environment("cpu", min(SEEDS)), "rows": measure()}
    text = page(content)
    sys.stdout.write(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
