"""Whole calls by the C++ or Triton kernels: eager, running update included.

What they cannot do they leave to others, and have then changed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.ghost import Groups
from batchnorm.kernels import calls, native, reference, select
from batchnorm.moments import Axes, Moments, Pool, expand_mask
from batchnorm.running import Running, sound
from batchnorm.validation import Activation, Settings, check_kinds

Count = float | Tensor
"""The total weight behind statistics: where to read it would stall the device, a tensor."""


def step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    training: bool,
    settings: Settings,
    group_size: int = 0,
    sink: Callable[[Moments], None] | None = None,
    apart: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """`functional.step` by kernels, which check their own arguments; None: not served.

    With a group size, each group of so many samples is normalised by its own statistics; with
    `apart`, the sink gets those.
    """
    kernels = select.whole(x, weight, bias, residual)
    if kernels is None:
        return None
    if training and torch._C._current_graph_task_id() != -1:
        # As `select.recomputing`, 0.2 µs sooner.
        running, sink = (None, None, None), None
    mean, var, counter = running
    momentum, eps, channel_dim, activation = settings
    share = 0.0 if momentum is None and mean is None else share_of(momentum, counter)
    flags, after = (0, None) if activation is None else _fused(activation)
    if (
        share is None
        or flags is None
        or not (calls.serves_buffer(mean) and calls.serves_buffer(var))
        or not (type(eps) is float or type(eps) is int)
        or type(channel_dim) is not int
        or not -x.dim() <= channel_dim < x.dim()
        or (weight is not None and bias is not None and weight.dtype is not bias.dtype)
    ):
        return None
    if mask is not None:
        check_kinds(x, mask, residual)
        if mask.requires_grad or x.dim() < 2:
            return None
        mask = _weights(mask, x, channel_dim)
    updates = training and mean is not None
    # An activation or a hook may raise, and then nothing must have changed.
    later = updates and (after is not None or calls.hooked())
    if training:
        flags |= calls.TRAINING | calls.KEEP | (calls.LATER if later else 0)
        flags |= group_size and _grouped(x, group_size)
    options = mask, mean, var, counter, share, float(eps), channel_dim, flags
    kept: list[Any] = []
    served = _differentiable(kernels, x, weight, bias, residual, options, kept)
    if served is None:
        return None
    y, refused = served
    y = y if after is None else after(y)
    if sink is not None:
        channels = x.shape[channel_dim]
        of_sink = _of_groups(kept, channels, group_size) if apart else _of_batch(kept, channels)
        sink(_moments_of(*of_sink))
    if not updates or mean is None or var is None:
        return y, None
    if later:
        refused = kernels.update(*_of_batch(kept, len(mean)), mean, var, counter, share)
    # The kernels change memory behind autograd's back.
    torch.autograd.graph.increment_version((mean, var) if counter is None else (mean, var, counter))
    if not refused:
        return y, None
    of_batch = _moments_of(*_of_batch(kept, len(mean)))
    return y, ~sound(of_batch, mean, var, together=momentum is None)


def step_each(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    runnings: Sequence[Any],
    settings: Settings,
) -> tuple[Tensor, Tensor | None] | None:
    """`step` in training of several batches at once, (batches, N, C), each by its own statistics.

    Each has running statistics of its own; without any, none are kept. The settings are those of a
    batch, without an activation. Also returns which channels refused the first batch that was
    refused.
    """
    momentum = settings[0]
    if not native.serves(x, weight, bias, None) or not all(_fit(r, x.shape[2]) for r in runnings):
        return None
    found: list[Moments] = []
    served = step(
        *(x.flatten(0, 1), weight, bias, None, None, (None, None, None), True, settings),
        *(x.shape[1], found.append),
        apart=True,
    )
    if served is None:
        return None
    refusal = None
    for of_batches in found if runnings else ():  # nothing if this is done again
        count, rows = float(x.shape[1]), zip(of_batches.mean, of_batches.variance(), strict=True)
        for (mean, var, counter), batch in zip(runnings, rows, strict=True):
            share = share_of(momentum, counter)
            refused = native.update(*batch, count, mean, var, counter, share)
            if refused and refusal is None:
                of_batch = _moments_of(*batch, count)
                refusal = ~sound(of_batch, mean, var, together=momentum is None)
        torch.autograd.graph.increment_version([b for r in runnings for b in r])
    return served[0].view_as(x), refusal


def moments(
    x: Tensor, mask: Tensor | None, channel_dim: int, group_size: int
) -> tuple[Tensor, Tensor, Moments] | None:
    """Mean and biased variance of each group, and moments of the batch; None: not served.

    Of what `select.whole` has kernels for. In one group, they have the shape (C,).
    """
    kernels = select.whole(x, None, None, None)
    if kernels is None:
        return None
    mask = None if mask is None else _weights(mask, x, channel_dim)
    flags = _grouped(x, group_size)
    with torch.no_grad():  # or torch would tie the statistics to the graph of x
        statistics, count, served = kernels.moments(x, mask, channel_dim, flags)
    if served == calls.NOT_SERVED:
        return None
    channels = x.shape[channel_dim]
    mean, var = statistics[:, -channels:]
    total = _moments_of(mean, var, count)
    if statistics.shape[1] == channels:
        return mean, var, total
    means, variances = statistics[:, :-channels].unflatten(1, (-1, channels))
    return means, variances, total


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: tuple[Tensor, Tensor, Count],
    settings: Settings,
    group_size: int,
    pool: Pool | None,
) -> Tensor | None:
    """y by moments in which x has its share, as others may have theirs; None: not served.

    The moments, mean and biased variance of all groups and the total count, are as above; γ and β
    have a value for each channel, or are like the mean.
    """
    _, eps, channel_dim, activation = settings
    flags, after = (0, None) if activation is None else _fused(activation)
    if flags is None or (weight is not None and bias is not None and weight.dtype != bias.dtype):
        return None
    weight, bias = (None if v is None else v.flatten() for v in (weight, bias))
    mask = None if mask is None else _weights(mask, x, channel_dim)
    kernels = select.whole(x, weight, bias, residual)
    if kernels is None:
        return None
    mean, var, count = statistics
    flags |= _grouped(x, group_size)
    options = mask, mean.flatten(), var.flatten(), None, 0.0, float(eps), channel_dim, flags
    served = _differentiable(kernels, x, weight, bias, residual, options, [], (count, pool))
    if served is None:
        return None
    return served[0] if after is None else after(served[0])


def _weights(mask: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The mask as the operators read it."""
    mask = expand_mask(mask, x, channel_dim)
    return mask if mask.dtype in calls.MASKS else mask.double()  # mutant: only slower without


