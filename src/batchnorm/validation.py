"""What the arguments of batch_norm must be: checked before anything is computed or changed.

Checks of shapes and dtypes cost nothing anywhere. Checks of values (a mask's) are made only where
reading them is free, see `select.concrete`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, InputError
from batchnorm.kernels import reference, select
from batchnorm.moments import expand_mask

Activation = str | Callable[[Tensor], Tensor] | None

Settings = tuple[float | Tensor | None, float, int, Activation]
"""Momentum, eps, channel axis, activation. A plain tuple, as running.py's `Running` is."""

#: Least total weight behind batch statistics. Whole elements need more than 1; with fractional
#: weights, a total just above 1 (normalised ones, rounded) would divide by its tiny excess.
MIN_COUNT = 2


def check_options(eps: float, momentum: float | Tensor | None, activation: Activation) -> None:
    """Refuse options that are impossible for any data."""
    if not isinstance(eps, Real) or not 0 < eps < math.inf:
        raise ArgumentError(
            f"expected eps > 0 and finite, got {eps!r}: a constant channel has variance 0 and "
            "would be divided by 0; the usual value is 1e-5"
        )
    if not (
        momentum is None
        or isinstance(momentum, Tensor)
        or (isinstance(momentum, Real) and 0 <= momentum <= 1)
    ):
        raise ArgumentError(
            f"expected momentum in [0, 1], the weight of the newest batch, got {momentum!r}; "
            "a Keras or Flax momentum m is 1 - m here"
        )
    if isinstance(activation, type):
        raise ArgumentError(
            f"expected activation to be a function or a module, got the class {activation.__name__}"
            f"; pass {activation.__name__}()"
        )
    if not (activation is None or callable(activation) or activation in reference.ACTIVATIONS):
        names = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ArgumentError(
            f"expected activation to be None, {names} or a function of a tensor, got {activation!r}"
        )


def check_virtual_batch_size(size: int | None) -> None:
    """Refuse what is no number of samples."""
    if size is None or (isinstance(size, Integral) and not isinstance(size, bool) and size >= 1):
        return
    raise ArgumentError(
        f"expected virtual_batch_size to be a positive number of samples or None, got {size!r}"
    )


def check_running_given(mean: Tensor | None, var: Tensor | None) -> None:
    """Refuse renormalization without anything to draw the batch's statistics toward."""
    if mean is None or var is None:
        raise ArgumentError(
            "expected running statistics with renorm, which draws the batch's toward them; got none"
        )


def check_momentum(momentum: float | Tensor | None) -> None:
    """Refuse what only a layer understands."""
    if momentum is None:
        raise ArgumentError(
            "expected momentum to be a number, got None: only a layer counts its batches; pass "
            "1 / (their number, this one included) for a plain average"
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
    check_kinds(x, mask, residual)
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
    check_vectors(
        x,
        channel_dim,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
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


def check_kinds(x: Tensor, mask: Tensor | None, residual: Tensor | None) -> None:
    """Refuse what is no dense tensor."""
    for name, tensor in (("x", x), ("mask", mask), ("residual", residual)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise InputError(
                f"expected {name} to be a tensor, got {type(tensor).__name__}; "
                "torch.as_tensor converts numbers, lists and arrays"
            )
    if x.is_nested or x.layout is not torch.strided:
        raise InputError(
            f"expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}; pad it "
            "and pass a mask, or pack it with torch.nn.utils.rnn.pack_sequence"
        )


def check_vectors(x: Tensor, channel_dim: int, **vectors: Tensor | None) -> None:
    """Refuse vectors that do not have one value for each channel of x."""
    shape, channels = tuple(x.shape), x.shape[channel_dim]
    for name, vector in vectors.items():
        if vector is None or tuple(vector.shape) == (channels,):
            continue
        if vector.dim() != 1:
            raise InputError(
                f"expected {name} of shape ({channels},), one value per channel, got "
                f"{tuple(vector.shape)}"
            )
        axes = [axis for axis, size in enumerate(shape) if size == len(vector)]
        hint = f"; axis {axes[0]} has {len(vector)}: channel_dim={axes[0]}?" if axes else ""
        raise InputError(
            f"expected {len(vector)} channels (the length of {name}) on axis {channel_dim} of x, "
            f"got {channels}: x has shape {shape}{hint}"
        )


def check_count(values: int, x: Tensor, mask: Tensor | None, channel_dim: int) -> None:
    """Refuse a batch whose channels have one value, or hardly any because of the mask."""
    if values == 1:
        raise InputError(
            "expected more than 1 value per channel to normalise by the batch's statistics, got x "
            f"of shape {tuple(x.shape)}: the variance of one value is 0 and says nothing. Use a "
            "larger batch (DataLoader(drop_last=True) drops a short last one); or, with running "
            "statistics, eval()"
        )
    if mask is None or values == 0 or not select.concrete(mask):
        return
    weights = expand_mask(mask, x, channel_dim)
    check_weights(mask)
    check_total(weights.sum(dtype=torch.float64).item(), mask)


def check_weights(mask: Tensor) -> None:
    """Refuse a mask of weights that cannot be frequencies."""
    if mask.dtype is torch.bool or mask.numel() == 0:
        return
    if not (mask.min() >= 0 and mask.isfinite().all()):
        raise InputError(
            "expected mask weights that are finite and not negative, got values from "
            f"{mask.min().item()} to {mask.max().item()}"
        )


def check_total(count: float, mask: Tensor | None, whose: str = "") -> None:
    """Refuse a total weight that says nothing of a variance."""
    if count >= MIN_COUNT:
        return
    hint = ""
    if mask is not None and mask.dtype is torch.bool:
        hint = ". A mask is True where an element counts: is this one the other way round?"
    elif mask is not None:
        hint = ". Weights are frequencies, 1 for an ordinary element: were they normalised?"
    raise InputError(
        f"expected the mask to count at least {MIN_COUNT} elements per channel{whose}, got a total "
        f"weight of {count:g}{hint}"
    )


def check_shared_count(total: float) -> None:
    """Refuse batches that have, all processes' together, a single value per channel.

    None at all is an empty batch.
    """
    if 0 < total < MIN_COUNT:
        raise InputError(
            "expected more than 1 value per channel to normalise by the statistics that batches "
            f"share, got a total weight of {total:g}. Use larger batches; or, with running "
            "statistics, eval()"
        )


def check_group_sizes(x: Tensor, values: int, size: int, channel_dim: int) -> None:
    """Refuse groups of samples that leave one value per channel in one of them."""
    samples = x.shape[0 if channel_dim % x.dim() else 1]
    last = samples % size or min(size, samples)
    if 0 < last * values < MIN_COUNT * samples:
        groups = -(-samples // size)
        group = groups - 1 if last < size else 0
        raise InputError(_few_in_a_group(1, f"group {group} of {groups}"))


def check_group_counts(counts: Tensor, *, whose: str = "") -> None:
    """Refuse groups of samples with too few values. One with nothing that counts is none."""
    few = (counts > 0) & (counts < MIN_COUNT)
    if few.any():
        group = int(few.nonzero()[0])
        where = whose or f"group {group} of {len(counts)}"
        raise InputError(_few_in_a_group(float(counts[group]), where))


def _few_in_a_group(count: float, where: str) -> str:
    return (
        "expected more than 1 value per channel in each group of virtual_batch_size samples, got a "
        f"total weight of {count:g} in {where}: the variance of one value is 0 and says nothing. "
        "Use another virtual_batch_size, or drop the batch's last samples "
        "(DataLoader(drop_last=True) drops a short last batch)"
    )
