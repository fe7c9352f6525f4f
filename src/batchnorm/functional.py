"""batch_norm(): from tensors to output and running statistics.

Two questions, asked in this order: which elements make the statistics (`Moments`), and with what
does the layer normalise (those moments, or the running ones). `validation` refuses what does not
fit, `autograd` makes the kernels differentiable; the update of the running statistics is here.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.autograd import function, native_step
from batchnorm.errors import InputError, NonFiniteWarning
from batchnorm.kernels import native, select
from batchnorm.moments import Moments, accumulation_dtype, expand_mask
from batchnorm.validation import (
    MIN_COUNT,
    Activation,
    check_count,
    check_kinds,
    check_momentum,
    check_options,
    check_tensors,
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
    check_momentum(momentum)
    y, refused = step(
        x,
        running_mean,
        running_var,
        None,
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
    check_momentum(momentum)
    if native.serves(x, weight, bias, residual):
        if training and running_mean is not None and running_var is not None:
            running_mean, running_var = running_mean.detach().clone(), running_var.detach().clone()
        y, _ = step(
            x,
            running_mean,
            running_var,
            None,
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
        return BatchNormOutput(y, running_mean, running_var)
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


def step(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    *,
    mask: Tensor | None,
    residual: Tensor | None,
    channel_dim: int,
    activation: Activation,
) -> tuple[Tensor, Tensor | None]:
    """One forward pass; in training, running statistics and counter take the batch in, in place.

    Arguments as `batch_norm`'s, and `counter`: the number of batches taken in so far. Momentum None
    makes a plain average of them.

    Returns:
        y; and which channels refused the batch, where it is known that some did.
    """
    if native.serves(x, weight, bias, residual):
        served = _native_step(
            *(x, running_mean, running_var, counter, weight, bias, training, momentum, eps),
            *(mask, residual, channel_dim, activation),
        )
        if served is not None:
            return served
    share: float | Tensor = 0.0
    if momentum is not None:
        share = momentum
    elif counter is not None:
        # Not 1.0 / counter: of a whole number that is float32, and 1e-8 off.
        share = (counter + 1).to(accumulation_dtype(counter.device)).reciprocal()
    y, moments = normalize(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        share,
        eps,
        mask=mask,
        residual=residual,
        channel_dim=channel_dim,
        activation=activation,
    )
    if moments is None or running_mean is None or running_var is None:
        return y, None
    # In a plain average every channel must have the same number of batches behind it.
    update = updated(running_mean, running_var, moments, share, together=momentum is None)
    finite = assign(running_mean, running_var, update)
    if counter is not None:
        counter.add_(1 if update.refused is None else update.refused.logical_not().any())
    return y, None if finite else update.refused


def _native_step(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    channel_dim: int,
    activation: Activation,
) -> tuple[Tensor, Tensor | None] | None:
    """`step` by the C++ kernels, which check their arguments themselves; None: not served."""
    if type(momentum) is float or type(momentum) is int:
        share = float(momentum) if 0 <= momentum <= 1 else math.nan  # which they refuse
    elif momentum is None and counter is not None:
        share = native.PLAIN_AVERAGE
    else:
        return None
    fused = activation if isinstance(activation, str) else None
    code = native.ACTIVATIONS.get(fused)
    after = activation if callable(activation) else None
    if (
        code is None
        or (activation is not None and fused is None and after is None)
        or type(eps) not in (float, int)
        or type(channel_dim) is not int
        or x.dim() < 2
        or not -x.dim() <= channel_dim < x.dim()
        or (weight is not None and bias is not None and weight.dtype is not bias.dtype)
        or not native.serves_buffers(running_mean, running_var)
    ):
        return None
    weights = None
    if mask is not None:
        check_kinds(x, mask, residual)
        if mask.requires_grad:
            return None
        weights = expand_mask(mask, x, channel_dim)
        weights = weights if weights.dtype in native.MASKS else weights.double()
    # An activation or a hook may raise, and then nothing must have changed.
    later = after is not None or native.hooked()
    options = (
        *(weights, running_mean, running_var, counter),
        *(share, float(eps), code, channel_dim, bool(training), later),
    )
    kept: list[Any] = []
    served = native_step(x, weight, bias, residual, options, kept)
    if served is None:
        return None
    y, refused = served
    if after is not None:
        y = after(y)
    if not training or running_mean is None or running_var is None:
        return y, None
    if later:
        refused = native.update(*kept, running_mean, running_var, counter, share)
    # The kernels change memory behind autograd's back.
    torch.autograd.graph.increment_version((running_mean, running_var))
    if not refused:
        return y, None
    (mean, var), count = kept
    of_batch = Moments(mean.new_tensor(count), mean, var * count)
    return y, ~sound(of_batch, running_mean, running_var, together=momentum is None)


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