def _grouped(x: Tensor, size: int) -> int:
    """The flags that say how many samples make a group."""
    # More than there are would not fit into the number.
    return int(min(size, x.numel())) << calls.GROUP_BIT


def _fit(running: Running, channels: int) -> bool:
    """Whether `native.update` may change these: it does not ask, as `native.forward` does."""
    mean, var, counter = running
    return (
        all(
            vector is not None
            and calls.serves_buffer(vector)
            and vector.is_cpu
            and vector.shape == (channels,)
            and vector.dtype in (torch.float32, torch.float64)
            and vector.is_contiguous()
            for vector in (mean, var)
        )
        and counter is not None
        and counter.is_cpu
        and counter.dtype is torch.int64
        and counter.numel() == 1
    )


def _of_batch(kept: list[Any], channels: int) -> tuple[Tensor, Tensor, Count]:
    """Mean, biased variance and count of the whole batch, which stand behind those of groups."""
    statistics, count = kept
    mean, var = statistics[:, -channels:]
    return mean, var, count


def _of_groups(kept: list[Any], channels: int, size: int) -> tuple[Tensor, Tensor, float]:
    """The same of each group, in rows; all have that size."""
    statistics, _ = kept
    of_groups = statistics if statistics.shape[1] == channels else statistics[:, :-channels]
    mean, var = of_groups.unflatten(1, (-1, channels))
    return mean, var, float(size)


def _moments_of(mean: Tensor, var: Tensor, count: Count) -> Moments:
    # Filled in place, which is no wait for the device.
    known = count if isinstance(count, Tensor) else mean.new_full((), count)
    return Moments(known, mean, var * count)


