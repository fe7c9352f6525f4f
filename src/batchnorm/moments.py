"""Moments: which elements make the statistics, answered once.

Everything that decides what a batch normalization layer normalises by (a mask, a ghost group, the
other processes, the micro-batches of a step, a whole data set) ends in the same object, the triple
(count, mean, sum of squared deviations), and in the same operation, the merge of several of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from batchnorm.errors import InputError


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The precision in which statistics are accumulated and kept: float64 where the device has it.

    The arrays are one number per channel, so the width costs nothing; it is what keeps a mean of
    1e6 with a spread of 1 exact to the input's own rounding.
    """
    return torch.float32 if device.type == "mps" else torch.float64


Axes = int | tuple[int, int]
"""Which axes keep their own statistics: the channels'; or those of groups of the batch and of the
channels, counted from the front. Statistics then have the shape (groups, C)."""


def channel_axis(axes: Axes) -> int:
    """The channels' axis."""
    return axes if isinstance(axes, int) else axes[1]


def reduced_axes(x: Tensor, channel_dim: Axes) -> tuple[int, ...]:
    """All axes of `x` that do not keep statistics of their own."""
    kept = (channel_dim % x.dim(),) if isinstance(channel_dim, int) else channel_dim
    return tuple(axis for axis in range(x.dim()) if axis not in kept)


def along_channel(values: Tensor, x: Tensor, channel_dim: Axes) -> Tensor:
    """View statistics, one value per channel (and group), so that they broadcast against `x`."""
    shape = [1] * x.dim()
    if isinstance(channel_dim, int):
        shape[channel_dim] = -1
    else:
        # Of groups that share a value, there is one value, or no such axis.
        for axis, size in zip(channel_dim[-values.dim() :], values.shape, strict=True):
            shape[axis] = size
    return values.reshape(shape)


