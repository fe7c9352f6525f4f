"""Gradient accumulation: many micro-batches, one update of the running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import NonFiniteWarning
from batchnorm.kernels import select
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments
from batchnorm.running import nonfinite_message, take_in
from batchnorm.sync import WORLD, Synchronizer, resolve
from batchnorm.tools.layers import batch_norms

_Collected = dict[Any, tuple[_BatchNorm, Moments]]
"""For each module that keeps running statistics, a layer or a bank: the layer, and what came."""

#: torch's layers take it for False. It is not the False of `pause_statistics`, and compiled code
#: sees it, as it may not see a hook that came later.
_WITHHELD: Any = 0


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Micro-batches within make one update of the running statistics, from their pooled moments.

    The update is the one that their union as one batch would have made: weighted by count, with the
    variance between micro-batches, and counted once. Each micro-batch is normalised by its own
    statistics as usual; `forward_together` normalises all by those of the union. If an exception
    leaves the block, there is no update. A block within a block hands over to the outer one. A
    layer that each micro-batch passes twice makes one update of both, not two.

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
    names = {layer: name for name, layer in batch_norms(model)}
    with ExitStack() as stack:
        for layer in names:
            outer = getattr(layer, "_collect", None)
            if outer is None and not isinstance(layer, BatchNorm):
                _watch(layer, stack)
            stack.callback(layer.__dict__.__setitem__, "_collect", outer)
            layer.__dict__["_collect"] = partial(_collect, collected)
        yield
    for keeper, (layer, moments) in collected.items():
        take(layer, keeper, moments, names[layer])


def take(layer: _BatchNorm, keeper: Any, moments: Moments, name: str) -> None:
    """A layer, or a bank of it, takes in what came in parts: at once, or when a block ends."""
    collect = getattr(layer, "_collect", None)
    if collect is not None:
        collect(layer, keeper, moments)
        return
    running = keeper.running_mean, keeper.running_var, keeper.num_batches_tracked
    refused = take_in(running, moments, layer.momentum)
    if refused is None:
        return
    if isinstance(layer, BatchNorm):
        layer.warn_nonfinite(refused, name)
    else:
        message = f"layer {name!r}, {type(layer).__name__}: {nonfinite_message(refused)}"
        warnings.warn(message, NonFiniteWarning, stacklevel=2)


def _collect(collected: _Collected, layer: _BatchNorm, keeper: Any, moments: Moments) -> None:
    if keeper in collected:
        moments = collected[keeper][1].merge(moments)
    collected[keeper] = layer, moments


def _watch(layer: _BatchNorm, stack: ExitStack) -> None:
    """Let a layer of torch's hand over, too, what it would take in."""
    if layer.track_running_stats:
        stack.callback(setattr, layer, "track_running_stats", layer.track_running_stats)
        layer.track_running_stats = _WITHHELD
        # Before other hooks: one of a frozen layer's says that it is in training again.
        hook = layer.register_forward_hook(_hand_over, with_kwargs=True, prepend=True)
        stack.callback(hook.remove)


@torch.no_grad()
def _hand_over(layer: Any, args: Any, kwargs: Any, _: Any) -> None:
    if layer.training and layer.track_running_stats is not False and not select.recomputing():
        x = args[0] if args else kwargs["input"]
        moments = Moments.of(x)
        if isinstance(layer, nn.SyncBatchNorm):
            group = resolve(layer.process_group or WORLD)
            moments = moments if group is None else Synchronizer(group).merge(moments)[0]
        layer._collect(layer, layer, moments)
