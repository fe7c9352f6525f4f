"""Merging: one set of running statistics from those of several processes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import SyncError
from batchnorm.layers.statistics import SHARED
from batchnorm.moments import Moments, accumulation_dtype
from batchnorm.sync import WORLD, Group, Synchronizer, check_group, resolve
from batchnorm.tools.layers import batch_norms, keepers


@torch.no_grad()
def sync_statistics(model: nn.Module, process_group: Group = None) -> None:
    """Give all processes the same running statistics: those of all their batches together.

        mean = Σ nᵢ·meanᵢ / Σ nᵢ        var = Σ nᵢ·(varᵢ + (meanᵢ − mean)²) / Σ nᵢ
        num_batches_tracked = Σ nᵢ

    nᵢ is the number of batches behind process i's statistics since the processes last had the same.
    (An average of the variances alone would leave out what lies between the processes.) With
    `momentum=None`, meanᵢ and varᵢ are of those batches alone, and the result joins what was shared
    before in one plain average: the mean is that of one process that saw all batches, however often
    this is done. Processes that have the same statistics already keep them. Before evaluation in
    data-parallel training, for the averaged copy of a model, for federated clients.

    What the processes had in common is known since they last called this: call it after loading a
    checkpoint on all of them, too, or its batches count as many times as there are processes.

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
    found: list[tuple[Any, bool]] = [
        (keeper, layer.momentum is None)
        for _, layer in batch_norms(model)
        for keeper in keepers(layer)
        if keeper.running_mean is not None
    ]
    group = resolve(group)
    if group is None:
        return
    sync = Synchronizer(group, "sync_statistics")
    devices = [keeper.running_mean.device for keeper, _ in found]
    device = devices[0] if found else next(model.parameters(), torch.empty(0)).device
    check_alike(model, sync, device)
    if not found:
        return
    rows = [_row(keeper).to(device) for keeper, _ in found]
    everyones = sync.gather(torch.cat(rows)).split([len(row) for row in rows], 1)
    for (keeper, average), of_one in zip(found, everyones, strict=True):
        _share(keeper, of_one.to(keeper.running_mean.device), average)


def check_alike(model: nn.Module, sync: Synchronizer, device: torch.device) -> None:
    """Refuse models that differ from process to process; all must call.

    Raises:
        SyncError: they do, or a process did not come.
    """
    described = torch.tensor([_description(model)], device=device)
    if (sync.gather(described) != described).any():
        raise SyncError(
            "expected the same batch norm layers, with the same banks, on all processes, got "
            "models that differ in them"
        )


def _description(model: nn.Module) -> int:
    """A number that is the same only for models whose statistics can be merged."""
    every = [
        (
            sorted(name for name, bank in layer.named_modules() if bank is keeper),
            None if keeper.running_mean is None else len(keeper.running_mean),
            keeper.num_batches_tracked is None,
            layer.momentum is None,
        )
        for _, layer in batch_norms(model)
        for keeper in keepers(layer)
    ]
    return int.from_bytes(hashlib.sha256(repr(every).encode()).digest()[:7])


def _row(keeper: Any) -> Tensor:
    """Batches, batches shared before, mean and variance."""
    mean = keeper.running_mean
    wide = accumulation_dtype(mean.device)
    # Without a counter, one batch is as much as another.
    batches = 1 if keeper.num_batches_tracked is None else int(keeper.num_batches_tracked)
    shared, *_ = getattr(keeper, SHARED, (0,))
    # Fewer batches than were shared: the statistics were reset, or others loaded, since then.
    counts = mean.new_tensor([batches, shared if shared <= batches else 0], dtype=wide)
    return torch.cat([counts, mean.to(wide), keeper.running_var.to(wide)])


def _share(keeper: Any, everyones: Tensor, average: bool) -> None:
    """Take over the statistics of all, from a row of each process."""
    channels = keeper.running_mean.shape[0]
    batches, shared = everyones[:, 0], everyones[:, 1]
    mean, var = everyones[:, 2:].split(channels, 1)
    before = shared[0] if bool((shared == shared[0]).all()) else torch.zeros_like(shared[0])
    since = batches - before
    if not bool((everyones == everyones[0]).all()):
        join = average and bool((before > 0) & (since.sum() > 0))
        if join:
            _, *old = (torch.as_tensor(value).to(everyones) for value in getattr(keeper, SHARED))
            weight = (batches / since.clamp(min=1))[:, None]
            mean, var = old[0] + (mean - old[0]) * weight, old[1] + (var - old[1]) * weight
            var = var.clamp(min=0)  # of rounding only
        # Statistics that differ without any batch are worth the same.
        weights = since if since.sum() > 0 else torch.ones_like(since)
        merged = Moments(weights, mean, var * weights[:, None]).merged()
        mean, var = merged.mean, merged.variance()
        total = before + since.sum()
        if join:
            mean = old[0].lerp(mean, since.sum() / total)
            var = old[1].lerp(var, since.sum() / total)
        keeper.running_mean.copy_(mean)
        keeper.running_var.copy_(var)
        if keeper.num_batches_tracked is not None:
            keeper.num_batches_tracked.fill_(int(total))
    remember(keeper)


def remember(keeper: Any) -> None:
    """Note that all processes have these statistics now: they count once when next merged."""
    if keeper.num_batches_tracked is not None:
        wide = accumulation_dtype(keeper.running_mean.device)
        kept = (keeper.running_mean.to(wide), keeper.running_var.to(wide))
        setattr(keeper, SHARED, (int(keeper.num_batches_tracked), *(t.clone() for t in kept)))
