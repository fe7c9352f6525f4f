"""From tensors to launches: the operations that every set of kernels has.

Signatures, flags and results are those of native/ops.cpp, except that a count which a mask decides
is a tensor, and that nothing is known of channels that refuse an update: to ask would stall the
device. What is not served is left untouched.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import calls
from batchnorm.kernels.reference import LEAKY_SLOPE
from batchnorm.kernels.triton.launcher import launch, on
from batchnorm.kernels.triton.operand import (
    Operand,
    are_running,
    doubled,
    fewest,
    grouping,
    is_counter,
    is_like,
    served,
)
from batchnorm.kernels.triton.plans import power_of_two

Count = float | Tensor

#: Arguments of a pass that there are none of: what to merge and where to; running statistics.
_NO_RUNNING = (None, None, None, 0.0, 0.0)
_NO_MERGE = (None, None, None, *_NO_RUNNING)

#: Channels that the one program which updates alone takes at once, 8 of a thread, and its warps.
UPDATED, UPDATING_WARPS = 1024, 4

#: Channels of a program that merges groups: a line of the cache. It reads as many numbers at once
#: as will be 8 of a thread.
POOLED, POOLED_PARTS, POOLING_WARPS = 16, 1024, 4


@lru_cache(maxsize=1)
def device() -> Any:
    """The kernels, imported when they are wanted first: Triton takes half a second."""
    from batchnorm.kernels.triton.device import backward, forward, merge, moments

    return SimpleNamespace(backward=backward, forward=forward, merge=merge, moments=moments)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float,
    eps: float,
    channel_dim: int,
    flags: int,
) -> tuple[Tensor, Tensor | None, Count, int]:
    """y, its statistics (mean and biased variance, float64), the count behind them, and 0.

    In training the running statistics take the batch in, unless `LATER` is set.
    """
    training = bool(flags & calls.TRAINING)
    if (
        not served(x, mask, (weight, bias), eps, channel_dim, flags)
        or not are_running((running_mean, running_var), x, channel_dim, flags)
        or not (residual is None or is_like(residual, x))
        or not (counter is None or is_counter(counter, x))
        or (running_mean is None) != (running_var is None)
        or not momentum <= 1
        or (training and momentum == calls.PLAIN_AVERAGE and counter is None)
        or (training and mask is None and fewest(x, channel_dim, flags) < 2)
    ):
        return x, None, 0.0, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask if training else None, flags)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = of.like(dtype)
    added = None if residual is None else of.arranged(residual)
    data = of.x, added, y, of.each(weight), of.each(bias)
    with on(x):
        if training:
            running = running_mean, running_var, counter
            statistics, count = _train(of, data, running, momentum, eps, flags)
            return y, statistics, count, 0
        if running_mean is None or running_var is None:
            return x, None, 0.0, calls.NOT_SERVED
        given: tuple[Tensor, ...] = running_mean, running_var
        kept = of.numbers(2, of.row) if flags & calls.KEEP else None
        if kept is not None:
            given = kept[:, : of.slots].copy_(torch.stack(given)).unbind()
        _normalize(of, data, given, eps, flags)
        return y, kept, 0.0, 0


def _train(
    of: Operand,
    data: tuple[Tensor | None, ...],
    running: tuple[Tensor | None, ...],
    momentum: float,
    eps: float,
    flags: int,
) -> tuple[Tensor, Count]:
    """Moments, running update and output; the statistics, and their count."""
    statistics = of.numbers(2, of.row)
    count = None if of.mask is None else of.numbers()
    known: Count = float(of.values) if count is None else count
    # In a plain average all channels take the batch in or none does: that needs a look at all. And
    # of groups all are wanted.
    apart = momentum == calls.PLAIN_AVERAGE or of.groups > 1
    later = apart or flags & calls.LATER or running[0] is None
    merge: tuple[Any, ...] = statistics, count if of.groups == 1 else None, *_NO_RUNNING
    if not later:
        merge = statistics, count, *running, *doubled(momentum)
    if of.plan.whole:
        x, *others = data
        args = x, of.mask, *others, *merge, *doubled(eps), *of.plan.shape
        _run(device().forward.whole_kernel, of, args, *_activation(flags))
    else:
        partial = _partial_moments(of)
        if of.plan.folds:
            _normalize(of, data, (None, None), eps, flags, (partial, *merge))
        else:
            _finish_moments(of, partial, merge)
            _normalize(of, data, statistics.unbind(), eps, flags)
    if of.groups > 1:
        _pool(of, statistics, count)
    mean, var, counter = running
    if apart and mean is not None and var is not None and not flags & calls.LATER:
        batch_mean, batch_var = statistics[:, -of.channels :]
        update(batch_mean, batch_var, known, mean, var, counter, momentum)
    return statistics, known


def _activation(flags: int) -> tuple[int, float]:
    return flags & calls.ACTIVATION, LEAKY_SLOPE


def _run(kernel: Any, of: Operand, args: tuple[Any, ...], *constants: Any) -> None:
    """A pass, or all of it in one launch."""
    launch(kernel, of.x, of.plan.grid, args, (*of.plan.constants, *constants), of.plan.warps)


def _merge(kernel: Any, of: Operand, args: tuple[Any, ...]) -> None:
    """What merges between the passes."""
    args = *args, of.plan.splits
    launch(kernel, of.x, (of.slots,), args, (1, of.plan.merged_parts), of.plan.merging_warps)


def _partial_moments(of: Operand) -> Tensor:
    partial = of.numbers(3, of.slots, of.plan.splits)
    args = of.x, of.mask, partial, *of.plan.shape, *of.plan.passes
    _run(device().moments.moments_kernel, of, args)
    return partial


def _finish_moments(of: Operand, partial: Tensor, merge: tuple[Any, ...]) -> None:
    _merge(device().merge.finish_kernel, of, (partial, *merge, of.slots, of.row))


def _pool(of: Operand, statistics: Tensor, total: Tensor | None) -> None:
    """Statistics of all groups together, behind those of each."""
    outer, all_outer, *_ = of.plan.shape
    counts = None if of.mask is None else of.counts
    args = statistics, counts, total, of.channels, of.groups, outer, all_outer, of.lies.inner
    channels = min(POOLED, power_of_two(of.channels))
    groups = min(POOLED_PARTS // channels, power_of_two(of.groups))
    grid = (-(-of.channels // channels),)
    launch(device().merge.pool_kernel, of.x, grid, args, (channels, groups), POOLING_WARPS)


def _normalize(
    of: Operand,
    data: tuple[Tensor | None, ...],
    given: tuple[Tensor | None, ...],
    eps: float,
    flags: int,
    merge: tuple[Any, ...] = _NO_MERGE,
) -> None:
    """y by the moments given, or by those that are to be merged."""
    args = *data, *given, *merge, *doubled(eps), *of.plan.shape, *of.plan.passes, of.plan.splits
    _run(device().forward.normalize_kernel, of, args, of.plan.parts, *_activation(flags))


def update(
    mean: Tensor,
    var: Tensor,
    count: Count,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    momentum: float,
) -> int:
    """The running statistics alone take the batch in; 0."""
    running = running_mean, running_var, counter
    args = mean, var, *_counted(count), *running, *doubled(momentum), len(running_mean)
    block = min(UPDATED, power_of_two(len(running_mean)))
    constants = momentum == calls.PLAIN_AVERAGE, block
    with on(mean):
        launch(device().merge.update_kernel, mean, (1,), args, constants, UPDATING_WARPS)
    return 0


def _counted(count: Count) -> tuple[Any, float, float]:
    return (count, 0.0, 0.0) if isinstance(count, Tensor) else (None, *doubled(float(count)))


def moments(
    x: Tensor, mask: Tensor | None, channel_dim: int, flags: int
) -> tuple[Tensor | None, Count, int]:
    """The statistics alone, and the total weight behind them."""
    if not served(x, mask, (), 1.0, channel_dim, flags):
        return None, 0.0, calls.NOT_SERVED
    if flags >> calls.GROUP_BIT and mask is None and fewest(x, channel_dim, flags) < 2:
        return None, 0.0, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask, flags)
    statistics = of.numbers(2, of.row)
    count = None if mask is None else of.numbers()
    with on(x):
        apart = count if of.groups == 1 else None
        _finish_moments(of, _partial_moments(of), (statistics, apart, *_NO_RUNNING))
        if of.groups > 1:
            _pool(of, statistics, count)
    return statistics, float(of.values) if count is None else count, 0


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    count: Count,
    eps: float,
    channel_dim: int,
    flags: int,
) -> Gradients:
    """Gradients of x, of z (None: it is dy), of γ and of β; those that the flags want.

    With the sums of all who share the moments given, dx is by those, and γ and β get none.
    """
    activation = flags & calls.ACTIVATION
    if not _fits(dy, x, y, statistics, weight, bias, mask, eps, channel_dim, flags) or (
        flags & calls.WANT_RESIDUAL and activation and y is None
    ):
        return None, None, None, None, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask, flags)
    if sums is not None and sums.shape != (2, of.slots):
        return None, None, None, None, calls.NOT_SERVED
    dx = of.like(x.dtype) if flags & calls.WANT_X else None
    dz = None
    if flags & calls.WANT_RESIDUAL and (activation or mask is not None):
        dz = of.like(dy.dtype)
    parameters = of.gradients(weight, bias) if flags & calls.WANT_PARAMETERS else (None, None)
    data = of.arranged(dy), of.x, _sign(of, y, flags), of.mask
    channel = statistics, of.each(weight), of.each(bias)
    if of.groups > 1:  # the count is of all; without a mask the kernels know each group's
        count = 0.0 if dx is None or of.mask is None else of.counts
    with on(x):
        _gradients(of, data, (dx, dz, *parameters), channel, sums, _counted(count), eps, flags)
    return dx, dz, *of.together(parameters, weight, bias), 0


def _gradients(
    of: Operand,
    data: tuple[Tensor | None, ...],
    gradients: tuple[Tensor | None, ...],
    channel: tuple[Tensor | None, ...],
    sums: Tensor | None,
    counted: tuple[Any, ...],
    eps: float,
    flags: int,
) -> None:
    dx, dz, *outs = gradients
    training = bool(flags & calls.TRAINING)
    if of.plan.whole and sums is None:
        kernel = device().backward.whole_gradient_kernel
        rest = *outs, *counted, *doubled(eps), *of.plan.shape
        _run(kernel, of, (*data, dx, dz, *channel, *rest), *_activation(flags), training)
        return
    partial = None
    if dz is not None or (sums is None and (training or outs[0] is not None)):
        partial = _partial_sums(of, data, dz, channel, eps, flags)
    through = training and dx is not None  # the gradient goes through the moments
    if partial is not None and sums is None and not (through and of.plan.folds):
        sums = of.numbers(2, of.slots) if through else None
        _finish_sums(of, partial, sums, *outs)
    if dx is not None:
        if sums is not None or not training:
            partial, outs = None, [None, None]
        # What the first pass has written is all that the second needs of dy and y, unless rounding
        # has changed it.
        if dz is not None and (flags & calls.ACTIVATION < 2 or dz.dtype is torch.float32):
            data, flags = (dz, of.x, None, of.mask), flags & ~calls.ACTIVATION
        given = sums if training else None, partial, *outs, *counted, *doubled(eps)
        args = *data, dx, *channel, *given, *of.plan.shape, *of.plan.passes, of.plan.splits
        kernel = device().backward.gradient_kernel
        _run(kernel, of, args, of.plan.parts, *_activation(flags))


def _fits(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    channel_dim: int,
    flags: int,
) -> bool:
    if not served(x, mask, (weight, bias), eps, channel_dim, flags):
        return False
    _, groups = grouping(x, channel_dim, flags)
    return (
        is_like(dy, x)
        and (y is None or is_like(y, x))
        and statistics.shape == (2, (groups + (groups > 1)) * x.shape[channel_dim])
        and statistics.dtype is torch.float64
        and statistics.is_contiguous()
    )


def _sign(of: Operand, y: Tensor | None, flags: int) -> Tensor | None:
    """What tells the activation's side, if x does not."""
    return None if y is None or not flags & calls.ACTIVATION else of.arranged(y)


