"""What the playground trains: two networks that differ in nothing but batch normalization.

They begin with the same weights and see the same batches at the same steps. `train` yields what the
page shows, and touches nothing outside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm
from batchnorm.lab import training
from batchnorm.lab.data import Dataset
from batchnorm.lab.networks import dense
from batchnorm.playground.settings import ACTIVATIONS, EVERY, INITS, Settings

PLAIN, NORMALIZED = ARMS = ("plain", "BatchNorm")

#: What is counted of the inputs of the activation functions lies within ±SPAN, what is beyond it in
#: the outermost bins. Normalized values hardly ever leave it, and beyond it a sigmoid is flat.
SPAN, BINS = 5.0, 50


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
