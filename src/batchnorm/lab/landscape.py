"""What one training step does: to the layers' inputs, to their gradients, and to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy

from batchnorm import BatchNorm
from batchnorm.lab.training import generator

#: Of the seeds of a network's noises, far from those of weights and batches.
NOISE_OFFSET = 4_000_000_000

Values = Sequence[npt.NDArray[np.float32]]
"""For each layer its inputs: a row a sample, a column a unit."""


class Noise(nn.Module):
    """Scales and shifts every activation at random, around a scale and a shift of the unit's own.

    Those of the units are redrawn each step: shifts uniform in ±`SHIFT`, scales uniform from 1 to
    `LARGEST_SCALE`; the activations' own lie around them, shifts uniform in ±`OWN_SHIFT` and scales
    normal with deviation `OWN_SCALE`. So each unit's distribution jumps from step to step, and
    within a step every forward pass gets the same noise.

    Args:
        seed: of the network.
        number: of the layer.
    """

    SHIFT, LARGEST_SCALE = 0.5, 1.25
    OWN_SHIFT = OWN_SCALE = 0.1

    def __init__(self, seed: int, number: int) -> None:
        super().__init__()
        self.seed = NOISE_OFFSET + 10_000_000 * seed + 100_000 * number
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        """Apply this step's noise."""
        draw = generator(self.seed + self.step)
        units = x.shape[1]
        shift = 2 * self.SHIFT * (torch.rand(units, generator=draw) - 0.5)
        scale = 1 + (self.LARGEST_SCALE - 1) * torch.rand(units, generator=draw)
        shifts = shift + 2 * self.OWN_SHIFT * (torch.rand(x.shape, generator=draw) - 0.5)
        scales = scale + self.OWN_SCALE * torch.randn(x.shape, generator=draw)
        return x * scales + shifts


# What is done and measured here, for recipes.
NOISE = (
    f"each step, each unit is given a new shift within ±{Noise.SHIFT:g} and a new scale in "
    f"1…{Noise.LARGEST_SCALE:g}, and each activation a shift within ±{Noise.OWN_SHIFT:g} and a "
    f"scale with deviation {Noise.OWN_SCALE:g} of its own."
)
DISTANCE = (
    "For a unit, the 2-Wasserstein distance between the distributions of its values: changes of "
    "mean, deviation and shape count; over a layer, √(Σ distance² ÷ Σ variance), in which the "
    "layer's scale cancels."
)
GRADIENT_SHIFT = (
    "G is the gradient by a layer's weights, G′ the one on the same batch with the same noise "
    "after all earlier layers, γ and β included, and no other, have made their step."
)
OFF_LINE = (
    "|L(θ − tG) − (L − t‖G‖²)| ÷ t‖G‖². The source takes the loss's range; that includes the "
    "descent itself, and is large where a large gradient leads straight down."
)


def set_step(net: nn.Module, step: int) -> None:
    """Have every noise of a network draw for this step."""
    for module in net.modules():
        if isinstance(module, Noise):
            module.step = step


def layers(net: nn.Sequential) -> list[list[nn.Parameter]]:
    """The parameters of each dense layer, weights first, with those of what follows it.

    A normalization's γ and β belong to the layer before it.
    """
    found: list[list[nn.Parameter]] = []
    for module in net:
        if isinstance(module, nn.Linear):
            found.append([])
        found[-1] += module.parameters()
    return found


