"""What a call is about: x in an order of memory that the kernels read, its mask, how it is cut."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import calls
from batchnorm.kernels.triton.plans import Arrangement, Plan, arrangement, plan

#: Elements; and numbers of a channel, which the kernels turn into float64.
ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = (*ELEMENTS, torch.float64)

#: Groups that a launch has room for on the axis of its grid that they take.
MOST_GROUPS = 65535

#: eps and its inverse square root must be numbers of float32 too.
LEAST_EPS, LARGEST_EPS = 1e-30, 1e30


class Operand(NamedTuple):
    """The tensor that a call is about.

    Attributes:
        x: dense, its axes in any order.
        mask: None, or weights as uint8 or floats, (outer, inner), dense.
        lies: how x lies in memory.
        size: samples in a group.
        plan: how it is cut, or each group.
    """

    x: Tensor
    mask: Tensor | None
    lies: Arrangement
    size: int
    plan: Plan

    @classmethod
    def of(cls, x: Tensor, channel_dim: int, mask: Tensor | None, flags: int = 0) -> Operand:
        """Read x and a mask that has its shape with one channel; copy what is not dense."""
        lies = arrangement(x.shape, x.stride(), channel_dim % x.dim())
        if lies is None:
            return cls.of(x.clone(), channel_dim, mask, flags)  # dense, axes in the same order
        if mask is not None:
            mask = mask.resolve_neg().permute(lies.order).contiguous()
            mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
        outer, all_outer = lies.outer, None
        size, groups = grouping(x, channel_dim, flags)
        if groups > 1:
            if lies.channels == 1:  # its axis may stand before that of the samples, or behind
                lies = Arrangement(len(x), 1, x.numel() // len(x), lies.order)
            outer, all_outer = lies.outer // len(x) * size, lies.outer
        cut = plan(outer, lies.channels, lies.inner, x.element_size(), all_outer)
        return cls(x, mask, lies, size, cut)

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.lies.channels

    @property
    def values(self) -> int:
        """Elements of a channel."""
        return self.lies.outer * self.lies.inner

    @property
    def groups(self) -> int:
        """How many of them have statistics of their own."""
        return self.plan.groups

    @property
    def slots(self) -> int:
        """Channels of all groups."""
        return self.groups * self.channels

    @property
    def row(self) -> int:
        """Numbers in a row of statistics: of all groups, and behind several of all together."""
        return self.slots + self.channels * (self.groups > 1)

    @property
    def counts(self) -> Tensor:
        """The weight that a mask gives each group, as the kernels read it."""
        assert self.mask is not None  # noqa: S101 - for mypy: else there is nothing to ask
        samples = len(self.x)
        weights = self.mask if self.mask.is_floating_point() else self.mask != 0
        weights = weights.reshape(samples, -1).to(torch.float32).sum(1, dtype=torch.float64)
        weights = torch.nn.functional.pad(weights, (0, self.groups * self.size - samples))
        return weights.view(self.groups, self.size).sum(1)

    def numbers(self, *shape: int) -> Tensor:
        """Room for float64 numbers on x's device."""
        return torch.empty(shape, dtype=torch.float64, device=self.x.device)

    def like(self, dtype: torch.dtype) -> Tensor:
        """Room for a tensor that lies as x does."""
        return torch.empty_like(self.x, dtype=dtype)

    def each(self, parameter: Tensor | None) -> Tensor | None:
        """γ or β of every channel of every group."""
        if parameter is None or len(parameter) == self.slots:
            return parameter
        return parameter.repeat(self.groups)

    def gradients(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Room for those of γ and β in every group; of several in float64, to be added."""
        like = weight if weight is not None else bias
        dtype = torch.float64 if like is None or self.groups > 1 else like.dtype
        d_weight, d_bias = (
            torch.empty(self.slots, dtype=dtype, device=self.x.device) for _ in range(2)
        )
        return d_weight, d_bias

    def together(
        self,
        gradients: tuple[Tensor | None, Tensor | None],
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of all groups, but each group's of what it has of its own."""
        d_weight, d_bias = gradients
        if self.groups == 1 or d_weight is None or d_bias is None:
            return gradients
        like = weight if weight is not None else bias
        dtype = torch.float64 if like is None else like.dtype
        own_weight, own_bias = (
            p is not None and len(p) == self.slots for p in (weight, like if bias is None else bias)
        )
        both = torch.stack((d_weight, d_bias)).view(2, self.groups, -1).sum(1).to(dtype)
        return (
            d_weight.to(dtype) if own_weight else both[0],
            d_bias.to(dtype) if own_bias else both[1],
        )

    def arranged(self, other: Tensor) -> Tensor:
        """The same values, lying as x does."""
        sizes = zip(self.x.shape, self.x.stride(), other.stride(), strict=True)
        if all(ours == theirs for size, ours, theirs in sizes if size != 1):
            return other
        return self.like(other.dtype).copy_(other)


@lru_cache(maxsize=64)
def doubled(value: float) -> tuple[float, float]:
    """A number as the two float32 that a kernel can be given."""
    high = ctypes.c_float(value).value
    return high, value - high


def recorded(x: Tensor) -> bool:
    """Whether the tensor has no values, but stands for those that a graph will be given."""
    return type(x) not in calls.PLAIN


def negated(tensor: Tensor) -> bool:
    """Whether a bit of the tensor, not its memory, says that its numbers have the other sign."""
    # Compilers know no such tensors, and not the question.
    return not torch.compiler.is_compiling() and tensor.is_neg()


def served(
    x: Tensor,
    mask: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    eps: float,
    channel_dim: int,
    flags: int,
) -> bool:
    """Whether the kernels can do this: axes, options, groups, a number for each channel.

    Or one for each channel of each group.
    """
    if x.dim() < 2 or x.numel() == 0 or negated(x) or not -x.dim() <= channel_dim < x.dim():
        return False
    slots, channels = slots_of(x, channel_dim, flags), x.shape[channel_dim]
    if slots > channels and (
        slots > MOST_GROUPS * channels
        or slots + channels >= 2**31  # the kernels count them in 32 bits
        or not apart(x, channel_dim)
    ):
        return False
    return (
        (mask is None or mask.device == x.device)
        and (flags & calls.ACTIVATION) < len(calls.ACTIVATIONS)
        and LEAST_EPS <= eps <= LARGEST_EPS
        and all(v is None or is_vector(v, x, channels) or is_vector(v, x, slots) for v in vectors)
    )


def grouping(x: Tensor, channel_dim: int, flags: int) -> tuple[int, int]:
    """Samples in a group, if any is asked for, and how many groups that makes."""
    size = flags >> calls.GROUP_BIT
    if size == 0:  # at once: a graph may not ask a symbolic number of samples
        return 0, 1
    samples = x.shape[0 if channel_dim % x.dim() else 1]
    return (size, -(-samples // size)) if size < samples else (samples, 1)


def slots_of(x: Tensor, channel_dim: int, flags: int) -> int:
    """Channels of all groups."""
    channels = x.shape[channel_dim]
    return channels * grouping(x, channel_dim, flags)[1] if flags >> calls.GROUP_BIT else channels


def fewest(x: Tensor, channel_dim: int, flags: int) -> int:
    """Values of a channel in the smallest group."""
    values = x.numel() // x.shape[channel_dim]
    if not flags >> calls.GROUP_BIT:
        return values
    size, groups = grouping(x, channel_dim, flags)
    samples = x.shape[0 if channel_dim % x.dim() else 1]
    return (samples - (groups - 1) * size) * (values // samples)


def apart(x: Tensor, channel_dim: int) -> bool:
    """Whether each sample has a place in memory of its own, or will have without gaps."""
    lies = arrangement(x.shape, x.stride(), channel_dim % x.dim())
    if lies is None:
        strides = torch.empty_like(x, device="meta").stride()
        lies = arrangement(x.shape, strides, channel_dim % x.dim())
    outermost = lies and next(axis for axis in lies.order if x.shape[axis] > 1)
    return channel_dim % x.dim() != 0 and outermost == 0


def is_vector(vector: Tensor, x: Tensor, length: int) -> bool:
    """Whether this has as many numbers, where the kernels can read and write them."""
    return (
        vector.dim() == 1
        and len(vector) == length
        and vector.device == x.device
        and vector.dtype in NUMBERS
        and vector.is_contiguous()
        and not negated(vector)
    )


def are_running(
    vectors: tuple[Tensor | None, ...], x: Tensor, channel_dim: int, flags: int
) -> bool:
    """Whether these can take the batch in; or in evaluation, are each group's statistics."""
    training = flags & calls.TRAINING
    length = x.shape[channel_dim] if training else slots_of(x, channel_dim, flags)
    return all(v is None or is_vector(v, x, length) for v in vectors)


def is_like(tensor: Tensor, x: Tensor) -> bool:
    """Whether this has a number for each element, where the kernels can read it."""
    return (
        tensor.shape == x.shape
        and tensor.device == x.device
        and tensor.dtype in ELEMENTS
        and not negated(tensor)
    )


def is_counter(counter: Tensor, x: Tensor) -> bool:
    """Whether this is a number of batches that the kernels can change."""
    return counter.dtype is torch.int64 and counter.numel() == 1 and counter.device == x.device
