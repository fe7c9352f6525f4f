"""Ghost batches: each group of samples is normalised by its own statistics, all groups at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.moments import expand_mask


@dataclass(frozen=True)
class Groups:
    """How the samples of a batch are cut into groups.

    Samples lie on the first axis that is not the channels'. The tensors are viewed with groups on a
    new first axis: (groups, samples of one, …). Where that does not come out even, a mask leaves
    out what is filled in.

    Attributes:
        size: samples in a group.
        lead: samples of the first group that are elsewhere, before those here.
        samples: samples here.
        channel_dim: the axis of the channels in the batch.
    """

    size: int
    lead: int
    samples: int
    channel_dim: int

    @classmethod
    def of(cls, x: Tensor, size: int, channel_dim: int, lead: int | None = None) -> Groups:
        """The groups of a batch; without `lead` there is nothing elsewhere."""
        channel_dim %= x.dim()
        samples = x.shape[0 if channel_dim else 1]
        if lead is None:
            # A group that lacks samples only because there are no more is no padding.
            size = min(size, max(samples, 1))
        return cls(size, lead or 0, samples, channel_dim)

    @property
    def number(self) -> int:
        """How many groups have, or could have, samples here."""
        return max(1, math.ceil((self.lead + self.samples) / self.size))

    @property
    def padding(self) -> tuple[int, int]:
        """Samples to be filled in before and after."""
        return self.lead, self.number * self.size - self.lead - self.samples

    @property
    def axes(self) -> tuple[int, int]:
        """The axes of groups and channels in what `cut` gives."""
        return 0, max(self.channel_dim, 1) + 1

    def cut(self, values: Tensor) -> Tensor:
        """A tensor like the batch, by groups."""
        return self._split(values if self.channel_dim else values.movedim(1, 0), 0)

    def cut_mask(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The mask that goes with `cut(x)`; None if everything counts."""
        if mask is not None:
            return self._split(
                expand_mask(mask, x, self.channel_dim).squeeze(self.channel_dim), False
            )
        if not any(self.padding):
            return None
        real = self._split(torch.ones(self.samples, dtype=torch.bool, device=x.device), False)
        return real.reshape(*real.shape, *(1,) * (x.dim() - 2))

    def join(self, values: Tensor) -> Tensor:
        """The batch again, from what `cut` made of it."""
        values = values.reshape(self.number * self.size, *values.shape[2:])
        if any(self.padding):
            values = values.narrow(0, self.lead, self.samples)
        return values if self.channel_dim else values.movedim(0, 1)

    def spread(self, values: Tensor, channels: int) -> Tensor:
        """(groups, C) from a vector with a value for each channel, or for each of each group."""
        return values.reshape(-1, channels).expand(self.number, channels)

    @staticmethod
    def gather(gradient: Tensor, size: int) -> Tensor:
        """The gradient of a vector of that size, from that of its `spread`."""
        return gradient.flatten() if size == gradient.numel() else gradient.sum(0)

    def _split(self, values: Tensor, filling: float) -> Tensor:
        """(groups, samples of one, …) from a tensor with samples on its first axis."""
        if any(self.padding):
            around = (0, 0) * (values.dim() - 1) + self.padding
            values = torch.nn.functional.pad(values, around, value=filling)
        return values.reshape(self.number, self.size, *values.shape[1:])