def _partial_sums(
    of: Operand,
    data: tuple[Tensor | None, ...],
    dz: Tensor | None,
    channel: tuple[Tensor | None, ...],
    eps: float,
    flags: int,
) -> Tensor:
    partial = of.numbers(2, of.slots, of.plan.splits)
    args = *data, dz, *channel, partial, *doubled(eps), *of.plan.shape, *of.plan.passes
    _run(device().backward.sums_kernel, of, args, *_activation(flags))
    return partial


def _finish_sums(
    of: Operand,
    partial: Tensor,
    sums: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    _merge(device().backward.finish_sums_kernel, of, (partial, sums, d_weight, d_bias, of.slots))


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    channel_dim: int,
    flags: int,
) -> tuple[Tensor | None, int]:
    """The first half alone: Σdz and Σdz·x̂ of each channel, float64, for `backward` to be given."""
    if not _fits(dy, x, y, statistics, weight, bias, mask, eps, channel_dim, flags):
        return None, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask, flags)
    data = of.arranged(dy), of.x, _sign(of, y, flags), of.mask
    channel = statistics, of.each(weight), of.each(bias)
    sums = of.numbers(2, of.slots)
    with on(x):
        partial = _partial_sums(of, data, None, channel, eps, flags)
        _finish_sums(of, partial, sums, None, None)
    return sums, 0
