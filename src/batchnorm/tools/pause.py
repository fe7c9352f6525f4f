"""Pausing: forward passes in training that leave no trace in the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.tools.layers import batch_norms


@contextmanager
def pause_statistics(model: nn.Module) -> Iterator[None]:
    """While it lasts, layers in training normalise by the batch and touch no running statistics.

    For passes that are not a training step: adversarial or generated examples, a gradient penalty,
    the second forward pass of a sharpness-aware step. Evaluation is as always. Copy the model
    outside: a copy made within stays paused.

    Args:
        model: with any batch norm layers, ours or torch's.

    Raises:
        ArgumentError: there are no batch norm layers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, pause_statistics
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8))
        >>> with pause_statistics(model):
        ...     _ = model(torch.randn(16, 4))
        >>> model[1].num_batches_tracked
        tensor(0)
    """
    # torch's own switch does just this, where there are running statistics.
    before = [(layer, layer.track_running_stats) for _, layer in batch_norms(model)]
    try:
        for layer, _ in before:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in before:
            layer.track_running_stats = tracked
