"""What every set of kernels that serves whole calls is asked, and how it is asked for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: What the operators call the activations.
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2}
ACTIVATION_NAMES = tuple(ACTIVATIONS)
ACTIVATION = 3  # the bits that hold it

#: The rest of what a call is asked for, added to the activation; see native/ops.cpp. Forward:
TRAINING, LATER, KEEP = 4, 8, 16
#: And backward, after `TRAINING`:
WANT_X, WANT_RESIDUAL, WANT_PARAMETERS = 8, 16, 32

#: From this bit on, in both: samples in a group that has its own statistics, 0 for all in one. The
#: statistics are then each group's, one after the other, and those of all groups together behind.
GROUP_BIT = 8

#: What the operators call a plain average over all batches.
PLAIN_AVERAGE = -1.0

#: Dtypes of a mask that the operators read.
MASKS = (torch.bool, torch.float32, torch.float64)

NOT_SERVED = -1

#: Tensors that have their values with them, and nothing besides.
PLAIN = (Tensor, torch.nn.Parameter)


def serves_buffer(buffer: Tensor | None) -> bool:
    """Whether this may be changed without autograd's knowing, or is None."""
    return buffer is None or (
        type(buffer) in PLAIN
        and not buffer.requires_grad
        and not buffer.is_neg()
        and (not buffer.is_inference() or torch.is_inference_mode_enabled())
    )


def hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Those that see what autograd saves, on this thread: the innermost, which torch asks alone."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def hooked() -> bool:
    """Whether there are any. They may raise: checkpointing does, to stop early."""
    return hooks() is not None


def checkpoints() -> bool:
    """Whether these may be checkpointing's. Those of `save_memory` are not, nor hide what is."""
    top = hooks()
    return top is not None and getattr(top[0], "checkpoints", True)


def inexact() -> bool:
    """Whether those will bring back an x that is only close to what was saved."""
    top = hooks()
    return top is not None and getattr(top[0], "inexact", False)


def saves(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> bool:
    """Whether autograd can save these; it finds out after the kernels have changed the buffers."""
    return not (
        torch.is_inference_mode_enabled()  # y will be one
        or x.is_inference()
        or (weight is not None and weight.is_inference())
        or (bias is not None and bias.is_inference())
        or (mask is not None and mask.is_inference())
    )


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether these are plain tensors, and operations are done as they are called.

    What is asked here decides about each call and takes 1 µs; the kernels ask the rest.
    """
    return (
        type(x) in PLAIN
        and x.layout is torch.strided
        and not x.is_nested
        and (weight is None or type(weight) in PLAIN)
        and (bias is None or type(bias) in PLAIN)
        and (residual is None or (type(residual) in PLAIN and residual.layout is torch.strided))
        and not torch.compiler.is_compiling()
        # No public names exist for these questions: is jit.trace recording, does a torch.func
        # transform run, does anyone watch or replace operations, is there a forward-mode level.
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(x)
        # Left over from a transform that is done.
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
    )


def serves_gradient(dy: Tensor) -> bool:
    """Whether the gradient of what was served is a plain tensor too: vmap may bring others."""
    return (
        type(dy) is Tensor
        and not torch._C._are_functorch_transforms_active()
        # grad(…, is_grads_batched=True) and gradcheck have a vmap of their own.
        and not torch._C._functorch.is_legacy_batchedtensor(dy)
        and torch._C._len_torch_dispatch_stack() == 0
    )
