"""C++ kernels for the CPU: what loads them, what calls them and, where they are missing, why.

They serve a whole call each way: moments, output and running update in one; see ops.cpp for what
they take. What they do not take they leave untouched, and say so.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Another build of the operators may be named, such as one with sanitizers.
LIBRARY = Path(
    os.environ.get("BATCHNORM_NATIVE_LIBRARY") or Path(__file__).with_name("_kernels.abi3.so")
)

#: What the operators call the activations.
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2}
ACTIVATION_NAMES = tuple(ACTIVATIONS)
ACTIVATION = 3  # the bits that hold it

#: The rest of what a call is asked for, added to the activation; see ops.cpp. Forward:
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

#: The instruction sets, from the least; `use(k)` uses the k-th.
INSTRUCTIONS = ("baseline", "AVX2", "AVX-512")

NOT_SERVED = -1

INSTALL = (
    "they are not built on Windows"
    if sys.platform == "win32"
    else "install a C++17 compiler (g++ or clang++) and build again with "
    "`pip install --no-build-isolation --force-reinstall --no-deps .` in the clone, where torch is "
    "installed"
)


def _load() -> str | None:
    """Make the operators known to torch; or why that cannot be done."""
    if "native" in os.environ.get("BATCHNORM_DISABLE", "").split(","):
        return "the environment variable BATCHNORM_DISABLE names it"
    if not LIBRARY.exists():
        compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
        missing = "" if compiler else "there is no C++ compiler; "
        return f"the C++ kernels were not built; {missing}{INSTALL}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the C++ kernels do not load ({error}); {INSTALL}"
    return None


#: Why there are no kernels, or None.
MISSING = _load()

_PLAIN = (Tensor, torch.nn.Parameter)

# A call each way: forward, backward. And their halves, for statistics that others have a share in:
# moments of a part; forward, in evaluation, by what all parts make together; backward_reduce of a
# part; backward, given the sums of all parts.
if MISSING is None:
    # Not the operator but what it calls: 0.3 µs less.
    forward = torch.ops.batchnorm.forward.default._op
    backward = torch.ops.batchnorm.backward.default._op
    update = torch.ops.batchnorm.update.default._op
    moments = torch.ops.batchnorm.moments.default._op
    backward_reduce = torch.ops.batchnorm.backward_reduce.default._op


def serves_buffer(buffer: Tensor | None) -> bool:
    """Whether this may be changed without autograd's knowing, or is None."""
    return buffer is None or (
        type(buffer) in _PLAIN
        and not buffer.requires_grad
        and not buffer.is_neg()
        and (not buffer.is_inference() or torch.is_inference_mode_enabled())
    )


def hooked() -> bool:
    """Whether hooks see what autograd saves. They may raise: checkpointing does, to stop early."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def inexact() -> bool:
    """Whether those will bring back an x that is only close to what was saved."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "inexact", False)


def saves(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> bool:
    """Whether autograd can save these; it finds out after the kernels have changed the buffers."""
    return not (
        torch.is_inference_mode_enabled()  # y will be one
        or x.is_inference()
        or (weight is not None and weight.is_inference())
        or (bias is not None and bias.is_inference())
        or (mask is not None and mask.is_inference())
    )


def serves(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether these are plain tensors on the CPU, and operations are done as they are called.

    What is asked here decides about each call and takes 1 µs; the operators ask the rest.
    """
    return (
        MISSING is None
        and type(x) in _PLAIN
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_nested
        and (weight is None or type(weight) in _PLAIN)
        and (bias is None or type(bias) in _PLAIN)
        and (residual is None or (type(residual) in _PLAIN and residual.layout is torch.strided))
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


def use(level: int = -1, *, serial_elements: int = -1, stream_bytes: int = -1) -> int:
    """Use the instructions of a level, below 0 the best that this processor has; how many it has.

    The same results to rounding; for tests and measurements. So are `serial_elements` and
    `stream_bytes`: from how many elements on more than one thread works, and beyond how many bytes
    in all tensors of a call its outputs are written past the cache; below 0 as measured.
    """
    return int(torch.ops.batchnorm.use(level, serial_elements, stream_bytes))


#: How many of `INSTRUCTIONS` this processor has.
LEVELS = use() if MISSING is None else 0
