"""How far the outputs of training and evaluation are apart, and which layers are behind it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.errors import InputError
from batchnorm.moments import Moments, accumulation_dtype
from batchnorm.tools.diagnosis.modes import normalizing_by
from batchnorm.tools.feeding import Step, rewound, seed
from batchnorm.tools.findings import Gap

#: Layers of which it is measured what they alone do to the output, by a pass for each of so many
#: batches. Of more layers, those whose statistics are farthest off; and one batch shows the shares.
MOST_LAYERS, BATCHES = 40, 2


#: Examples whose outputs differ by less than this part of their size do not differ, and a gap that
#: is no larger is none: rounding in float32, 6e-8, grows on the way through normalization.
SPREAD = 1e-5

#: Batches of which the outputs in training are kept, to compare with more than once.
KEPT = 8


class Outputs:
    """Runs the model over batches, with some layers normalising by the batch, and compares."""

    def __init__(self, model: nn.Module, layers: list[Any], step: Step) -> None:
        self._model, self._layers, self._step = model, layers, step
        self._kept: list[tuple[Any, int, list[Tensor]]] = []

    def of(self, batch: Any, number: int, by_batch: set[Any]) -> list[Tensor]:
        """The floating outputs.

        For a batch of a number the same random numbers each time: what differs is to be the layers'
        doing. Others for other batches, or a model that draws lots would always go one way.
        """
        with normalizing_by(self._layers, by_batch), rewound():
            seed(number)
            return leaves(self._step(self._model, batch))

    def keep(self, batch: Any, number: int, trained: list[Tensor]) -> None:
        """Remember what a batch gives in training, if it is one of the first."""
        if len(self._kept) < KEPT:
            self._kept.append((batch, number, trained))

    def moved(self, by_batch: set[Any], most: int) -> list[Distance]:
        """How far the outputs move from those kept, if only these layers normalise by the batch."""
        return [
            distance(trained, self.of(batch, number, by_batch))
            for batch, number, trained in self._kept[:most]
        ]


Distance = tuple[float, float]
"""Squared distance of two outputs in units of the first one's squared spread over examples, times
the number of examples; and that number."""


def distance(one: list[Tensor], other: list[Tensor]) -> Distance:
    """Of outputs of the same batch; several tensors count alike, a short batch for less."""
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=False)):
        raise InputError(
            "expected outputs of the same shapes in training and evaluation of batch norm layers, "
            "got others; pass step= with a function that returns what should be compared"
        )
    apart = spread = 0.0
    for a, b in zip(one, other, strict=True):
        own = a - a.mean(0) if a.dim() and len(a) > 1 else a - a.mean()
        size, whole = float(own.square().mean()), float(a.square().mean())
        if size <= SPREAD**2 * whole:
            # A single number per batch, such as a loss, has no examples: it is its own measure.
            size = whole
        if 0 < size < math.inf:
            number = len(a) if a.dim() else 1
            apart += number * float((a - b).square().mean()) / size
            spread += number
    return apart, spread


def ratio(distances: list[Distance]) -> float:
    """The gap: the root of the share."""
    spread = sum(own for _, own in distances)
    return math.sqrt(sum(apart for apart, _ in distances) / spread) if spread else math.nan


def gap_of(distances: list[Distance], recalibrated: list[Distance] | None) -> Gap:
    """With its standard error, by leaving out one batch at a time."""
    n = len(distances)
    error = math.nan
    if n > 1:
        without = [ratio(distances[:i] + distances[i + 1 :]) for i in range(n)]
        middle = sum(without) / n
        error = math.sqrt((n - 1) / n * sum((value - middle) ** 2 for value in without))
    left = None if recalibrated is None else ratio(recalibrated)
    return Gap(ratio(distances), error, left, n)


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors in what a model gives; none of them if nothing is in them."""
    if dataclasses.is_dataclass(output) and not isinstance(output, (type, Mapping)):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    found = [
        leaf
        for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not found:
        raise InputError(
            f"expected the model to give floating tensors, got {_kind(output)}; pass step= "
            "with a function that returns what should be compared"
        )
    return [leaf for leaf in found if leaf.numel()]


def _kind(output: Any) -> str:
    return f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__


def leaves(output: Any) -> list[Tensor]:
    """The same without gradients, in the precision of statistics."""
    return [leaf.detach().to(accumulation_dtype(leaf.device)) for leaf in tensors(output)]


def loss_of(output: Any) -> Tensor:
    """Something to call backward on, to which all outputs matter."""
    total = [leaf.float().square().mean() for leaf in tensors(output) if leaf.requires_grad]
    if not total:
        raise InputError("expected outputs that need a gradient, got none")
    return torch.stack(total).sum()


@contextmanager
def exact_statistics(populations: Mapping[Any, Moments | None]) -> Iterator[None]:
    """Layers evaluate by these; afterwards the buffers are as they were."""
    before = [
        (buffer, buffer.clone())
        for layer in populations
        for buffer in (layer.running_mean, layer.running_var)
    ]
    try:
        for layer, population in populations.items():
            if population is not None and population.count > 1:
                layer.running_mean.copy_(population.mean)
                layer.running_var.copy_(population.variance(correction=1))
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
