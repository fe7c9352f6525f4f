"""What comes to a layer in recalibration, what becomes of it, and the report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError, NonFiniteWarning
from batchnorm.layers.statistics import SHARED
from batchnorm.moments import Moments, accumulation_dtype
from batchnorm.running import sound
from batchnorm.tools.findings import counted
from batchnorm.tools.merge import remember
from batchnorm.validation import MIN_COUNT

#: Calls whose moments are merged together. Of 16 channels, 64 calls took 0.53 ms at once and 22 ms
#: one by one; more would only keep more memory.
AT_ONCE = 64


@dataclass(frozen=True)
class LayerRecalibration:
    """The new running statistics of a layer, or of one of its banks, beside the old.

    Attributes:
        name: in `model.named_modules()`.
        kind: the layer's class.
        channels: their number.
        values: values per channel behind the new statistics (the most of any channel); of a mask
            of weights, their sum.
        batches: how many had such values.
        calls: the most calls of the layer for one batch.
        kept: channels that keep their old statistics, for nothing finite came.
        mean_drift: how far off the old mean was: the root mean square over channels of
            (old mean − new mean) / √(new variance + eps); None if it was not finite.
        var_drift: the same of ln((old variance + eps) / (new variance + eps)).
    """

    name: str
    kind: str
    channels: int
    values: float
    batches: int
    calls: int
    kept: int
    mean_drift: float | None
    var_drift: float | None


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` gives.

    Attributes:
        method: "batch" or "layerwise".
        batches: how many were used, those of other processes too.
        passes: how many times the model was run over them.
        layers: every layer, and bank, that has new statistics, in the order of the model.
        left: those that were left alone, by name, and why.
    """

    method: str
    batches: int
    passes: int
    layers: tuple[LayerRecalibration, ...]
    left: Mapping[str, str]

    def __repr__(self) -> str:
        """What was done, in a line: recurrent networks have layers by the hundred."""
        parts = [
            f"{self.method!r}: {counted(len(self.layers), 'layer')} from "
            f"{counted(self.batches, 'batch', 'batches')}"
        ]
        if self.left:
            parts.append(f"{len(self.left)} left alone")
        return f"Recalibration({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can keep it."""
        return asdict(self)


class Part:
    """What has come to a layer, or to one of its banks."""

    def __init__(self, name: str, layer: _BatchNorm, keeper: Any) -> None:
        self.name, self.layer, self.keeper = name, layer, keeper
        self.old = keeper.running_mean.detach().clone(), keeper.running_var.detach().clone()
        self.device = self.old[0].device
        self.calls = 0
        self.clear()  # mutant: each pass begins with it

    def clear(self) -> None:
        """Nothing has come."""
        zeros = torch.zeros(len(self.old[0]), device=self.device)
        zeros = zeros.to(accumulation_dtype(self.device))
        self.moments = Moments(zeros, zeros, zeros)  # channels have counts of their own
        self.refused = zeros
        self.waiting: list[Moments] = []
        self.batches = 0

    def take(self, moments: Moments) -> None:
        """One call's."""
        self.waiting.append(moments)
        if len(self.waiting) >= AT_ONCE:
            self.merge()  # mutant: only more memory without

    def merge(self) -> None:
        """Pool what has been taken since the last time; what is not finite stays out."""
        if not self.waiting:
            return
        mean = torch.stack([moments.mean for moments in self.waiting])
        m2 = torch.stack([moments.m2 for moments in self.waiting])
        count = torch.stack([moments.count for moments in self.waiting])[:, None].expand_as(mean)
        self.waiting.clear()
        finite = mean.isfinite() & m2.isfinite()
        self.refused = self.refused + (~finite).sum(0)
        sound_ones = Moments(*(torch.where(finite, part, 0.0) for part in (count, mean, m2)))
        self.moments = self.moments.merge(sound_ones.merged())

    def packed(self) -> Tensor:
        """All of it in one row."""
        numbers = self.refused.new_tensor([self.batches, self.calls])
        moments = self.moments
        return torch.cat([numbers, moments.count, moments.mean, moments.m2, self.refused])

    def unpack(self, everyones: Tensor) -> None:
        """From the rows of all processes."""
        everyones = everyones.to(self.device)  # mutant: of a model on several devices
        self.batches, self.calls = int(everyones[:, 0].sum()), int(everyones[:, 1].max())
        *moments, refused = everyones[:, 2:].unflatten(1, (4, -1)).unbind(1)
        self.moments = Moments(*moments).merged()
        self.refused = refused.sum(0)

    def new(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and unbiased variance, and which channels have new ones.

        Raises:
            InputError: so few values came that they have no variance.
        """
        mean, var = self.old
        counts, few = self.moments.count, self.moments.count < MIN_COUNT
        if bool((few & (self.refused == 0)).any()):
            raise InputError(
                f"layer {self.name!r}, {type(self.layer).__name__}: expected at least {MIN_COUNT} "
                f"values per channel from all batches, got {float(counts.min()):g}"
            )
        taken = sound(self.moments, mean, var, together=False)
        unbiased = self.moments.variance(correction=1).to(var.dtype)
        new_mean = torch.where(taken, self.moments.mean.to(mean.dtype), mean)
        return new_mean, torch.where(taken, unbiased, var), taken

    def report(self) -> LayerRecalibration:
        """Of what is about to be written."""
        mean, var, taken = self.new()
        return LayerRecalibration(
            self.name,
            type(self.layer).__name__,
            len(mean),
            float(self.moments.count.max()),
            self.batches,
            self.calls,
            int((~taken).sum()),
            *_drift(self.old, (mean, var), self.layer.eps),
        )

    def warn(self) -> None:
        """Tell of what was not finite."""
        *_, taken = self.new()
        refused = (self.refused > 0) | ~taken
        if not bool(refused.any()):
            return
        channels = refused.nonzero().flatten().tolist()
        shown = ", ".join(map(str, channels[:8])) + (", …" if len(channels) > 8 else "")
        warnings.warn(
            f"layer {self.name!r}, {type(self.layer).__name__}: batches hold NaN or infinity, or "
            f"overflow, in {len(channels)} of {len(refused)} channels ({shown}), which go without "
            f"them; {int((~taken).sum())} channels had nothing else and keep their old statistics. "
            "Look for the cause upstream: the data, or weights that are not finite",
            NonFiniteWarning,
            stacklevel=3,
        )

    def write(self, *, shared: bool) -> None:
        """Into the layer; `shared`: on all processes."""
        mean, var, _ = self.new()
        keeper = self.keeper
        keeper.running_mean.copy_(mean)
        keeper.running_var.copy_(var)
        counter = keeper.num_batches_tracked
        if counter is not None:
            plain = self.layer.momentum is None
            counter.fill_(self.batches if plain else max(self.batches, int(counter)))
        keeper.__dict__.pop(SHARED, None)
        if shared:
            remember(keeper)


def _drift(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float
) -> tuple[float | None, float | None]:
    """Of means, in σ, and of the logarithms of variances, from (mean, variance) each."""
    (old_mean, old_var), (mean, var) = ([t.double().cpu() for t in pair] for pair in (old, new))
    of_mean = (old_mean - mean) / (var + eps).sqrt()
    of_var = ((old_var + eps) / (var + eps)).log()
    mean_drift, var_drift = (float(d.square().mean().sqrt()) for d in (of_mean, of_var))
    return _finite(mean_drift), _finite(var_drift)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
