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
from batchnorm.tools.layers import is_fixed


def switchable(layer: nn.Module) -> bool:
    """Whether training and evaluation differ for it at all."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None and not is_frozen(layer)


def still(model: nn.Module, named: list[tuple[str, Any]]) -> set[Any]:
    """Layers that normalise by their running statistics in training, too, and never update them.

    By their class, by `freeze`, or by hand: in evaluation, in a model that is in training. Where
    all layers are, and the modules around them, it is the outermost module that nobody put into
    evaluation, such as a wrapper: it is no freezing.
    """
    for_good = {layer for _, layer in named if is_fixed(layer) or is_frozen(layer)}
    by_hand = {
        layer: model.get_submodule(name.rpartition(".")[0]).training
        for name, layer in named
        if layer.running_mean is not None and not layer.training and layer not in for_good
    }
    others = any(layer not in by_hand and layer not in for_good for _, layer in named)
    if not model.training or not (others or any(by_hand.values())):
        return for_good
    return for_good | set(by_hand)


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
