"""Looking on: the moments of what comes into batch norm layers, whatever mode they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence

from batchnorm import autograd_kernels
from batchnorm.errors import BatchNormError
from batchnorm.kernels import native, select
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments
from batchnorm.validation import check_tensors, check_weights

See = Callable[[Any, Callable[[], Moments]], None]
"""Gets what computes the moments of a call of a layer: of the layer itself or of its bank in use,
the first argument. It is called before the layer computes anything."""


@contextmanager
def observe(layers: Mapping[_BatchNorm, str], see: See) -> Iterator[None]:
    """While it lasts, `see` is called with what comes into the layers, whose names are given.

    What a mask leaves out is not in it; a `PackedSequence` has no padding. (Code that has been
    compiled does not call hooks that come later.)
    """
    with ExitStack() as stack:
        for layer, name in layers.items():
            # After hooks that are there already, which may change what comes in.
            hook = layer.register_forward_pre_hook(partial(_look, name, see), with_kwargs=True)
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def _look(name: str, see: See, layer: Any, args: Any, kwargs: Any) -> None:
    ours = isinstance(layer, BatchNorm)
    x = args[0] if args else kwargs.get("x" if ours else "input")
    x = x.data if isinstance(x, PackedSequence) else x
    mask, channel_dim, keeper = None, 1, layer
    if ours:
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        channel_dim = layer.channel_dim
        keeper = layer if layer._bank is None else layer.banks[layer._bank]
    try:
        running = keeper.running_mean, keeper.running_var
        check_tensors(x, *running, None, None, False, mask, None, channel_dim)
        if mask is not None and select.concrete(mask):
            check_weights(mask)
        see(keeper, partial(_moments, x.detach(), mask, channel_dim))
    except BatchNormError as error:
        if not error.located:
            error.args = (f"layer {name!r}, {type(layer).__name__}({layer.num_features}): {error}",)
            error.located = True
        raise


def _moments(x: torch.Tensor, mask: torch.Tensor | None, channel_dim: int) -> Moments:
    # The C++ kernels take a tenth of the time, and leave some of it to others.
    if native.serves(x, None, None, None):
        served = autograd_kernels.moments(x, mask, channel_dim, 0)
        if served is not None:
            return served[2]
    return select.moments(x, mask, channel_dim)
