"""From tensors to launches: the operations that every set of kernels has.

Signatures, flags and results are those of native/ops.cpp, except that a count which a mask decides
is a tensor, and that nothing is known of channels that refuse an update: to ask would stall the
device. What is not served is left untouched.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import calls
from batchnorm.kernels.reference import LEAKY_SLOPE
from batchnorm.kernels.triton.operand import (
    COMPILED,
    Operand,
    doubled,
    is_counter,
    is_like,
    recorded,
    served,
)
from batchnorm.kernels.triton.plans import MERGED, MERGING_WARPS, power_of_two

Count = float | Tensor

#: Arguments of a pass that there are none of: what to merge and where to; running statistics.
_NO_RUNNING = (None, None, None, 0.0, 0.0)
_NO_MERGE = (None, None, None, *_NO_RUNNING)


@lru_cache(maxsize=1)
def device() -> Any:
    """The kernels, imported when they are wanted first: Triton takes half a second."""
    from batchnorm.kernels.triton.device import backward, forward, moments

    return SimpleNamespace(backward=backward, forward=forward, moments=moments)


def on(x: Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    if not x.is_cuda or recorded(x) or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def ready(kernel: Any, x: Tensor) -> Any:
    """What launches the kernel: itself, or what puts the launch into the graph that is recorded."""
    return Recorded(kernel) if recorded(x) else kernel


class Recorded:
    """A kernel whose launches become nodes of a graph."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = torch.library.wrap_triton(kernel)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            # The graph has no place for this option; without it Triton does the same.
            del constants["enable_fp_fusion"]
            self.kernel[grid](*args, **constants)

        return launch


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
        not served(x, (weight, bias, running_mean, running_var), eps, channel_dim, flags)
        or not (residual is None or is_like(residual, x))
        or not (counter is None or is_counter(counter, x))
        or (running_mean is None) != (running_var is None)
        or not momentum <= 1
        or (training and mask is None and x.numel() < 2 * x.shape[channel_dim])
    ):
        return x, None, 0.0, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask if training else None)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = of.like(dtype)
    data = of.x, None if residual is None else of.arranged(residual), y, weight, bias
    with on(x):
        if training:
            running = running_mean, running_var, counter
            statistics, count = _train(of, data, running, momentum, eps, flags)
            return y, statistics, count, 0
        if running_mean is None or running_var is None:
            return x, None, 0.0, calls.NOT_SERVED
        given: tuple[Tensor, ...] = running_mean, running_var
        kept = torch.stack(given).to(torch.float64) if flags & calls.KEEP else None
        _normalize(of, data, given if kept is None else kept.unbind(), eps, flags)
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
    statistics = of.numbers(2, of.channels)
    count = None if of.mask is None else of.numbers()
    known: Count = float(of.values) if count is None else count
    # In a plain average all channels take the batch in or none does: that needs a look at all.
    apart = momentum == calls.PLAIN_AVERAGE
    later = apart or flags & calls.LATER or running[0] is None
    merge: tuple[Any, ...] = statistics, count, *_NO_RUNNING
    if not later:
        merge = statistics, count, *running, *doubled(momentum)
    if of.plan.whole:
        x, *others = data
        ready(device().forward.whole_kernel, of.x)[(of.plan.blocks,)](
            *(x, of.mask, *others, *merge, *doubled(eps), *of.shape),
            **of.constants,
            **_activation(flags),
        )
    else:
        partial = _partial_moments(of)
        if of.plan.folds:
            _normalize(of, data, (None, None), eps, flags, (partial, *merge))
        else:
            _finish_moments(of, partial, merge)
            _normalize(of, data, statistics.unbind(), eps, flags)
    mean, var, counter = running
    if apart and mean is not None and var is not None and not flags & calls.LATER:
        update(statistics[0], statistics[1], known, mean, var, counter, momentum)
    return statistics, known


def _activation(flags: int) -> dict[str, Any]:
    return {"ACTIVATION": flags & calls.ACTIVATION, "SLOPE": LEAKY_SLOPE}


def _partial_moments(of: Operand) -> Tensor:
    partial = of.numbers(3, of.plan.splits, of.channels)
    ready(device().moments.moments_kernel, of.x)[of.grid](
        of.x, of.mask, partial, *of.shape, *of.passes, **of.constants
    )
    return partial


