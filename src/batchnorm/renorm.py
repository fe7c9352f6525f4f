"""Batch Renormalization: in training, too, normalise nearly as evaluation will."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.kernels import select
from batchnorm.moments import accumulation_dtype


@dataclass(frozen=True)
class Renorm:
    """Batch Renormalization: bring the batch's statistics near the running ones, within limits.

        y = γ · (x̂ · r + d) + β        x̂ = (x − mean_B) / √(var_B + eps)
        r = clip(√((var_B + eps) / (running_var + eps)), 1/r_max, r_max)
        d = clip((mean_B − running_mean) / √(running_var + eps), −d_max, d_max)

    r and d are constants to the gradient, and the running statistics are those before the step.
    Without limits y would be what evaluation gives; with r_max = 1 and d_max = 0 it is plain batch
    normalization. For batches that are small or not drawn at random.

    Early in training the running statistics are far off, so the limits open slowly: each stays at
    its plain value up to the first of two steps (`num_batches_tracked`), and grows in proportion to
    the step until it is reached at the second. The defaults are the paper's. `batch_norm`, which
    counts no steps, uses the limits in full.

    Activation checkpointing has the r and d of the first forward pass, but not where it is compiled
    itself (torch.compile of a function that calls torch.utils.checkpoint): there torch computes
    them again, from running statistics that have moved.

    Attributes:
        r_max: greatest ratio of the two standard deviations, 1 or more.
        d_max: greatest distance of the two means in running standard deviations, 0 or more.
        r_steps: where r_max begins to grow from 1, and where it is reached; (0, 0): at once.
        d_steps: the same of d_max, from 0.

    Raises:
        ArgumentError: a limit below its plain value, or steps not in order.

    Source: Ioffe 2017, https://arxiv.org/abs/1702.03275

    Example:
        >>> import torch
        >>> from batchnorm import BatchNorm, Renorm
        >>> bn = BatchNorm(8, renorm=Renorm(r_max=3, d_max=5, r_steps=(0, 0), d_steps=(0, 0)))
        >>> y = bn(torch.randn(4, 8))
        >>> [float(limit) for limit in Renorm().limits(torch.tensor(22_500))]
        [2.0, 4.375]
    """

    r_max: float = 3.0
    d_max: float = 5.0
    r_steps: tuple[int, int] = (5_000, 40_000)
    d_steps: tuple[int, int] = (5_000, 25_000)

    def __post_init__(self) -> None:
        for name, least, value in (("r_max", 1, self.r_max), ("d_max", 0, self.d_max)):
            if not isinstance(value, Real) or not least <= value < math.inf:
                raise ArgumentError(
                    f"expected {name} to be finite and at least {least}, where renormalization is "
                    f"plain batch normalization; got {value!r}"
                )
        for name, steps in (("r_steps", self.r_steps), ("d_steps", self.d_steps)):
            if not (
                isinstance(steps, tuple)
                and len(steps) == 2
                and all(isinstance(step, Integral) for step in steps)
                and 0 <= steps[0] <= steps[1]
            ):
                raise ArgumentError(
                    f"expected {name} to be a tuple of two step numbers in order, where the limit "
                    f"begins to grow and where it is reached, such as (0, 1000); got {steps!r}"
                )

    def limits(self, step: Tensor | None) -> tuple[Any, Any]:
        """r_max and d_max after so many steps; in full for None."""
        if step is None:
            return self.r_max, self.d_max
        # A number where it can be read at no cost: half of the time of a small call.
        known = step.item() if select.concrete(step) else step
        return (
            1 + (self.r_max - 1) * _grown(known, self.r_steps),
            self.d_max * _grown(known, self.d_steps),
        )

    def correction(
        self,
        mean: Tensor,
        var: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        step: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """r and d for these means and biased variances, of their shape and precision."""
        r_max, d_max = self.limits(step)
        inverse = torch.rsqrt(running_var.to(mean.dtype) + eps)
        r = (var + eps).sqrt() * inverse
        d = (mean - running_mean) * inverse
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)


def check_renorm(renorm: Renorm | None) -> None:
    """Refuse what is no `Renorm`."""
    if renorm is not None and not isinstance(renorm, Renorm):
        raise ArgumentError(
            f"expected renorm to be None or a Renorm, such as Renorm() with the paper's limits, "
            f"got {renorm!r}"
        )


def _grown(step: Tensor | float, steps: tuple[int, int]) -> Any:
    """How much of the way from the first of two steps to the second is done, from 0 to 1."""
    first, last = steps
    if not isinstance(step, Tensor):
        done = (step - first) / (last - first) if last > first else float(step >= first)
        return min(max(done, 0.0), 1.0)
    # Without a look at the value: on a device that would be a wait.
    away = (step - first).to(accumulation_dtype(step.device))
    return (away / (last - first)).clamp(0, 1) if last > first else (away >= 0).to(away.dtype)
