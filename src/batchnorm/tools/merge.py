"""Merging: one set of running statistics from those of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import SyncError
from batchnorm.moments import Moments, accumulation_dtype
from batchnorm.sync import WORLD, Group, Synchronizer, check_group, resolve
from batchnorm.tools.layers import batch_norms

#: Under this name a layer remembers what it shared last.
_SHARED = "_last_shared"


@torch.no_grad()
def sync_statistics(model: nn.Module, process_group: Group = None) -> None:
    """Give all processes the same running statistics: those of all their batches together.

        mean = Σ nᵢ·meanᵢ / Σ nᵢ        var = Σ nᵢ·(varᵢ + (meanᵢ − mean)²) / Σ nᵢ
        num_batches_tracked = Σ nᵢ

    nᵢ is the number of batches behind process i's statistics since the processes last had the same.
    (An average of the variances alone would leave out what lies between the processes.) With
    `momentum=None` this is the average that one process would have that saw all batches, however
    often it is done. Processes that have the same statistics already keep them. Before evaluation
    in data-parallel training, for the averaged copy of a model, for federated clients.

    Args:
        model: with any batch norm layers, the same on all processes; banks take part.
        process_group: a torch.distributed group; None or "world" for all processes. Without
            torch.distributed, or alone, nothing happens.

    Raises:
        ArgumentError: there are no batch norm layers, or it is no group.
        SyncError: the models differ, or a process did not come. Nothing has been changed.

    Example:
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, sync_statistics
        >>> sync_statistics(nn.Sequential(BatchNorm(4)))  # alone: nothing to merge with
    """
    group = WORLD if process_group is None else process_group
    check_group(group)
    keepers: list[tuple[Any, bool]] = [
        (keeper, layer.momentum is None)
        for _, layer in batch_norms(model)
        for keeper in layer.modules()
        if getattr(keeper, "running_mean", None) is not None
    ]
    group = resolve(group)
    if group is None or not keepers:
        return
    sync = Synchronizer(group)
    rows = torch.cat([_row(keeper) for keeper, _ in keepers])
    sizes = [float(len(keeper.running_mean)) for keeper, _ in keepers]
    # Two numbers whose equality means that the channels of all layers are the same, in order.
    shape = rows.new_tensor([len(rows), sum(k * size for k, size in enumerate(sizes, 1))])
    if (sync.gather(shape) != shape).any():
        raise SyncError(
            "expected the same batch norm layers on all processes, got models that differ in them"
        )
    for (keeper, average), everyones in zip(
        keepers, sync.gather(rows).split([2 + 2 * int(size) for size in sizes], 1), strict=True
    ):
        _share(keeper, everyones, average)


def _row(keeper: Any) -> Tensor:
    """Batches, batches shared before, mean and variance."""
    mean = keeper.running_mean
    wide = accumulation_dtype(mean.device)
    counts = mean.new_zeros(2, dtype=wide)
    # Without a counter, one batch is as much as another.
    counts[0] = 1 if keeper.num_batches_tracked is None else keeper.num_batches_tracked
    counts[1] = getattr(keeper, _SHARED, (0,))[0]
    return torch.cat([counts, mean.to(wide), keeper.running_var.to(wide)])


def _share(keeper: Any, everyones: Tensor, average: bool) -> None:
    """Take over the statistics of all, from a row of each process."""
    channels = keeper.running_mean.shape[0]
    batches, shared = everyones[:, 0], everyones[:, 1]
    mean, var = everyones[:, 2:].split(channels, 1)
    before = shared[0] if bool((shared == shared[0]).all()) else torch.zeros_like(shared[0])
    since = batches - before
    if not bool((everyones == everyones[0]).all()) and since.sum() > 0:
        total = before + since.sum()
        if average and before > 0:
            # All averages contain what was shared; once is enough.
            _, *old = getattr(keeper, _SHARED)
            batches = torch.cat([batches, before[None] * (1 - len(batches))])
            mean, var = (torch.cat([v, o[None]]) for v, o in zip((mean, var), old, strict=True))
        else:
            batches = since
        merged = Moments(batches, mean, var * batches[:, None]).merged()
        keeper.running_mean.copy_(merged.mean)
        keeper.running_var.copy_(merged.variance())
        if keeper.num_batches_tracked is not None:
            keeper.num_batches_tracked.fill_(int(total))
    if keeper.num_batches_tracked is not None:
        wide = everyones.dtype
        kept = (keeper.running_mean.to(wide), keeper.running_var.to(wide))
        setattr(keeper, _SHARED, (int(keeper.num_batches_tracked), *(t.clone() for t in kept)))