def share_of(momentum: float | Tensor | None, counter: Tensor | None) -> float | None:
    """The weight of the batch as the operators know it, or None."""
    if type(momentum) is float or type(momentum) is int:
        return float(momentum) if 0 <= momentum <= 1 else math.nan  # which they refuse
    return calls.PLAIN_AVERAGE if momentum is None and counter is not None else None


def _fused(activation: Activation) -> tuple[int | None, Callable[[Tensor], Tensor] | None]:
    """The operators' number for an activation, or None if it is none; and what is left to do."""
    if isinstance(activation, str):
        return calls.ACTIVATIONS.get(activation), None
    return (0, activation) if callable(activation) else (None, None)


def _differentiable(
    kernels: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: tuple[Any, ...],
    kept: list[Any],
    moments: tuple[Count, Pool | None] | None = None,
) -> tuple[Tensor, int] | None:
    """`KernelFunction`, or the kernels alone where nobody asks for gradients; None: not served.

    `kept` gets the statistics (in evaluation, only where gradients are recorded) and their count.
    `moments` says that those given are moments: a count, and the others with a share in them.
    """
    try:
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            if not calls.saves(x, weight, bias, options[0]):
                return None
            y, refused = _apply(x, weight, bias, residual, (*options, kept, moments, kernels))
            return y, refused
        y, statistics, count, refused = kernels.forward(x, weight, bias, residual, *options)
    except (NotServedError, NotImplementedError):
        # The second: one of the tensors is on a device, or of a kind, that has no such kernels.
        return None
    kept += (statistics, count)
    return None if refused == calls.NOT_SERVED else (y, refused)


class NotServedError(Exception):
    """The kernels leave this call to others, and have changed nothing."""


#: What the backward pass is told of the flags; and which of them make it read β: for the sign of z,
#: or for its size, where groups may have their own.
_KEPT = calls.ACTIVATION | calls.TRAINING | -1 << calls.GROUP_BIT
_WITH_BIAS = calls.ACTIVATION | -1 << calls.GROUP_BIT

_LEAKY = calls.ACTIVATIONS["leaky_relu"]


class KernelFunction(torch.autograd.Function):
    """The kernels, running update included: eager calls only.

    The arguments after `residual`, packed because each one that autograd sees costs time: the mask
    (with a channel axis of size 1), running mean and variance, counter, momentum, eps, channel
    axis, and flags; then a list that gets the statistics and their count, and the kernels. With
    what `normalize` adds, a count and the others with a share in the statistics, mean and variance
    are moments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, int]:
        *call, kept, moments, kernels = options
        mask, mean, var, counter, momentum, eps, channel_dim, flags = call
        y, statistics, count, refused = kernels.forward(
            *(x, weight, bias, residual, mask, mean, var, counter, momentum, eps, channel_dim),
            flags | calls.KEEP,
        )
        if refused == calls.NOT_SERVED:
            raise NotServedError
        kept += (statistics, count)
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.backend = kernels, kernels.NAME
        pool = None
        if moments is not None:
            flags |= calls.TRAINING
            count, pool = moments
        ctx.flags = flags & _KEPT
        ctx.options = count, eps, channel_dim, pool
        ctx.bias_dtype = None if bias is None else bias.dtype
        # z's sign is computed again from x; with a residual, which is not kept, or with an x that
        # will not be quite this one (which is never so with relu), it is told from y.
        activation = flags & calls.ACTIVATION
        told = activation if residual is not None else activation == _LEAKY and calls.inexact()
        ctx.save_for_backward(
            x,
            weight,
            bias if flags & _WITH_BIAS else None,
            y if told else None,
            mask,
            statistics,
        )
        return y, refused

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        needs = ctx.needs_input_grad
        served = calls.NOT_SERVED
        # Unless someone will differentiate these gradients, or a torch.func transform is running.
        if not torch.is_grad_enabled() and calls.serves_gradient(dy):
            x, weight, bias, y, mask, statistics = ctx.saved_tensors
            flags = ctx.flags
            if needs[0]:
                flags |= calls.WANT_X
            if needs[1] or needs[2]:
                flags |= calls.WANT_PARAMETERS
            if needs[3]:
                flags |= calls.WANT_RESIDUAL
            count, eps, channel_dim, pool = ctx.options
            try:
                dx, dz, d_weight, d_bias, served = (
                    ctx.kernels.backward(
                        *(dy, x, y, statistics, weight, bias, mask, None),
                        *(count, eps, channel_dim, flags),
                    )
                    if pool is None or not needs[0]
                    else _shared_backward(
                        ctx.kernels,
                        (dy, x, y, statistics, weight, bias, mask),
                        (count, eps, channel_dim),
                        flags,
                        pool,
                    )
                )
            except NotImplementedError:
                # A hook has brought back tensors of another kind than were saved.
                served = calls.NOT_SERVED
        if served == calls.NOT_SERVED:
            out = _differentiable_gradients(ctx, dy)
            return (*(g if needed else None for g, needed in zip(out, needs, strict=False)), None)
        if needs[3] and dz is None:
            dz = dy
        return dx, d_weight if needs[1] else None, d_bias if needs[2] else None, dz, None


def _shared_backward(
    kernels: Any,
    tensors: tuple[Any, ...],
    options: tuple[Count, float, int],
    flags: int,
    pool: Pool,
) -> tuple[Any, ...]:
    """The operator's gradients where others have a share in the moments: by the sums of all."""
    sums, served = kernels.backward_reduce(*tensors, *options[1:], flags)
    if served == calls.NOT_SERVED:
        return None, None, None, None, served
    pooled = pool.sum(sums)
    flags &= ~calls.WANT_PARAMETERS
    dx, dz, _, _, served = kernels.backward(*tensors, pooled, *options, flags)
    # Those of γ and β are of the elements here.
    d_bias, d_weight = sums.unbind()
    for parameter in tensors[4:6]:  # of one dtype
        if parameter is not None:
            d_weight, d_bias = d_weight.to(parameter.dtype), d_bias.to(parameter.dtype)
    return dx, dz, d_weight, d_bias, served


