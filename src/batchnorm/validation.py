"""What the arguments of batch_norm must be: checked before anything is computed or changed.

Checks of shapes and dtypes cost nothing anywhere. Checks of values (a mask's) are made only where
reading them is free, see `select.concrete`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, InputError
from batchnorm.kernels import reference, select
from batchnorm.moments import expand_mask

Activation = str | Callable[[Tensor], Tensor] | None


def check_options(eps: float, momentum: float | Tensor | None, activation: Activation) -> None:
    """Refuse options that are impossible for any data."""
    if not eps > 0:
        raise ArgumentError(
            f"expected eps > 0, got {eps!r}: a constant channel has variance 0 and would be "
            "divided by 0; the usual value is 1e-5"
        )
    if isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
        raise ArgumentError(
            f"expected momentum in [0, 1], the weight of the newest batch, got {momentum!r}; "
            "a Keras or Flax momentum m is 1 - m here"
        )
    if not (activation is None or callable(activation) or activation in reference.ACTIVATIONS):
        names = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ArgumentError(
            f"expected activation to be None, {names} or a function of a tensor, got {activation!r}"
        )


def check_tensors(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    mask: Tensor | None,
    residual: Tensor | None,
    channel_dim: int,
) -> int:
    """Refuse tensors that do not fit each other; the number of values per channel."""
    shape = tuple(x.shape)
    if x.dim() < 2:
        raise InputError(
            f"expected x of rank 2 or more, (N, C, ...), got shape {shape}; "
            "for one sample, add a batch axis with x.unsqueeze(0)"
        )
    if not -x.dim() <= channel_dim < x.dim():
        raise InputError(f"expected x to have a channel axis {channel_dim}, got shape {shape}")
    if not x.is_floating_point():
        raise InputError(
            f"expected x of a floating dtype, got {x.dtype}; convert it first, e.g. x.float()"
        )
    channels = x.shape[channel_dim]
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is not None and tuple(vector.shape) != (channels,):
            raise InputError(
                f"expected {channels} channels' worth of {name}, shape ({channels},), for x of "
                f"shape {shape} with channel_dim={channel_dim}; got shape {tuple(vector.shape)}. "
                "Check the number of features, and channel_dim if the channels are on another axis"
            )
    if (running_mean is None) != (running_var is None):
        raise InputError("expected running_mean and running_var both, or neither; got one of them")
    if not training and running_mean is None:
        raise InputError(
            "expected running_mean and running_var with training=False: there is nothing to "
            "normalise by; pass them, or training=True to use the batch's own statistics"
        )
    if residual is not None and (
        tuple(residual.shape) != shape or not residual.is_floating_point()
    ):
        raise InputError(
            f"expected a floating residual of the shape of x, {shape}, got {residual.dtype} of "
            f"shape {tuple(residual.shape)}"
        )
    if mask is not None:
        expand_mask(mask, x, channel_dim)
        if mask.requires_grad:
            raise InputError(
                "expected a mask that needs no gradient: it is not differentiated; "
                "pass mask.detach()"
            )
    return math.prod(x.shape) // channels if channels else 0


def check_count(values: int, x: Tensor, mask: Tensor | None, channel_dim: int) -> None:
    """Refuse a batch whose channels have one value, or none because of the mask."""
    if values == 1:
        raise InputError(
            "expected more than 1 value per channel in training, got x of shape "
            f"{tuple(x.shape)}: the variance of one value is 0 and says nothing. Use a larger "
            "batch, DataLoader(drop_last=True), or eval() to normalise by the running statistics"
        )
    if mask is None or values == 0 or not select.concrete(mask):
        return
    weights = expand_mask(mask, x, channel_dim)
    if mask.dtype is not torch.bool and not (mask.min() >= 0 and mask.isfinite().all()):
        raise InputError(
            "expected mask weights that are finite and not negative, got values from "
            f"{mask.min().item()} to {mask.max().item()}"
        )
    count = weights.sum(dtype=torch.float64).item()
    if not count > 1:
        raise InputError(
            f"expected the mask to count more than 1 element per channel in training, got a total "
            f"weight of {count:g}"
            + (
                ". A mask is True where an element counts: is this one the other way round?"
                if mask.dtype is torch.bool
                else ". Weights are frequencies, 1 for an ordinary element: were they normalised?"
            )
        )
