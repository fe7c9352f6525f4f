"""batch_norm(): from tensors to output and running statistics.

Two questions, asked in this order: which elements make the statistics (`Moments`), and with what
does the layer normalise (those moments, or the running ones). `validation` refuses what does not
fit, `autograd` makes the kernels differentiable; the update of the running statistics is here.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.autograd import function
from batchnorm.errors import ArgumentError, InputError, NonFiniteWarning
from batchnorm.kernels import select
from batchnorm.moments import Moments
from batchnorm.validation import MIN_COUNT, Activation, check_count, check_options, check_tensors


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
    y, moments = normalize(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        mask=mask,
        residual=residual,
        channel_dim=channel_dim,
        activation=activation,
    )
    if moments is not None and running_mean is not None and running_var is not None:
        update = updated(running_mean, running_var, moments, momentum)
        if not assign(running_mean, running_var, update):
            warnings.warn(nonfinite_message(update), NonFiniteWarning, stacklevel=2)
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
) -> BatchNormOutput:
    """As `batch_norm`, but the new running statistics are returned and nothing is changed in place.

    The form for torch.func: vmap, grad and jacrev over a training step.

    Returns:
        BatchNormOutput(output, running_mean, running_var). In evaluation the statistics come back
        as they are. Channels whose batch statistics are not finite keep their old values, silently.

    Raises:
        ArgumentError, InputError: as `batch_norm`.

    Example:
        >>> import torch
        >>> from batchnorm import batch_norm_pure
        >>> models = torch.randn(3, 8, 2)  # three batches of 8, two channels
        >>> step = lambda x: batch_norm_pure(x, torch.zeros(2), torch.ones(2), training=True)
        >>> torch.func.vmap(step)(models).running_mean.shape
        torch.Size([3, 2])
    """
    y, moments = normalize(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        mask=mask,
        residual=residual,
        channel_dim=channel_dim,
        activation=activation,
    )
    if moments is None or running_mean is None or running_var is None:
        return BatchNormOutput(y, running_mean, running_var)
    update = updated(running_mean, running_var, moments, momentum)
    return BatchNormOutput(y, update.mean, update.var)


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
    # Too small a count has been refused where that could be seen: not under compilation.
    sound = (
        moments.mean.to(running_mean.dtype).isfinite()
        & unbiased.to(running_var.dtype).isfinite()
        & (moments.count >= MIN_COUNT)
    )
    if together:
        sound = sound.all().expand_as(sound)
    return Update(
        torch.where(sound, mean, running_mean), torch.where(sound, var, running_var), ~sound
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


def nonfinite_message(update: Update) -> str:
    """What to tell the user about the channels that refused an update."""
    channels = [] if update.refused is None else update.refused.nonzero().flatten().tolist()
    shown = ", ".join(map(str, channels[:8])) + (", …" if len(channels) > 8 else "")
    return (
        f"the batch holds NaN or infinity, or overflows, in {len(channels)} of "
        f"{update.mean.numel()} channels ({shown}); their running statistics were left as they "
        "were. Look for the cause upstream: torch.autograd.set_detect_anomaly(True), a smaller "
        "learning rate, a loss scale, the data"
    )


def normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    *,
    mask: Tensor | None,
    residual: Tensor | None,
    channel_dim: int,
    activation: Activation,
) -> tuple[Tensor, Moments | None]:
    """The output, and the moments of the batch if the running statistics are to take them in.

    Arguments and errors are `batch_norm`'s.
    """
    check_options(eps, momentum, activation)
    if momentum is None:
        raise ArgumentError(
            "expected momentum to be a number, got None: only a layer counts its batches; pass "
            "1 / (their number, this one included) for a plain average"
        )
    values = check_tensors(
        x, running_mean, running_var, weight, bias, training, mask, residual, channel_dim
    )
    if training:
        check_count(values, x, mask, channel_dim)
    fused = activation if isinstance(activation, str) else None
    given = (None, None) if training else (running_mean, running_var)
    y, count, mean, var, *_ = function()(
        x, weight, bias, residual, mask, *given, eps, fused, channel_dim
    )
    if callable(activation):
        y = activation(y)
    if count is None or values == 0:
        return y, None
    return y, Moments(count, mean, var * count)