# torch's own `apply`, a Python function, asks whether a torch.func transform is running or has left
# its wrapper around a tensor. Both have been asked: this is what it then calls, 1.6 µs sooner.
_apply = super(torch.autograd.Function, KernelFunction).apply


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    """KernelFunction's gradients as functions of its inputs, by the reference."""
    x, weight, bias, y, mask, statistics = ctx.saved_tensors
    count, eps, channel_dim, pool = ctx.options
    activation = calls.ACTIVATION_NAMES[ctx.flags & calls.ACTIVATION]
    dtypes = x.dtype, x.dtype if weight is None else weight.dtype, ctx.bias_dtype, dy.dtype
    sizes = [x.shape[channel_dim] if v is None else len(v) for v in (weight, bias)]
    groups = None
    axes: Axes = channel_dim
    mask = None if mask is None else mask.squeeze(channel_dim)
    if size := ctx.flags >> calls.GROUP_BIT:
        groups = Groups.of(x, size, channel_dim)
        axes, mask = groups.axes, groups.cut_mask(mask, x)
        x, dy = groups.cut(x), groups.cut(dy)
        y = None if y is None else groups.cut(y)
        weight, bias = (
            None if v is None else groups.spread(v, x.shape[groups.axes[1]]) for v in (weight, bias)
        )
    if pool is not None and not torch.is_grad_enabled():
        # The others will not merge once more.
        (mean, var), total = statistics, torch.as_tensor(count).to(statistics)
    elif ctx.flags & calls.TRAINING:
        moments = Moments.of(x, mask, channel_dim=axes)
        if pool is not None:
            moments, _ = pool.merge(moments)
        mean, var, total = moments.mean, moments.normalizing_variance(), moments.count
    else:
        (mean, var), total = statistics, None
    options: Any = {"eps": eps, "activation": activation, "channel_dim": axes}
    if activation is not None and y is None:
        with torch.no_grad():
            y = reference.normalize(x, mean, var, weight, bias, None, **options)
    weights = None if mask is None else expand_mask(mask, x, axes).to(mean.dtype)
    pool = pool if ctx.needs_input_grad[0] else None
    out = reference.backward(dy, x, y, weights, total, mean, var, weight, pool=pool, **options)
    wanted = list(out)
    if groups is not None:
        parameters = map(groups.gather, out[1:3], sizes)
        wanted = [groups.join(out.x), *parameters, groups.join(out.z)]
    return tuple(g.to(dtype) for g, dtype in zip(wanted, dtypes, strict=True))
