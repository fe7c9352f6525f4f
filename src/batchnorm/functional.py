"""batch_norm(): from tensors to output and running statistics.

Two questions, asked in this order: which elements make the statistics (`Moments`), and with what
does the layer normalise (those moments, or the running ones). `validation` refuses what does not
fit, `autograd` makes the kernels differentiable, `running` has the update of the running
statistics; `autograd_kernels` does all of it at once where the C++ kernels can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from batchnorm import autograd_kernels, pooled
from batchnorm.autograd import function
from batchnorm.errors import NonFiniteWarning
from batchnorm.kernels import select
from batchnorm.moments import Moments
from batchnorm.pooled import Population
from batchnorm.renorm import Renorm, check_renorm
from batchnorm.running import Running, nonfinite_message, take_in, updated
from batchnorm.sync import Group, Synchronizer, check_group, resolve
from batchnorm.validation import (
    Activation,
    Settings,
    check_count,
    check_momentum,
    check_options,
    check_tensors,
    check_virtual_batch_size,
)


class BatchNormOutput(NamedTuple):
    """What `batch_norm_pure` returns.

    Attributes:
        output: y, the shape of x.
        running_mean: the new running mean, or None if none was given.
        running_var: the new running variance, or None if none was given.
    """

    output: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    channel_dim: int = 1,
    activation: Activation = None,
    virtual_batch_size: int | None = None,
    renorm: Renorm | None = None,
    process_group: Group = None,
) -> Tensor:
    """Normalise each channel to mean 0 and variance 1, then scale, shift, add and activate.

        y = activation(γ · (x − mean) / √(var + eps) + β + residual)

    In training, mean and var are the batch's own, over all axes but the channels', var the *biased*
    variance (divided by n); in evaluation they are the running ones, constants. In training the
    running statistics move toward the batch's, in place, by `momentum`, the weight of the *new*
    value (torch's sense; Keras and Flax weigh the old one), and the variance they take in is the
    *unbiased* one (divided by n − 1):

        running ← (1 − momentum) · running + momentum · batch

    The leading arguments are those of `torch.nn.functional.batch_norm`. Gradients of x,
    weight, bias and residual are exact to any order; a mask is not differentiated.

    Args:
        x: floating, any rank from 2 up, C channels on `channel_dim`.
        running_mean: (C,), or None to keep none.
        running_var: (C,), or None to keep none.
        weight: γ, (C,), or None for ones.
        bias: β, (C,), or None for zeros.
        training: normalise by the batch and update the running statistics.
        momentum: in [0, 1].
        eps: positive, in the square of the unit of x.
        mask: shape of x without the channel axis, broadcastable: bool, True = counts, or
            non-negative weights (frequencies: 2 counts as two equal elements). It decides the
            statistics only: every element is normalised. What it leaves out may hold NaN.
        residual: shape of x.
        channel_dim: the axis of the channels.
        activation: None; "relu" or "leaky_relu" (slope 0.01), fused; or any function of a tensor.
        virtual_batch_size: in training, normalise each group of so many samples by its own
            statistics (ghost batches); the last may be smaller. The running statistics take in all
            groups together, once.
        renorm: in training, draw the batch's statistics toward the running ones; see `Renorm`.
        process_group: in training, share the statistics with these processes, as if one had the
            batches of all, in the order of ranks; "world": with all. See `BatchNorm`.

    Returns:
        y, the shape of x, its dtype (promoted with the residual's), its memory format. Statistics
        are accumulated in float64, or by kernels that are as good for this call
        (`batchnorm.backends()`); running statistics keep their own dtype.

    Raises:
        ArgumentError: an option is impossible.
        InputError: the tensors do not fit, or in training a channel has fewer than two values, or
            a mask that counts for less. Nothing has been changed. (What the values of a mask
            decide is checked on the CPU only: elsewhere, and under compilation, a check would
            stall the device.)
        SyncError: the processes that share statistics do not agree, or did not all come.

    Warns:
        NonFiniteWarning: a channel's batch statistics are not finite. Its running statistics are
            left as they were; those of other channels are updated. (Told on the CPU, uncompiled.)

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> import torch
        >>> from batchnorm import batch_norm
        >>> x = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
        >>> batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1., -1.],
                [ 1.,  1.]])
        >>> mean, var = torch.zeros(2), torch.ones(2)
        >>> _ = batch_norm(x, mean, var, training=True, momentum=0.5)
        >>> mean, var
        (tensor([ 0.5000, 10.0000]), tensor([  1.5000, 100.5000]))
    """
    check_momentum(momentum)
    running, settings = (running_mean, running_var, None), (momentum, eps, channel_dim, activation)
    population = population_of(virtual_batch_size, renorm, process_group, running)
    y, refused = step(x, weight, bias, residual, mask, running, training, settings, population)
    if refused is not None:
        warnings.warn(nonfinite_message(refused), NonFiniteWarning, stacklevel=2)
    return y


def batch_norm_pure(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    channel_dim: int = 1,
    activation: Activation = None,
    virtual_batch_size: int | None = None,
    renorm: Renorm | None = None,
    process_group: Group = None,
) -> BatchNormOutput:
    """As `batch_norm`, but the new running statistics are returned and nothing is changed in place.

    The form for torch.func: vmap, grad and jacrev over a training step.

    Returns:
        BatchNormOutput(output, running_mean, running_var). In evaluation the statistics come back
        as they are. Channels whose batch statistics are not finite keep their old values, silently.

    Raises:
        ArgumentError, InputError, SyncError: as `batch_norm`.

    Example:
        >>> import torch
        >>> from batchnorm import batch_norm_pure
        >>> models = torch.randn(3, 8, 2)  # three batches of 8, two channels
        >>> step = lambda x: batch_norm_pure(x, torch.zeros(2), torch.ones(2), training=True)
        >>> torch.func.vmap(step)(models).running_mean.shape
        torch.Size([3, 2])
    """
    check_momentum(momentum)
    running, settings = (running_mean, running_var, None), (momentum, eps, channel_dim, activation)
    population = population_of(virtual_batch_size, renorm, process_group, running)
    # Not by `step`, which leaves out what is computed again: this changes nothing that counts.
    if select.whole(x, weight, bias, residual) and not select.recomputing():
        if training and running_mean is not None and running_var is not None:
            running = running_mean.detach().clone(), running_var.detach().clone(), None
        y, _ = step(x, weight, bias, residual, mask, running, training, settings, population)
        return BatchNormOutput(y, *running[:2])
    y, moments = normalize(x, weight, bias, residual, mask, running, training, settings, population)
    if moments is None or running_mean is None or running_var is None:
        return BatchNormOutput(y, running_mean, running_var)
    update = updated(running_mean, running_var, moments, momentum)
    return BatchNormOutput(y, update.mean, update.var)


def population_of(
    virtual_batch_size: int | None,
    renorm: Renorm | None,
    process_group: Group,
    reference: Running,
) -> Population | None:
    """What the arguments ask for besides the batch; None for nothing.

    Raises:
        ArgumentError: one of them is impossible.
    """
    if virtual_batch_size is None and renorm is None and process_group is None:
        return None
    check_virtual_batch_size(virtual_batch_size)
    check_renorm(renorm)
    check_group(process_group)
    group = resolve(process_group)
    sync = None if group is None else Synchronizer(group)
    return Population(virtual_batch_size, renorm, sync, reference)


def step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    training: bool,
    settings: Settings,
    population: Population | None = None,
    sink: Callable[[Moments], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One forward pass; in training, running statistics and counter take the batch in, in place.

    Arguments and errors are `batch_norm`'s. Momentum None makes a plain average of all batches.
    A `sink` gets the moments of what is not an empty batch. What activation checkpointing computes
    again has been taken in before.

    Returns:
        y; and which channels refused the batch, where it is known that some did.
    """
    size = 0 if population is None or not training else population.groups_only()
    if size is not None:
        served = autograd_kernels.step(
            x, weight, bias, residual, mask, running, training, settings, size, sink
        )
        if served is not None:
            return served
    if training and select.recomputing():
        running, sink = (None, None, None), None
    y, moments = normalize(x, weight, bias, residual, mask, running, training, settings, population)
    if moments is None:
        return y, None
    if sink is not None:
        sink(moments)
    return y, take_in(running, moments, settings[0])


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    training: bool,
    settings: Settings,
    population: Population | None = None,
) -> tuple[Tensor, Moments | None]:
    """The output, and the moments of the batch if the running statistics are to take them in.

    Arguments and errors are `batch_norm`'s.
    """
    if training and population is not None:
        return pooled.normalize(x, weight, bias, residual, mask, settings, population)
    momentum, eps, channel_dim, activation = settings
    mean, var, _ = running
    check_options(eps, momentum, activation)
    values = check_tensors(x, mean, var, weight, bias, training, mask, residual, channel_dim)
    if training:
        check_count(values, x, mask, channel_dim)
        mean = var = None
    fused = activation if isinstance(activation, str) else None
    y, count, mean, var, *_ = function()(
        x, weight, bias, residual, mask, None, mean, var, eps, fused, channel_dim, None
    )
    if callable(activation):
        y = activation(y)
    if count is None or values == 0:
        return y, None
    return y, Moments(count, mean, var * count)