def expand_mask(mask: Tensor, x: Tensor, channel_dim: Axes) -> Tensor:
    """Give the mask the shape of `x` with one channel, or say why it does not fit.

    Raises:
        InputError: the mask does not broadcast to the shape of `x` without its channel axis, or is
            neither boolean nor real.
    """
    channel_dim = channel_axis(channel_dim)
    wanted = [x.shape[axis] for axis in reduced_axes(x, channel_dim)]
    if mask.is_complex():
        raise InputError(f"expected a mask of booleans or real weights, got {mask.dtype}")
    leading = len(wanted) - mask.dim()
    fits = leading >= 0 and all(
        size in (1, want) for size, want in zip(mask.shape, wanted[leading:], strict=True)
    )
    if not fits:
        raise InputError(
            f"expected a mask that broadcasts to {tuple(wanted)}, the shape of x "
            f"{tuple(x.shape)} without its channel axis {channel_dim}; got {tuple(mask.shape)}"
            + (
                f"; drop the channel axis: mask.squeeze({channel_dim})"
                if mask.dim() == x.dim() and mask.shape[channel_dim] == 1
                else ""
            )
        )
    return mask.expand(wanted).unsqueeze(channel_dim % x.dim())


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations from that mean, per channel.

    With weights w (1 for every element unless a mask says otherwise) over a channel's elements x:

        count = Σ w        mean = Σ w·x / count        m2 = Σ w·(x − mean)²

    Weights are frequencies: an element of weight 2 counts as two equal elements of weight 1, so
    merging is exact. No elements at all is a value like any other: count 0, mean 0, m2 0.

    Attributes:
        count: number of elements (total weight) behind each mean; one number for all channels.
        mean: shape (C,), float64 (float32 on devices without it), in the unit of the data.
        m2: shape (C,), the dtype of `mean`, in the square of that unit.

    Example:
        >>> import torch
        >>> from batchnorm import Moments
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
        >>> whole = Moments.of(x)
        >>> float(whole.mean), float(whole.variance()), float(whole.variance(correction=1))
        (3.0, 3.5, 4.666666666666667)
        >>> parts = Moments.of(x[:1]).merge(Moments.of(x[1:]))
        >>> float(parts.mean), float(parts.m2)
        (3.0, 14.0)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    _NAMES: ClassVar = ("count", "mean", "m2")

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None, *, channel_dim: Axes = 1) -> Moments:
        """Moments of a tensor's channels, accurate for any offset: centred, never E[x²] − E[x]².

        Args:
            x: floating, any rank from 2 up.
            mask: shape of `x` without the channel axis, broadcastable; bool (True = counts) or
                non-negative weights. What it leaves out may hold anything, NaN included.
            channel_dim: the axis of the channels; or a pair of axes, that of groups of the batch
                and that of the channels: then mean and m2 have the shape (groups, C), and with a
                mask count has the shape (groups, 1).

        Raises:
            InputError: the mask does not fit, or `x` has no such axis or is not floating.
        """
        channel = channel_axis(channel_dim)
        if x.dim() < 2 or not -x.dim() <= channel < x.dim() or not x.is_floating_point():
            raise InputError(
                "expected a floating tensor of rank 2 or more with a channel axis "
                f"{channel}, got {x.dtype} of shape {tuple(x.shape)}"
            )
        axes = reduced_axes(x, channel_dim)
        wider = x.dtype != accumulation_dtype(x.device)
        x = x.to(accumulation_dtype(x.device))
        if mask is None:
            count = x.new_full((), math.prod([x.shape[axis] for axis in axes]))
            weights = None
        else:
            weights = expand_mask(mask, x, channel_dim).to(x.dtype)
            grouped = not isinstance(channel_dim, int)
            count = weights.sum(axes).reshape(-1, 1) if grouped else weights.sum()
            # Not a product: 0 · NaN is NaN, and what is left out may hold NaN.
            x = torch.where(weights > 0, x, 0.0)

        def total(values: Tensor) -> Tensor:
            return (values if weights is None else values * weights).sum(axes)

        divisor = torch.where(count > 0, count, 1.0)
        mean = total(x) / divisor
        if not wider:
            # The sum's roundings, of size |mean|, are in the precision that the result is wanted
            # in. The deviations' are of size σ: adding their mean rounds the mean correctly.
            mean = mean + total(x - along_channel(mean, x, channel_dim)) / divisor
        m2 = total((x - along_channel(mean, x, channel_dim)).square())
        return cls(count, mean, m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of elements together (Chan, Golub & LeVeque 1983)."""
        return Moments.merge_all([self, other])

    @classmethod
    def merge_all(cls, moments: Iterable[Moments]) -> Moments:
        """Moments of the union, exact in any order and for any counts, zero included.

            count = Σ countᵢ    mean = Σ countᵢ·meanᵢ / count
            m2 = Σ m2ᵢ + Σ countᵢ·(meanᵢ − mean)²

        Raises:
            InputError: there is nothing to merge: not even the number of channels is known.
        """
        parts = list(moments)
        if not parts:
            raise InputError("expected at least one Moments to merge, got none")
        if len({part.mean.shape for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.mean.shape)) for part in parts)
            raise InputError(f"expected Moments of the same channels to merge, got {shapes}")
        stacked = (torch.stack([getattr(part, name) for part in parts]) for name in cls._NAMES)
        return cls(*stacked).merged()

    def merged(self) -> Moments:
        """Moments of the union of several, which are stacked along a first axis of all three."""
        counts = self.count
        counts = counts.reshape(counts.shape + (1,) * (self.mean.dim() - counts.dim()))
        total = counts.sum(0)
        # Shares before products: a part that is alone in having elements has share 1 and comes out
        # unchanged to the last bit.
        mean = (counts / torch.where(total > 0, total, 1.0) * self.mean).sum(0)
        m2 = self.m2.sum(0) + (counts * (self.mean - mean).square()).sum(0)
        return Moments(total.reshape(self.count.shape[1:]), mean, m2)

    def over_groups(self) -> Moments:
        """Moments of all groups together, of statistics of the shape (groups, C)."""
        groups = self.mean.shape[0]
        return Moments(
            self.count.reshape(-1, 1).expand(groups, 1)[:, 0], self.mean, self.m2
        ).merged()

    def variance(self, correction: int = 0) -> Tensor:
        """Variance per channel, m2 / (count − correction).

        Args:
            correction: 0 for the biased variance, which normalises; 1 for Bessel's unbiased one,
                which the running statistics keep.

        Returns:
            Shape (C,); NaN where the count does not exceed the correction, except that the biased
            variance of nothing is 0.
        """
        free = self.count - correction
        if correction == 0:
            free = torch.where(free > 0, free, 1.0)
        return torch.where(free > 0, self.m2 / free, torch.nan)

    def normalizing_variance(self) -> Tensor:
        """The biased variance; 1 where there is nothing.

        What nothing counts of, such as a group that is all padding, would else be divided by √eps,
        and overflow in half precision.
        """
        return torch.where(self.count > 0, self.variance(), 1.0)


class Pool(Protocol):
    """Others with a share in the statistics: what they have is merged, or added, with what is here.

    Both methods are differentiable, to any order.
    """

    def merge(self, local: Moments, header: tuple[int, ...] = ()) -> tuple[Moments, Moments]:
        """From the moments of the elements here: those to normalise by, and those of all elements.

        The first have the shape of what is given, which may be of groups. A header holds numbers
        that must be the same for all.
        """

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all who share in each of the statistics; along the last axes as theirs."""
