"""Training by statistics that are not simply the batch's.

Groups of the batch have their own (ghost batches), other processes a share in them, or they are
drawn toward the running ones (renormalization): in any combination, with any mask, activation and
residual, because each is one step of the same way:

    cut into groups → moments → merge with those of others → correct → normalise → put together
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.autograd import function
from batchnorm.ghost import Groups
from batchnorm.kernels import select
from batchnorm.moments import Moments, Pool
from batchnorm.renorm import Renorm
from batchnorm.running import Running
from batchnorm.sync import SyncedGroups, Synchronizer, header_of
from batchnorm.validation import (
    Settings,
    check_count,
    check_group_counts,
    check_options,
    check_running_given,
    check_shared_count,
    check_tensors,
    check_weights,
)


class Population(NamedTuple):
    """Which elements make the statistics of a training step, besides those that the mask counts.

    Attributes:
        virtual_batch_size: samples in a group that has its own statistics; None: all.
        renorm: how the statistics are drawn toward the running ones, or None.
        sync: the processes that share them, or None.
        reference: the running mean, variance and number of steps for `renorm`.
    """

    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    sync: Synchronizer | None = None
    reference: Running = (None, None, None)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    population: Population,
) -> tuple[Tensor, Moments | None]:
    """The output, and the moments of all elements, those of other processes too.

    Arguments and errors are `batch_norm`'s, in training.

    Raises:
        SyncError: the processes do not agree, or did not all come.
    """
    momentum, eps, channel_dim, activation = settings
    size, renorm, sync, reference = population
    check_options(eps, momentum, activation)
    mean, var, counter = reference
    values = check_tensors(x, mean, var, weight, bias, True, mask, residual, channel_dim)
    if renorm is not None:
        check_running_given(mean, var)
    if sync is None:
        check_count(values, x, mask, channel_dim)
    elif mask is not None and select.concrete(mask):
        check_weights(mask)
    groups: Groups | None = None
    pool: Pool | None = sync
    header = () if sync is None else header_of(x)
    if sync is not None:
        sync.agree(x, channel_dim, virtual_batch_size=size or 0, renorm=int(renorm is not None))
    if size is not None and sync is not None:
        pool = synced = SyncedGroups(sync, x, channel_dim, size)
        groups = Groups.of(x, size, channel_dim, synced.lead)
    elif size is not None:
        groups = Groups.of(x, size, channel_dim)
    axes: Any = channel_dim
    if groups is not None:
        mask, axes = groups.cut_mask(mask, x), groups.axes
        x, residual = groups.cut(x), None if residual is None else groups.cut(residual)
    with torch.no_grad():
        moments = total = select.moments(x, mask, axes)
        if pool is not None:
            moments, total = pool.merge(moments, header)
        elif groups is not None:
            total = moments.over_groups()
        empty = _check_counts(moments, total, sync, groups)
    weight, bias = _affine(moments, weight, bias, eps, renorm, reference)
    fused = activation if isinstance(activation, str) else None
    y, *_ = function()(
        *(x, weight, bias, residual, mask),
        *(moments.count, moments.mean, moments.variance(), eps, fused, axes, pool),
    )
    if groups is not None:
        y = groups.join(y)
    if callable(activation):
        y = activation(y)
    return y, None if empty else total


def _check_counts(
    moments: Moments, total: Moments, sync: Synchronizer | None, groups: Groups | None
) -> bool:
    """Refuse too few values; whether there are none at all, where that can be told."""
    if not select.concrete(total.count):
        return False
    count = total.count.item()
    if sync is not None:
        check_shared_count(count)
    if groups is not None:
        check_group_counts(moments.count.flatten())
    return count == 0


def _affine(
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    renorm: Renorm | None,
    reference: Running,
) -> tuple[Tensor | None, Tensor | None]:
    """γ and β of each group: γ·(x̂·r + d) + β is (γ·r)·x̂ + (γ·d + β)."""
    mean, var, counter = reference
    if renorm is not None and mean is not None and var is not None:
        with torch.no_grad():
            r, d = renorm.correction(moments, mean, var, counter, eps)
        shift = d if weight is None else weight * d
        return r if weight is None else weight * r, shift if bias is None else shift + bias
    # Each group's gradient comes back by itself; autograd adds them.
    shape = moments.mean.shape
    return (
        None if weight is None else weight.expand(shape),
        None if bias is None else bias.expand(shape),
    )
