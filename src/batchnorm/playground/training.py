"""What the playground trains: two networks that differ in nothing but batch normalization.

They begin with the same weights and see the same batches at the same steps. `train` yields what the
page shows, and touches nothing outside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm
from batchnorm.errors import ArgumentError
from batchnorm.lab import training
from batchnorm.lab.data import Dataset
from batchnorm.lab.networks import dense

PLAIN, NORMALIZED = ARMS = ("plain", "BatchNorm")

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "ReLU": nn.ReLU,
}

#: Variance of a layer's initial weights, by its fan-in and fan-out.
INITS: Mapping[str, Callable[[int, int], float]] = {
    "Xavier": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "He": lambda fan_in, _: 2 / fan_in,
    "0.01": lambda *_: 0.01**2,
    "1": lambda *_: 1.0,
}

#: Steps from one snapshot to the next: an average over so many batches is a curve, not noise.
EVERY = 5

#: What is counted of the inputs of the activation functions lies within ±SPAN, what is beyond it in
#: the outermost bins. Normalized values hardly ever leave it, and beyond it a sigmoid is flat.
SPAN, BINS = 5.0, 50


@dataclass(frozen=True)
class Range:
    """From what number to what, whole or real."""

    low: float
    high: float
    whole: bool = True

    def __contains__(self, value: object) -> bool:
        """Whether this is such a number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        # Says no to NaN, too.
        return self.low <= value <= self.high and (not self.whole or value == int(value))


#: At most about a minute's work. One layer has no middle to look at, but is a fair comparison. A
#: batch of one has no variance.
RANGES = {
    "depth": Range(1, 20),
    "width": Range(8, 256),
    "rate": Range(0.0001, 100, whole=False),
    "batch": Range(2, 512),
    "steps": Range(EVERY, 5000),
    "seed": Range(0, 9999),
}
CHOICES = {"activation": ACTIVATIONS, "init": INITS}


class SettingError(ArgumentError):
    """A setting is none that can be trained with.

    Attributes:
        name: the setting's.
        value: what came.
    """

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value
        if name in CHOICES:
            expected = f"one of {', '.join(CHOICES[name])}"
        else:
            limits = RANGES[name]
            kind = "a whole number" if limits.whole else "a number"
            expected = f"{kind} from {limits.low:g} to {limits.high:g}"
        super().__init__(f"{name}: expected {expected}, got {value!r}; choose another")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run.

    >>> Settings(depth=3).depth
    3

    Args:
        depth: hidden layers.
        width: units in each.
        activation: after each hidden layer: a key of `ACTIVATIONS`.
        rate: learning rate, of plain SGD.
        batch: rows in each batch.
        init: of all weights: a key of `INITS`.
        steps: how many.
        seed: of the weights and the order of rows.

    Raises:
        SettingError: One of them is impossible.
    """

    depth: int = 6
    width: int = 64
    activation: str = "sigmoid"
    rate: float = 0.5
    batch: int = 64
    init: str = "Xavier"
    steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            possible = RANGES.get(field.name) or tuple(CHOICES[field.name])
            if value not in possible:
                raise SettingError(field.name, value)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings that a form holds, where numbers may be text.

        >>> Settings.read({"depth": 3.0, "rate": " 1e-2 "})
        Settings(depth=3, ..., rate=0.01, ...)

        Raises:
            SettingError: As for `Settings`.
        """
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name in CHOICES:
                found[name] = value
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise SettingError(name, value) from None
            if number not in RANGES[name]:
                raise SettingError(name, value)
            found[name] = int(number) if RANGES[name].whole else number
        return cls(**found)


class Network(nn.Module):
    """A multilayer perceptron that keeps what its activation functions were given last.

    Attributes:
        inputs: those of the last pass, without a graph, one tensor a hidden layer.
    """

    def __init__(self, settings: Settings, features: int, classes: int, normalized: bool) -> None:
        super().__init__()
        weights = training.generator(settings.seed)
        variance = INITS[settings.init]
        sizes = [features, *[settings.width] * settings.depth, classes]
        self.linear = nn.ModuleList(
            dense(
                fan_in,
                fan_out,
                weights,
                gain=variance(fan_in, fan_out) * fan_in,
                # β does a bias's work; the head has no β.
                bias=not normalized or place == settings.depth,
            )
            for place, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes))
        )
        self.norms = nn.ModuleList(
            BatchNorm(settings.width) if normalized else nn.Identity()
            for _ in range(settings.depth)
        )
        self.activation = ACTIVATIONS[settings.activation]()
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        self.inputs = []
        *hidden, head = self.linear
        for linear, norm in zip(hidden, self.norms, strict=True):
            x = norm(linear(x))
            self.inputs.append(x.detach())
            x = self.activation(x)
        y: Tensor = head(x)
        return y


