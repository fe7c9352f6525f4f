"""The running statistics take a batch's moments in: what they become, and which channels refuse."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.kernels import select
from batchnorm.moments import Moments, accumulation_dtype
from batchnorm.validation import MIN_COUNT

Running = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Running mean, running variance, and the number of batches taken in so far. A plain tuple: a call
of a few microseconds makes one."""


def sound(moments: Moments, running_mean: Tensor, running_var: Tensor, *, together: bool) -> Tensor:
    """Which channels' batch statistics the running ones may take in, in the buffers' dtypes.

    With `together`: all, or none.
    """
    taken = (
        moments.mean.to(running_mean.dtype).isfinite()
        & moments.variance(correction=1).to(running_var.dtype).isfinite()
        # Too small a count has been refused where that could be seen: not under compilation.
        & (moments.count >= MIN_COUNT)
    )
    return taken.all().expand_as(taken) if together else taken


class Update(NamedTuple):
    """New running statistics, and the channels that kept theirs because of a NaN or infinity.

    `refused` is None where it is known that there are none.
    """

    mean: Tensor
    var: Tensor
    refused: Tensor | None


@torch.no_grad()
def updated(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | Tensor,
    *,
    together: bool = False,
) -> Update:
    """(1 − momentum) · running + momentum · batch, with the unbiased variance, per channel.

    A channel with a batch statistic that is not finite, or would not be in the buffers' dtype,
    keeps both of its own; with `together`, all channels do.
    """
    wide = moments.mean.dtype
    unbiased = moments.variance(correction=1)
    mean = running_mean.to(wide).lerp(moments.mean, momentum).to(running_mean.dtype)
    var = running_var.to(wide).lerp(unbiased, momentum).to(running_var.dtype)
    # The usual case, at half the cost. A sum is finite only if all its terms are.
    if select.concrete(mean) and math.isfinite((mean + var).sum().item()):
        return Update(mean, var, None)  # mutant: only slower without
    taken = sound(moments, running_mean, running_var, together=together)
    return Update(
        torch.where(taken, mean, running_mean), torch.where(taken, var, running_var), ~taken
    )


def assign(running_mean: Tensor, running_var: Tensor, update: Update) -> bool:
    """Write an update into the buffers; False if a channel is known to have refused it.

    Raises:
        InputError: a torch.func transform is running over the update but not over the buffers.
    """
    if select.transformed(update.mean) and not select.transformed(running_mean):
        raise InputError(
            "expected running statistics that the surrounding torch.func transform (vmap, grad, "
            "jvp, …) knows of: it cannot change captured buffers in place. Use batch_norm_pure, "
            "which returns the new statistics, or eval(), or track_running_stats=False"
        )
    running_mean.copy_(update.mean)
    running_var.copy_(update.var)
    refused = update.refused
    return refused is None or not (select.concrete(refused) and bool(refused.any()))


def take_in(running: Running, moments: Moments, momentum: float | Tensor | None) -> Tensor | None:
    """Running statistics and counter take a batch in, in place; which channels refuse, if known.

    Momentum None makes a plain average of all batches; a number without a counter, no counting.
    """
    mean, var, counter = running
    if mean is None or var is None:
        return None
    share: float | Tensor = 0.0
    if momentum is not None:
        share = momentum
    elif counter is not None:
        # Not 1.0 / counter: of a whole number that is float32, and 1e-8 off.
        share = (counter + 1).to(accumulation_dtype(counter.device)).reciprocal()
    # In a plain average every channel must have the same number of batches behind it.
    update = updated(mean, var, moments, share, together=momentum is None)
    finite = assign(mean, var, update)
    if counter is not None:
        counter.add_(1 if update.refused is None else update.refused.logical_not().any())
    return None if finite else update.refused


def nonfinite_message(refused: Tensor) -> str:
    """What to tell the user about the channels that refused an update."""
    channels = refused.nonzero().flatten().tolist()
    shown = ", ".join(map(str, channels[:8])) + (", …" if len(channels) > 8 else "")
    return (
        f"the batch holds NaN or infinity, or overflows, in {len(channels)} of "
        f"{refused.numel()} channels ({shown}); their running statistics were left as they "
        "were. Look for the cause upstream: torch.autograd.set_detect_anomaly(True), a smaller "
        "learning rate, a loss scale, the data"
    )