def _finish_moments(of: Operand, partial: Tensor, merge: tuple[Any, ...]) -> None:
    ready(device().moments.finish_kernel, of.x)[(-(-of.channels // MERGED),)](
        *(partial, *merge, of.channels, of.plan.splits),
        BC=MERGED,
        BS=of.plan.merged_parts,
        num_warps=MERGING_WARPS,
        **COMPILED,
    )


def _normalize(
    of: Operand,
    data: tuple[Tensor | None, ...],
    given: tuple[Tensor | None, ...],
    eps: float,
    flags: int,
    merge: tuple[Any, ...] = _NO_MERGE,
) -> None:
    """y by the moments given, or by those that are to be merged."""
    ready(device().forward.normalize_kernel, of.x)[of.grid](
        *(*data, *given, *merge, *doubled(eps), *of.shape, *of.passes, of.plan.splits),
        BS=of.plan.parts,
        **of.constants,
        **_activation(flags),
    )


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
    together = momentum == calls.PLAIN_AVERAGE
    with on(mean):
        device().moments.update_kernel[(1,)](
            *(mean, var, *_counted(count), running_mean, running_var, counter),
            *(*doubled(momentum), len(running_mean)),
            TOGETHER=together,
            BC=min(1024, power_of_two(len(running_mean))),
            num_warps=4,
            **COMPILED,
        )
    return 0


def _counted(count: Count) -> tuple[Any, float, float]:
    return (count, 0.0, 0.0) if isinstance(count, Tensor) else (None, *doubled(float(count)))


def moments(
    x: Tensor, mask: Tensor | None, channel_dim: int, flags: int
) -> tuple[Tensor | None, Count, int]:
    """The statistics alone, and the total weight behind them."""
    if not served(x, (), 1.0, channel_dim, flags):
        return None, 0.0, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask)
    statistics = of.numbers(2, of.channels)
    count = None if mask is None else of.numbers()
    with on(x):
        _finish_moments(of, _partial_moments(of), (statistics, count, *_NO_RUNNING))
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
    activation, training = flags & calls.ACTIVATION, bool(flags & calls.TRAINING)
    if not _fits(dy, x, y, statistics, weight, bias, eps, channel_dim, flags) or (
        flags & calls.WANT_RESIDUAL and activation and y is None
    ):
        return None, None, None, None, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask)
    dx = of.like(x.dtype) if flags & calls.WANT_X else None
    dz = None
    if flags & calls.WANT_RESIDUAL and (activation or mask is not None):
        dz = of.like(dy.dtype)
    d_weight = d_bias = None
    if flags & calls.WANT_PARAMETERS:
        like = weight if weight is not None else bias
        dtype = torch.float64 if like is None else like.dtype
        d_weight, d_bias = (
            torch.empty(of.channels, dtype=dtype, device=x.device) for _ in range(2)
        )
    data = of.arranged(dy), of.x, _sign(of, y, flags), of.mask
    channel = statistics, weight, bias
    counted = _counted(count)
    with on(x):
        if of.plan.whole and sums is None:
            ready(device().backward.whole_gradient_kernel, of.x)[(of.plan.blocks,)](
                *(*data, dx, dz, *channel, d_weight, d_bias, *counted, *doubled(eps), *of.shape),
                TRAINING=training,
                **of.constants,
                **_activation(flags),
            )
            return dx, dz, d_weight, d_bias, 0
        partial = None
        if dz is not None or (sums is None and (training or d_weight is not None)):
            partial = _partial_sums(of, data, dz, channel, eps, flags)
        through = training and dx is not None  # the gradient goes through the moments
        outs = d_weight, d_bias
        if partial is not None and sums is None and not (through and of.plan.folds):
            sums = of.numbers(2, of.channels) if through else None
            _finish_sums(of, partial, sums, *outs)
        if dx is not None:
            if sums is not None or not training:
                partial, outs = None, (None, None)
            # What the first pass has written is all that the second needs of dy and y, unless
            # rounding has changed it.
            if dz is not None and (activation < 2 or dz.dtype is torch.float32):
                data, flags = (dz, of.x, None, of.mask), flags & ~calls.ACTIVATION
            ready(device().backward.gradient_kernel, of.x)[of.grid](
                *(*data, dx, *channel, sums if training else None, partial, *outs),
                *(*counted, *doubled(eps), *of.shape, *of.passes, of.plan.splits),
                BS=of.plan.parts,
                **of.constants,
                **_activation(flags),
            )
    return dx, dz, d_weight, d_bias, 0


def _fits(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_dim: int,
    flags: int,
) -> bool:
    return (
        served(x, (weight, bias), eps, channel_dim, flags)
        and is_like(dy, x)
        and (y is None or is_like(y, x))
        and statistics.shape == (2, x.shape[channel_dim])
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
    partial = of.numbers(2, of.plan.splits, of.channels)
    ready(device().backward.sums_kernel, of.x)[of.grid](
        *(*data, dz, *channel, partial, *doubled(eps), *of.shape, *of.passes),
        **of.constants,
        **_activation(flags),
    )
    return partial


def _finish_sums(
    of: Operand,
    partial: Tensor,
    sums: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    ready(device().backward.finish_sums_kernel, of.x)[(-(-of.channels // MERGED),)](
        *(partial, sums, d_weight, d_bias, of.channels, of.plan.splits),
        BC=MERGED,
        BS=of.plan.merged_parts,
        num_warps=MERGING_WARPS,
        **COMPILED,
    )


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
    if not _fits(dy, x, y, statistics, weight, bias, eps, channel_dim, flags):
        return None, calls.NOT_SERVED
    of = Operand.of(x, channel_dim, mask)
    data = of.arranged(dy), of.x, _sign(of, y, flags), of.mask
    sums = of.numbers(2, of.channels)
    with on(x):
        partial = _partial_sums(of, data, None, (statistics, weight, bias), eps, flags)
        _finish_sums(of, partial, sums, None, None)
    return sums, 0