@dataclass(frozen=True)
class Histogram:
    """What one layer's activation functions were given in a batch: spread and counts."""

    std: float
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor) -> Histogram:
        """Count finite values."""
        inside = values.clamp(-SPAN, SPAN)
        counts = torch.histc(inside, BINS, -SPAN, SPAN)
        return cls(float(values.std(correction=0)), tuple(int(count) for count in counts))


@dataclass(frozen=True)
class Look:
    """One network at one moment.

    Attributes:
        loss: mean over the batches since the look before.
        accuracy: on the test rows.
        gradients: norm of the loss's gradient by each layer's weights, in the last batch.
        histograms: of each hidden layer, in the last batch.
        diverged: the step whose loss or gradient was no finite number; it was not taken, and the
            rest is how the network was before.
    """

    loss: float
    accuracy: float
    gradients: tuple[float, ...]
    histograms: tuple[Histogram, ...]
    diverged: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """Both networks after so many steps, by arm."""

    step: int
    looks: Mapping[str, Look]


class _Arm:
    """One network in training."""

    def __init__(self, settings: Settings, data: Dataset, normalized: bool) -> None:
        self.x, self.y, self.x_test, self.y_test = training.tensors(data)
        self.net = Network(settings, self.x.shape[1], data.classes, normalized)
        self.rate = settings.rate
        self.losses: list[float] = []
        self.ahead: list[tuple[Tensor, Tensor]] = []
        self.look = Look(math.nan, math.nan, (), ())

    def learn(self, step: int, rows: Tensor) -> None:
        """Find the gradients of a batch, unless they lead nowhere."""
        loss = cross_entropy(self.net(self.x[rows]), self.y[rows])
        parameters = list(self.net.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        norms = torch.stack([loss.detach(), *(gradient.norm() for gradient in gradients)])
        if norms.isfinite().all():
            self.losses.append(float(loss.detach()))
            self.ahead = list(zip(parameters, gradients, strict=True))
        else:
            self.look = replace(self.look, diverged=step)

    def see(self) -> None:
        """Look at the network as it was in the batch that `learn` was given last."""
        histograms = tuple(map(Histogram.of, self.net.inputs))  # testing brings others
        self.look = Look(
            loss=sum(self.losses) / len(self.losses),
            accuracy=training.accuracy(self.net, self.x_test, self.y_test),
            gradients=tuple(float(g.norm()) for p, g in self.ahead if p.ndim > 1),
            histograms=histograms,
        )
        self.losses.clear()

    def move(self) -> None:
        """Take the step."""
        with torch.no_grad():
            for parameter, gradient in self.ahead:
                parameter.sub_(gradient, alpha=self.rate)


def train(
    settings: Settings, data: Dataset, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Snapshot]:
    """Train both networks by plain SGD, and yield how they are every few steps.

    A snapshot of step n shows the networks after n steps, in the batch that comes then. A network
    whose loss or gradient is not finite any more is left as it is, and the other goes on.

    Args:
        settings: of both.
        data: what they learn.
        stopped: is asked before every step.

    Raises:
        InputError: There are fewer rows than one batch needs.
    """
    arms = {arm: _Arm(settings, data, arm == NORMALIZED) for arm in ARMS}
    batches = training.batches(len(data.x_train), settings.batch, settings.seed)
    for step, rows in zip(range(settings.steps + 1), batches, strict=False):
        if stopped():
            return
        running = [arm for arm in arms.values() if arm.look.diverged is None]
        for arm in running:
            arm.learn(step, rows)
        left = [arm for arm in running if arm.look.diverged is None]
        if step % EVERY == 0 or step == settings.steps or left != running:
            for arm in left:
                arm.see()
            yield Snapshot(step, {name: arm.look for name, arm in arms.items()})
        if not left:
            return
        for arm in left:
            arm.move()
