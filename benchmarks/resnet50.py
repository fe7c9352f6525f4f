"""A training step of ResNet-50 with torch's batch norm and with ours, fused: time and memory.

    python benchmarks/resnet50.py --device cuda        about a minute; prints JSON, a line an event

Batches of 256 random images of 224 × 224, channels-last, bfloat16 by autocast, SGD with momentum:
what a user trains. torch's relu and addition are measured in place, as in torchvision's network,
and not. All networks start from the same parameters and see the same batch; they take turns in
every round. `make gpu` runs this, and its page has the result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm import BatchNorm
from batchnorm.bench import device, measure, worker
from batchnorm.bench.environment import environment
from batchnorm.bench.estimate import interval, ratios
from batchnorm.bench.peers import EAGER, OURS

SEED = 0

PLAIN = "torch eager, not in place"

#: Rounds of both networks, so that the interval leaves out the two fastest and the two slowest.
ROUNDS = 12

#: Seconds of a network in a round: a few steps.
LOOP_S = 0.3

#: Training steps whose losses are compared: all but the first follow from the gradients too.
STEPS = 6

#: Losses of two networks that differ in rounding only may differ by so much of their size: 8 steps
#: of bfloat16 (2⁻⁸), which carries what goes from layer to layer.
LOSS_BOUND = 8 * 2**-8

#: And after the first step, which multiplies what they differ by: in six steps of small networks on
#: the CPU they came as far apart as 3 %, while training brought the loss down by 16 %.
TRAINED_BOUND = 2 * LOSS_BOUND

#: Features are four times as many after a bottleneck as in it.
EXPANSION = 4

Norm = Callable[[int, bool], nn.Module]
"""norm(channels, relu): called as norm(x) or, before an addition, norm(x, residual)."""


class Plain(nn.Module):
    """torch's layer, and what follows it as one writes it."""

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return activation(BN(x) + residual)."""
        y = self.norm(x)
        if residual is not None:
            y = y + residual
        return functional.relu(y) if self.relu else y


class InPlace(Plain):
    """The same in the memory of the layer's output, which no gradient needs."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return activation(BN(x) + residual)."""
        y = self.norm(x)
        if residual is not None:
            y += residual
        return functional.relu(y, inplace=True) if self.relu else y


class Fused(nn.Module):
    """Our layer, which does that in one."""

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, activation="relu" if relu else None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return activation(BN(x) + residual)."""
        return self.norm(x, residual=residual)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions beside a short cut."""

    def __init__(self, norm: Norm, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.norm1 = norm(width, True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = norm(width, True)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = norm(out, True)
        self.short_cut: nn.Module = nn.Identity()
        if stride > 1 or inside != out:
            convolution = nn.Conv2d(inside, out, 1, stride, bias=False)
            self.short_cut = nn.Sequential(convolution, norm(out, False))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch(x) + short_cut(x))."""
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(inner), self.short_cut(x))


@dataclass(frozen=True)
class Size:
    """How large the network and its batches are."""

    batch: int = 256
    side: int = 224
    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    classes: int = 1000


#: As little as has every kind of layer.
REHEARSED = Size(batch=2, side=32, width=2, blocks=(1, 1), classes=3)


def resnet(norm: Norm, size: Size) -> nn.Module:
    """A ResNet with bottlenecks, the stride in their 3 × 3 convolution."""
    inside = size.width
    body: list[nn.Module] = [
        nn.Conv2d(3, inside, 7, 2, padding=3, bias=False),
        norm(inside, True),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    for stage, blocks in enumerate(size.blocks):
        width = size.width << stage
        for block in range(blocks):
            body.append(Bottleneck(norm, inside, width, 2 if stage and not block else 1))
            inside = EXPANSION * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, size.classes)]
    return nn.Sequential(*body, *head)


class Training:
    """A network, its optimizer and a batch."""

    def __init__(self, norm: Norm, size: Size, on: str) -> None:
        torch.manual_seed(SEED)  # the same parameters: they are drawn in the same order
        model = resnet(norm, size).to(on).to(memory_format=torch.channels_last)
        generator = torch.Generator(on).manual_seed(SEED)
        shape = size.batch, 3, size.side, size.side
        x = torch.randn(shape, generator=generator, device=on)
        self.x = x.to(memory_format=torch.channels_last)
        self.labels = torch.randint(size.classes, (size.batch,), generator=generator, device=on)
        self.model, self.on = model, on
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        with torch.autocast(self.on, torch.bfloat16):
            return functional.cross_entropy(self.model(self.x), self.labels)

    def step(self) -> Tensor:
        """Train on the batch once."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def peak(self) -> int:
        """Return how much more memory than now a step needs at its highest; 0 on the CPU."""
        if self.on != "cuda":
            return 0
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def alike(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether losses are within their bound at every step; NaN is not."""
    bounds = [LOSS_BOUND] + [TRAINED_BOUND] * (len(ours) - 1)
    steps = zip(ours, theirs, bounds, strict=True)
    return all(abs(a - b) <= bound * abs(b) for a, b, bound in steps)


def measured(size: Size, on: str, rounds: int) -> dict[str, Any]:
    """Return times, memory, and whether both compute the same."""
    norms: dict[str, Norm] = {OURS: Fused, EAGER: InPlace, PLAIN: Plain}
    trainings = {name: Training(norm, size, on) for name, norm in norms.items()}
    losses = {
        name: [float(training.step()) for _ in range(STEPS)] for name, training in trainings.items()
    }
    peaks = {name: training.peak() for name, training in trainings.items()}
    times = measure.rounds(
        {name: training.step for name, training in trainings.items()},
        rounds,
        seed=SEED,
        loop_s=LOOP_S,
        stopwatch=device.stopwatch(on),
    )
    of_rounds = ratios(times[EAGER].seconds, times[OURS].seconds)
    return {
        "batch": size.batch,
        "side": size.side,
        "ours_ms": times[OURS].us / 1e3,
        "eager_ms": times[EAGER].us / 1e3,
        "plain_ms": times[PLAIN].us / 1e3,
        "ratio": statistics.median(of_rounds),
        "interval": list(interval(of_rounds)),
        "ours_peak": peaks[OURS],
        "eager_peak": peaks[EAGER],
        "plain_peak": peaks[PLAIN],
        "losses": losses,
        "right": alike(losses[OURS], losses[EAGER]),
        "rounds": rounds,
    }


def main() -> None:
    """Measure, and write events as `batchnorm.bench.worker` does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="a tiny network, to see it work")
    given = parser.parse_args()
    if given.device == "cuda":
        torch.backends.cudnn.benchmark = True  # as one trains on images of one size
    size, rounds = (REHEARSED, 2) if given.rehearse else (Size(), ROUNDS)
    events = (
        {"event": "environment", **environment(given.device, SEED)},
        {"event": "resnet", **measured(size, given.device, rounds)},
    )
    for event in events:
        sys.stdout.write(worker.line(event))


if __name__ == "__main__":
    main()
