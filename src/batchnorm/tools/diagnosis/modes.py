"""Switching batch norm layers one by one between the batch's statistics and the running ones."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.sync import WORLD, resolve
from batchnorm.tools.freeze import is_frozen


def switchable(layer: nn.Module) -> bool:
    """Whether training and evaluation differ for it at all."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None and not is_frozen(layer)


@contextmanager
def normalizing_by(layers: list[Any], batch: Container[Any]) -> Iterator[None]:
    """Layers in `batch` normalise by the batch, and take nothing in; all others by what they keep.

    Those that are frozen, or keep nothing, do what they always do.
    """
    before: list[tuple[Any, bool, Any]] = [
        (layer, layer.training, getattr(layer, "track_running_stats", None)) for layer in layers
    ]
    try:
        for layer in layers:
            if isinstance(layer, _BatchNorm):
                layer.training = layer in batch
                # torch's own switch against updates.
                if layer.training and layer.running_mean is not None:
                    layer.track_running_stats = False
        yield
    finally:
        for layer, training, tracked in before:
            layer.training = training
            if isinstance(layer, _BatchNorm):
                layer.track_running_stats = tracked


def channel_axis(layer: nn.Module, rank: int) -> int:
    """Of an input of so many axes, that of the channels, counted from the front."""
    axis = layer.channel_dim if isinstance(layer, BatchNorm) else 1
    return axis % rank


def processes_of(layer: nn.Module) -> int:
    """How many processes' batches make the statistics in training."""
    group = None
    if isinstance(layer, nn.SyncBatchNorm):
        group = resolve(layer.process_group or WORLD)
    elif isinstance(layer, BatchNorm):
        group = resolve(layer.process_group)
    return 1 if group is None else distributed.get_world_size(group)