def gradients(
    net: nn.Module, x: Tensor, y: Tensor, parameters: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The loss of a batch, and its gradient by the parameters."""
    loss = cross_entropy(net(x), y)
    return float(loss.detach()), list(torch.autograd.grad(loss, parameters))


def statistics(net: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance, by unit, of what each normalization receives."""
    found = []
    with torch.no_grad():
        for module in net:
            if isinstance(module, BatchNorm):
                found.append((x.mean(0), x.var(0, correction=0)))
            x = module(x)
    return found


def inputs(
    net: nn.Sequential, x: Tensor, held: Sequence[tuple[Tensor, Tensor]] | None = None
) -> Values:
    """What each dense layer but the first receives.

    Args:
        net: in training.
        x: what the network is given.
        held: statistics with which to normalize, instead of those of `x`.
    """
    received = []
    given = iter(held or ())
    with torch.no_grad():
        for module in net:
            if isinstance(module, nn.Linear):
                received.append(x.numpy())
            if held and isinstance(module, BatchNorm):
                x = batch_norm(x, *next(given), module.weight, module.bias, eps=module.eps)
            else:
                x = module(x)
    return received[1:]


def moved(before: Values, after: Values) -> list[float | None]:
    """How far the distribution of each layer's inputs has moved, in standard deviations.

    For each unit the 2-Wasserstein distance W between its values before and after, over the same
    samples: any change of mean, deviation or shape counts, and a permutation of the samples does
    not. Over a layer's units it is √(Σ W² / Σ σ²), σ² being the mean of the variances before and
    after. So the layer's scale cancels, and units that are constant count for nothing. None: all
    of them are.

    >>> x = np.array([[-1.0], [1.0]], dtype=np.float32)
    >>> moved([x], [x + 0.5]), moved([x], [-x])
    ([0.5], [0.0])
    """
    distances: list[float | None] = []
    for a, b in zip(before, after, strict=True):
        # The optimal transport between equally many points on a line joins them in their order.
        # Rows that lie together in memory are sorted many times faster.
        first, second = (np.sort(np.ascontiguousarray(z.T), axis=1).astype(float) for z in (a, b))
        variance = (first.var(1) + second.var(1)).sum() / 2
        squares = np.square(first - second).mean(1).sum()
        distances.append(math.sqrt(squares / variance) if variance else None)
    return distances


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """By what part of its size a gradient has changed, ‖G − G′‖ ÷ ‖G‖; None: it was zero.

    >>> change([torch.tensor([3.0])], [torch.tensor([-6.0])])
    3.0
    """
    size = _norm(before)
    return _norm([a - b for a, b in zip(after, before, strict=True)]) / size if size else None


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def update(
    net: nn.Sequential, x: Tensor, y: Tensor, gradient: Sequence[Tensor], rate: float
) -> list[float | None]:
    """Do a step of gradient descent, first layer first, and see what it does to the others.

    Definition 2.1 of Santurkar et al. 2018: G is the gradient by a layer's weights before the step,
    G′ the one on the same batch when all layers before it, and no other, have been updated.

    Args:
        net: is updated; every forward pass of it must draw the same noise, if any.
        x: the batch.
        y: its classes.
        gradient: by `net.parameters()`, at the start.
        rate: learning rate.

    Returns:
        Of each layer but the first the change from G to G′, as a part of G.
    """
    given = iter(gradient)
    changes = []
    for number, parameters in enumerate(layers(net)):
        own = [next(given) for _ in parameters]
        if number:
            _, after = gradients(net, x, y, parameters[:1])
            changes.append(change(own[:1], after))
        descend(parameters, own, rate)
    return changes


@dataclass(frozen=True)
class Line:
    """What happens along a gradient: figure 4 of Santurkar et al. 2018, but for the loss.

    Its authors draw the range of the loss, in which the descent itself counts: a network whose
    loss falls all the way has the larger range the faster it falls. So `departure` is how far the
    loss leaves the straight line that the gradient G foretells, as a part of the descent foretold:
    |L(θ − tG) − (L(θ) − t‖G‖²)| ÷ t‖G‖². `gradient` is the change of the gradient as a part of the
    gradient at the start, `smoothness` its change for the distance moved (the "effective β"). Each
    is the greatest over the lengths t. None: there is no gradient.
    """

    departure: float | None
    gradient: float | None
    smoothness: float | None


def along(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    start: tuple[float, Sequence[Tensor]],
    lengths: Sequence[float],
) -> Line:
    """Walk down the gradient by each of these lengths, and return to the start, bit for bit.

    Args:
        net: every forward pass of it must draw the same noise, if any.
        x: the batch.
        y: its classes.
        start: loss and gradient by `net.parameters()`.
        lengths: of the steps, in multiples of the gradient.
    """
    parameters = list(net.parameters())
    loss, gradient = start
    here = [parameter.detach().clone() for parameter in parameters]
    slope = _norm(gradient) ** 2
    if not slope:
        return Line(None, None, None)
    departures, changes = [], []
    for length in lengths:
        descend(parameters, gradient, length)
        found, after = gradients(net, x, y, parameters)
        departures.append(abs((found - loss) / (length * slope) + 1))
        changes.append(change(gradient, after) or 0.0)
        with torch.no_grad():
            for parameter, value in zip(parameters, here, strict=True):
                parameter.copy_(value)
    steep = [part / length for part, length in zip(changes, lengths, strict=True)]
    return Line(max(departures), max(changes), max(steep))


def descend(parameters: Sequence[Tensor], gradient: Sequence[Tensor], rate: float) -> None:
    """Subtract the gradient times the rate, in place."""
    with torch.no_grad():
        for parameter, slope in zip(parameters, gradient, strict=True):
            parameter.sub_(slope, alpha=rate)
