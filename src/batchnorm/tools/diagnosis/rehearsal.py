"""A training step that nothing is left of: what it reaches, counts, and drops out."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.tools.diagnosis import gap
from batchnorm.tools.diagnosis.trace import Trace
from batchnorm.tools.diagnosis.watch import Watch

Calls = dict[Any, int]
"""How often each layer was called."""


@contextmanager
def in_training(model: nn.Module, still: Container[Any]) -> Iterator[None]:
    """Every module in training but these layers; afterwards in evaluation."""
    # Not train(), which modules may override to do more.
    for module in model.modules():
        module.training = module not in still
    try:
        yield
    finally:
        for module in model.modules():
            module.training = False


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A backward pass in it reaches nobody else: no other process, and no optimizer.

    Optimizers may step as soon as a gradient is there, in hooks of the parameters.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        for parameter in model.parameters():
            hooks: dict[Any, Any] | None = parameter._post_accumulate_grad_hooks
            if hooks:
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
        yield


def rehearse(
    model: nn.Module, layers: list[Any], counting: set[Any], trace: Trace, run: Callable[[], Any]
) -> tuple[Calls, dict[Any, tuple[int, int]]]:
    """One step: how often layers are called in its forward pass, and how often they count that.

    Args:
        model: in training.
        layers: all of them.
        counting: those that take batches in.
        trace: learns what feeds them.
        run: the forward pass.

    Returns:
        Calls of each layer; calls and counted batches of those that count, if there is a backward
        pass.
    """
    counters = {
        layer: int(layer.num_batches_tracked)
        for layer in counting
        if getattr(layer, "num_batches_tracked", None) is not None
    }
    watch = Watch(layers, deep=False)
    watch.next_batch()
    with torch.enable_grad(), undisturbed(model):
        with watch.hooks(), trace.hooks():
            output = run()
        calls = {layer: len(seen.calls[0]) for layer, seen in watch.seen.items()}
        if not counters or not any(p.requires_grad for p in model.parameters()):
            return calls, {}
        gap.loss_of(output).backward()
    return calls, {
        layer: (calls[layer], int(layer.num_batches_tracked) - before)
        for layer, before in counters.items()
    }
