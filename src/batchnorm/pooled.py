"""Training by statistics that are not simply the batch's.

Groups of the batch have their own (ghost batches), other processes a share in them, or they are
drawn toward the running ones (renormalization): in any combination, with any mask, activation and
residual, because each is one step of the same way:

    cut into groups → moments → merge with those of others → correct → normalise → put together
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import autograd_kernels, autograd_moments
from batchnorm.autograd import function
from batchnorm.ghost import Groups
from batchnorm.kernels import select
from batchnorm.moments import Axes, Moments, Pool
from batchnorm.recall import Recall
from batchnorm.renorm import Renorm
from batchnorm.running import Running
from batchnorm.sync import SyncedGroups, Synchronizer, header_of
from batchnorm.validation import (
    Activation,
    Settings,
    check_count,
    check_group_counts,
    check_group_sizes,
    check_options,
    check_running_given,
    check_shared_count,
    check_tensors,
    check_weights,
)

Corrections = Recall[tuple[Tensor, Tensor]]
"""r and d of forward passes that may be done again."""


@torch.library.custom_op("batchnorm::snapshot", mutates_args=())
def snapshot(tensor: Tensor) -> Tensor:
    """A copy that compilers neither look into nor make again later."""
    return tensor.clone()


snapshot.register_fake(torch.empty_like)
snapshot.register_vmap(lambda _, axes, tensor: (snapshot(tensor), axes[0]))


class Population(NamedTuple):
    """Which elements make the statistics of a training step, besides those that the mask counts.

    Attributes:
        virtual_batch_size: samples in a group that has its own statistics; None: all.
        renorm: how the statistics are drawn toward the running ones, or None.
        sync: the processes that share them, or None.
        reference: the running mean, variance and number of steps for `renorm`.
        recall: what `renorm` made of forward passes that may be done again.
    """

    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    sync: Synchronizer | None = None
    reference: Running = (None, None, None)
    recall: Corrections | None = None

    def groups_only(self) -> int | None:
        """Samples in a group, if that is all."""
        alone = self.renorm is None and self.sync is None
        return (self.virtual_batch_size or 0) if alone else None


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
    size, renorm, sync, reference, _ = population
    check_options(eps, momentum, activation)
    mean, var, _ = reference
    values = check_tensors(x, mean, var, weight, bias, True, mask, residual, channel_dim)
    if renorm is not None:
        check_running_given(mean, var)
    if sync is None:
        check_count(values, x, mask, channel_dim)
        if mask is None and size is not None:
            check_group_sizes(x, values, size, channel_dim)
        header: tuple[int, ...] = ()
    else:
        if mask is not None and select.concrete(mask):
            check_weights(mask)
        sync.agree(x, settings, virtual_batch_size=size or 0, renorm=renorm is not None)
        header = header_of(x)
    if select.whole(x, weight, bias, residual) and (size is None or sync is None):
        served = _by_kernels(x, weight, bias, residual, mask, settings, population, header)
        if served is not None:
            return served
    y, total = _by_reference(x, weight, bias, residual, mask, settings, population, header)
    # An empty batch is no batch; others may have sent something.
    return y, None if values == 0 and sync is None else total


def normalize_together(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    population: Population,
    meet: Callable[[Moments], Moments],
) -> Tensor:
    """The same where x is one of several micro-batches on their way through one graph.

    `meet` gives for its moments those of all, once they have come; see `forward_together`.
    """
    momentum, eps, channel_dim, activation = settings
    check_options(eps, momentum, activation)
    reference_mean, reference_var, _ = population.reference
    check_tensors(x, reference_mean, reference_var, weight, bias, True, mask, residual, channel_dim)
    if mask is not None and select.concrete(mask):
        check_weights(mask)
    if population.sync is not None:
        renorm = population.renorm is not None
        population.sync.agree(x, settings, renorm=renorm, together=True)
    moments = meet(autograd_moments.moments_of(x, mask, channel_dim))
    mean, var = moments.mean, moments.normalizing_variance()
    # None of this will be done again, and these statistics hold their graph.
    weight, bias = _affine(mean, var, weight, bias, eps, population._replace(recall=None))
    fused = activation if isinstance(activation, str) else None
    y = autograd_moments.normalize_by(
        x, weight, bias, residual, mask, mean, var, eps, fused, channel_dim
    )
    return activation(y) if callable(activation) else y


def shared(moments: Moments, sync: Synchronizer | None) -> Moments:
    """With those of other processes."""
    if sync is not None:
        moments, _ = sync.merge(moments)
    _empty(moments)
    return moments


def _by_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    population: Population,
    header: tuple[int, ...],
) -> tuple[Tensor, Moments | None]:
    """The same on any device, under any transform."""
    _, eps, channel_dim, activation = settings
    size, sync = population.virtual_batch_size, population.sync
    groups: Groups | None = None
    pool: Pool | None = sync
    axes: Axes = channel_dim
    if size is not None:
        synced = None if sync is None else SyncedGroups(sync, x, channel_dim, size)
        pool = synced
        groups = Groups.of(x, size, channel_dim, None if synced is None else synced.lead)
        mask, axes = groups.cut_mask(mask, x), groups.axes
        x, residual = groups.cut(x), None if residual is None else groups.cut(residual)
    with torch.no_grad():
        # Detached, because forward-mode differentiation does not stop at no_grad.
        moments = total = select.moments(x.detach(), mask, axes)
        if pool is not None:
            moments, total = pool.merge(moments, header)
        elif groups is not None:
            total = moments.over_groups()
        if groups is not None and sync is None and select.concrete(moments.count):
            # Groups that are all of one size have one count.
            check_group_counts(moments.count.flatten().expand(len(moments.mean)))
        empty = sync is not None and _empty(total)
    var = moments.normalizing_variance()
    weight, bias = _affine(moments.mean, var, weight, bias, eps, population)
    statistics = moments.count, moments.mean, var
    y = _by_function(x, weight, bias, residual, mask, statistics, eps, activation, axes, pool)
    if groups is not None:
        y = groups.join(y)
    if callable(activation):
        y = activation(y)
    return y, None if empty else total


def _by_kernels(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    population: Population,
    header: tuple[int, ...],
) -> tuple[Tensor, Moments | None] | None:
    """The same by the C++ or Triton kernels; None: not served."""
    _, eps, channel_dim, activation = settings
    size, sync = population.virtual_batch_size, population.sync
    found = autograd_kernels.moments(x, mask, channel_dim, size or 0)
    if found is None:
        return None
    mean, var, total = found
    if sync is not None:
        total, _ = sync.merge(total, header)
        _empty(total)
        mean, var = total.mean, total.normalizing_variance()
    weight, bias = _affine(mean, var, weight, bias, eps, population)
    count = total.count.item() if select.concrete(total.count) else total.count
    y = autograd_kernels.normalize(
        *(x, weight, bias, residual, mask, (mean, var, count)),
        *(settings, size or 0, sync),
    )
    if y is None and sync is None:
        return None
    if y is None:
        # The others will not merge once more.
        y = _by_function(
            *(x, weight, bias, residual, mask, (total.count, mean, var)),
            *(eps, activation, channel_dim, sync),
        )
        y = activation(y) if callable(activation) else y
    return y, total


def _by_function(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor],
    eps: float,
    activation: Activation,
    axes: Axes,
    pool: Pool | None,
) -> Tensor:
    """y by this count, mean and variance, before an activation that is a function."""
    fused = activation if isinstance(activation, str) else None
    # Each group's gradient comes back by itself; autograd adds them.
    shape = statistics[1].shape
    weight, bias = (None if v is None else v.expand(shape) for v in (weight, bias))
    y: Tensor = function()(x, weight, bias, residual, mask, *statistics, eps, fused, axes, pool)[0]
    return y


def _empty(total: Moments) -> bool:
    """Whether no process has anything that counts, where that can be told.

    Raises:
        InputError: there is too little.
    """
    if not select.concrete(total.count):
        return False
    count = total.count.item()
    check_shared_count(count)
    return count == 0


def _affine(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    population: Population,
) -> tuple[Tensor | None, Tensor | None]:
    """γ and β of each group: γ·(x̂·r + d) + β is (γ·r)·x̂ + (γ·d + β)."""
    running_mean, running_var, counter = population.reference
    renorm = population.renorm
    if renorm is None or running_mean is None or running_var is None:
        return weight, bias
    recall = population.recall
    later = recall is not None and select.recomputed_later()
    with torch.no_grad():
        found = recall.find(mean, var) if recall is not None and select.recomputing() else []
        if torch.compiler.is_compiling() and not select.exported():
            # Else the compiler may compute r and d once more in the backward pass, from running
            # statistics that have moved (pytorch/pytorch#197039).
            running_mean, running_var = snapshot(running_mean), snapshot(running_var)
            counter = None if counter is None else snapshot(counter)
        if found:
            r, d = found[0]
        else:
            r, d = renorm.correction(mean, var, running_mean, running_var, counter, eps)
            r, d = r.detach(), d.detach()  # in forward mode too, where these statistics are not
            if recall is not None and later:
                recall.keep(mean, var, (r, d))
    shift = d if weight is None else weight * d
    return r if weight is None else weight * r, shift if bias is None else shift + bias
