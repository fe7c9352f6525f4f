"""What a call is about: x in an order of memory that the kernels read, its mask, how it is cut."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import calls
from batchnorm.kernels.triton.plans import (
    STAGES,
    Arrangement,
    Plan,
    arrangement,
    plan,
)

#: Elements; and numbers of a channel, which the kernels turn into float64.
ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = (*ELEMENTS, torch.float64)

#: eps and its inverse square root must be numbers of float32 too.
LEAST_EPS, LARGEST_EPS = 1e-30, 1e30


@dataclass(frozen=True)
class Operand:
    """The tensor that a call is about.

    Attributes:
        x: dense, its axes in any order.
        mask: None, or weights as uint8 or floats, (outer, inner), dense.
        lies: how x lies in memory.
        plan: how it is cut.
    """

    x: Tensor
    mask: Tensor | None
    lies: Arrangement
    plan: Plan

    @classmethod
    def of(cls, x: Tensor, channel_dim: int, mask: Tensor | None) -> Operand:
        """Read x and a mask that has its shape with one channel; copy what is not dense."""
        lies = arrangement(x.shape, x.stride(), channel_dim % x.dim())
        if lies is None:
            return cls.of(x.clone(), channel_dim, mask)  # dense, its axes in the same order
        if mask is not None:
            mask = mask.resolve_neg().permute(lies.order).contiguous()
            mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
        cut = plan(lies.outer, lies.channels, lies.inner, x.element_size())
        return cls(x, mask, lies, cut)

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.lies.channels

    @property
    def values(self) -> int:
        """Elements of a channel."""
        return self.lies.outer * self.lies.inner

    @property
    def shape(self) -> tuple[int, int, int]:
        """What every kernel is told: outer; channels and inner in units."""
        of_channels, of_inner = self.plan.units
        return self.lies.outer, self.lies.channels // of_channels, self.lies.inner // of_inner

    @property
    def passes(self) -> tuple[int, int, int]:
        """What the kernels of two passes are told besides."""
        return self.plan.tiles_i, self.plan.tiles, self.plan.per_split

    @property
    def grid(self) -> tuple[int, int]:
        """The programs of a pass."""
        return self.plan.blocks, self.plan.splits

    @property
    def constants(self) -> tuple[Any, ...]:
        """What every kernel is compiled for: UC, UI, BO, BC, BI, RO, RI, WIDE, STAGES."""
        cut = self.plan
        return *cut.units, *cut.tile, *cut.in_threads, cut.wide, STAGES

    def numbers(self, *shape: int) -> Tensor:
        """Room for float64 numbers on x's device."""
        return torch.empty(shape, dtype=torch.float64, device=self.x.device)

    def like(self, dtype: torch.dtype) -> Tensor:
        """Room for a tensor that lies as x does."""
        return torch.empty_like(self.x, dtype=dtype)

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
    """Whether the kernels can do this: axes, options, one group, a number for each channel."""
    if x.dim() < 2 or x.numel() == 0 or negated(x) or not -x.dim() <= channel_dim < x.dim():
        return False
    size = flags >> calls.GROUP_BIT
    samples = x.shape[0 if channel_dim % x.dim() else 1]
    return (
        (size == 0 or size >= samples)
        and (mask is None or mask.device == x.device)
        and (flags & calls.ACTIVATION) < len(calls.ACTIVATIONS)
        and LEAST_EPS <= eps <= LARGEST_EPS
        and all(v is None or is_vector(v, x, channel_dim) for v in vectors)
    )


def is_vector(vector: Tensor, x: Tensor, channel_dim: int) -> bool:
    """Whether this has a number for each channel, where the kernels can read and write it."""
    return (
        vector.dim() == 1
        and len(vector) == x.shape[channel_dim]
        and vector.device == x.device
        and vector.dtype in NUMBERS
        and vector.is_contiguous()
        and not negated(vector)
    )


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
