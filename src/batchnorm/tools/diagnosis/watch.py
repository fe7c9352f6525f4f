"""What comes into batch norm layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence

from batchnorm.kernels import select
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments, accumulation_dtype, expand_mask
from batchnorm.tools.diagnosis.modes import channel_axis, processes_of
from batchnorm.tools.diagnosis.padding import Padding, padding_in

#: Batches in which padding is looked for: it compares every position with every other's.
PADDED_BATCHES = 2


class OneValueError(Exception):
    """A layer got one value per channel, of which training has no statistics."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer


@dataclass
class Seen:
    """What came into one layer, over all batches of a pass.

    Attributes:
        calls: of each batch, the moments of each call of the layer.
        samples: of each batch, the moments of the samples' own means (first call).
        highest: greatest output of each channel.
        padding: what looks like padding in the first batches, if anything does.
        banked: whether there were calls with a bank of statistics, which are not among these.
    """

    calls: list[list[Moments]] = field(default_factory=list)
    samples: list[Moments] = field(default_factory=list)
    highest: Tensor | None = None
    padding: list[Padding] = field(default_factory=list)
    banked: bool = False

    def every_call(self) -> list[Moments]:
        """Of all batches."""
        return [moments for calls in self.calls for moments in calls]

    def batches(self) -> list[Moments]:
        """Moments of each batch that reached the layer with finite values."""
        merged = [Moments.merge_all(calls) for calls in self.calls if calls]
        return [moments for moments in merged if finite(moments)]

    def population(self) -> Moments | None:
        """Moments of all batches together."""
        batches = self.batches()
        return Moments.merge_all(batches) if batches else None

    def values(self) -> float | None:
        """Values per channel behind a call's statistics, on average."""
        counts = [float(moments.count) for moments in self.every_call()]
        return sum(counts) / len(counts) if counts else None

    def finite_samples(self) -> list[Moments]:
        """`samples` that have no NaN or infinity."""
        return [moments for moments in self.samples if finite(moments)]


def finite(moments: Moments) -> bool:
    """Whether all values were."""
    return bool(moments.m2.isfinite().all())


class Watch:
    """Hooks on layers that keep what they see, batch by batch, until removed.

    Args:
        layers: that are watched.
        deep: also look for padding, and at samples one by one.
        by_step: layers that have a bank for each step but the last ones.

    Attributes:
        seen: of each layer.
        order: of layers, as their first calls came.

    Raises:
        OneValueError: within, from a layer that would have to normalise one value by itself.
    """

    def __init__(
        self, layers: list[Any], *, deep: bool = True, by_step: Collection[Any] = ()
    ) -> None:
        self.seen: dict[Any, Seen] = {layer: Seen() for layer in layers}
        self.order: list[Any] = []
        self._deep = deep
        self._by_step = by_step
        self._before_batch: dict[Any, tuple[int, int]] = {}

    @contextmanager
    def hooks(self) -> Iterator[Watch]:
        """While it lasts, the hooks are there."""
        with ExitStack() as stack:
            for layer, seen in self.seen.items():
                for handle in (
                    layer.register_forward_pre_hook(partial(self._before, seen), with_kwargs=True),
                    layer.register_forward_hook(partial(self._after, seen)),
                ):
                    stack.callback(handle.remove)
            yield self

    def next_batch(self) -> None:
        """What comes now belongs to another batch."""
        for layer, seen in self.seen.items():
            self._before_batch[layer] = len(seen.samples), len(seen.padding)
            seen.calls.append([])

    def drop_batch(self) -> None:
        """Forget what came since `next_batch`, which failed."""
        for layer, seen in self.seen.items():
            samples, padding = self._before_batch[layer]
            del seen.calls[-1], seen.samples[samples:], seen.padding[padding:]

    def _before(self, seen: Seen, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x, mask = given(layer, args, kwargs)
        if x is None or x.dim() < 2 or not x.is_floating_point():
            return  # the layer will say so
        if layer not in self.order:
            self.order.append(layer)
        # The steps of a recurrent network that have no bank are but its last ones.
        if layer in self._by_step or (isinstance(layer, BatchNorm) and layer._bank is not None):
            seen.banked = True
            return
        axis = channel_axis(layer, x.dim())
        moments = select.moments(x, mask, axis)
        if moments.count == 0:
            return  # nothing is no call
        # One value per channel: frozen layers do not mind, and others' values may join it.
        alone = isinstance(layer, _BatchNorm) and processes_of(layer) == 1
        if layer.training and alone and moments.count == 1:
            raise OneValueError(layer)
        first = not seen.calls[-1]
        seen.calls[-1].append(moments)
        if not self._deep or not first:
            return
        seen.samples.append(Moments.of(_sample_means(x, mask, axis)))
        if len(seen.calls) <= PADDED_BATCHES and mask is None and (found := padding_in(x, axis)):
            seen.padding.append(found)

    @staticmethod
    def _after(seen: Seen, layer: nn.Module, _: Any, y: Any) -> None:
        y = y.data if isinstance(y, PackedSequence) else y
        if not isinstance(y, Tensor) or y.dim() < 2 or not y.numel():
            return
        axis = channel_axis(layer, y.dim())
        highest = y.detach().amax([a for a in range(y.dim()) if a != axis])
        seen.highest = highest if seen.highest is None else torch.maximum(seen.highest, highest)


def given(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """The input and the mask that a layer was called with."""
    ours = isinstance(layer, BatchNorm)
    x = args[0] if args else kwargs.get("x" if ours else "input")
    mask = (args[1] if len(args) > 1 else kwargs.get("mask")) if ours else None
    if isinstance(x, PackedSequence):
        x = x.data
    return (x.detach(), mask) if isinstance(x, Tensor) else (None, None)


def _sample_means(x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """Each sample's own mean of each channel, (N, C); samples of which nothing counts are left out.

    Values of one sample are alike: neighbours in an image, steps of a sequence. How far samples
    differ says how much a batch of them knows.
    """
    wide = accumulation_dtype(x.device)
    first = _flat(x, axis)
    if mask is None:
        return first.mean(2, dtype=wide)
    weights = _flat(expand_mask(mask, x, axis).to(wide), axis)
    total = weights.sum(2)
    means = (torch.where(weights > 0, first, 0.0) * weights).sum(2) / total
    return means[total[:, 0] > 0]


def _flat(x: Tensor, axis: int) -> Tensor:
    """(N, C, rest); where channels come first, all is one sample."""
    x = x.movedim(axis, 1) if axis else x[None]
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
