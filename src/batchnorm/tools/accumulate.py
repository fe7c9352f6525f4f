"""Gradient accumulation: many micro-batches, one update of the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.kernels import select
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments
from batchnorm.running import take_in
from batchnorm.tools.layers import batch_norms
from batchnorm.tools.pause import pause_statistics

_Collected = dict[Any, tuple[_BatchNorm, Moments]]
"""For each module that keeps running statistics, a layer or a bank: the layer, and what came."""


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Micro-batches within make one update of the running statistics, from their pooled moments.

    The update is the one that their union as one batch would have made: weighted by count, with the
    variance between micro-batches, and counted once. Each micro-batch is normalised by its own
    statistics as usual; `forward_together` normalises all by those of the union. If an exception
    leaves the block, there is no update.

    Args:
        model: with any batch norm layers. Ours hand over the moments that they have anyway; torch's
            are watched, which costs one more pass over their input.

    Raises:
        ArgumentError: there are no batch norm layers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, accumulate_statistics
        >>> model, batch = nn.Sequential(BatchNorm(4, momentum=1.0)), torch.randn(64, 4)
        >>> with accumulate_statistics(model):
        ...     for micro_batch in batch.split([30, 30, 4]):
        ...         model(micro_batch).square().mean().backward()
        >>> torch.allclose(model[0].running_var, batch.var(0)), model[0].num_batches_tracked
        (True, tensor(1))
    """
    collected: _Collected = {}
    with ExitStack() as stack:
        for _, layer in batch_norms(model):
            if isinstance(layer, BatchNorm):
                stack.callback(setattr, layer, "_collect", layer._collect)
                layer._collect = partial(_collect, collected)
            elif layer.track_running_stats:
                stack.enter_context(pause_statistics(layer))
                stack.callback(layer.register_forward_pre_hook(partial(_watch, collected)).remove)
        yield
    for keeper, (layer, moments) in collected.items():
        running = keeper.running_mean, keeper.running_var, keeper.num_batches_tracked
        refused = take_in(running, moments, layer.momentum)
        if refused is not None and isinstance(layer, BatchNorm):
            layer.warn_nonfinite(refused)


def _collect(collected: _Collected, layer: _BatchNorm, keeper: Any, moments: Moments) -> None:
    if keeper in collected:
        moments = collected[keeper][1].merge(moments)
    collected[keeper] = layer, moments


@torch.no_grad()
def _watch(collected: _Collected, layer: Any, inputs: tuple[Tensor, ...]) -> None:
    """What torch's layers would take in."""
    if layer.training and not select.recomputing():
        _collect(collected, layer, layer, Moments.of(inputs[0]))
