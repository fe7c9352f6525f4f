"""Triton kernels for CUDA GPUs: what they serve, how they are called and, where not, why.

They serve a whole call each way, with the arguments and results of the C++ kernels; see
`kernels/calls.py`. Nothing here waits for the device: a count that a mask decides stays a tensor,
and what the values of a batch decide is decided there.

With TRITON_INTERPRET=1 in the environment Triton's interpreter runs them on the CPU, to test them.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from batchnorm.kernels import calls
from batchnorm.kernels.triton.launch import (
    backward as backward,
)
from batchnorm.kernels.triton.launch import (
    backward_reduce as backward_reduce,
)
from batchnorm.kernels.triton.launch import (
    forward as forward,
)
from batchnorm.kernels.triton.launch import (
    moments as moments,
)
from batchnorm.kernels.triton.launch import (
    update as update,
)
from batchnorm.kernels.triton.operand import ELEMENTS

NAME = "triton"

#: Triton decides so too, when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Compute capability from which on bfloat16 arithmetic is the chip's own.
CAPABILITY = (8, 0)


_DISABLED = "triton" in os.environ.get("BATCHNORM_DISABLE", "").split(",")


def _absent() -> str | None:
    if _DISABLED:
        return "the environment variable BATCHNORM_DISABLE names it"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


#: Why there are no kernels whatever the machine has, or None.
ABSENT = _absent()


def missing() -> str | None:
    """Why there are no kernels here, or None; first what no installing of Triton would mend."""
    if INTERPRETED or _DISABLED:
        return ABSENT
    if torch.version.hip is not None:
        return "they have not been tried with ROCm"
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (it is built without CUDA)"
        return f"torch finds no CUDA GPU{built}"
    if ABSENT:
        return ABSENT
    index = torch.cuda.current_device()
    return _too_old(index) or _broken(index)


@lru_cache
def _too_old(index: int) -> str | None:
    found = torch.cuda.get_device_capability(index)
    if found >= CAPABILITY:
        return None
    return f"expected compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, the GPU has {found}"


@lru_cache
def _broken(index: int) -> str | None:
    """Why Triton cannot compile here, such as for want of a C compiler, or None: tried once."""
    device = torch.device("cuda", index)
    try:
        mean, var = torch.zeros(2, 1, dtype=torch.float64, device=device).unbind()
        buffers = torch.zeros(2, 1, device=device)
        update(mean, var, 2.0, buffers[0], buffers[1], None, 0.0)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        reason = f"Triton cannot compile here: {type(error).__name__}: {first}"
        warnings.warn(f"plain torch computes in place of kernels: {reason}", stacklevel=2)
        return reason
    return None


def serves(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether these are plain tensors on a GPU, and operations are done as they are called."""
    # First whether operations are recorded: the compiler must not look into the rest.
    if ABSENT or not calls.plain(x, weight, bias, residual) or x.dtype not in ELEMENTS:
        return False
    if INTERPRETED:
        return x.device.type in ("cpu", "cuda")
    return (
        x.is_cuda
        and torch.version.hip is None
        and _too_old(x.device.index) is None
        # Not while a graph is captured, when nothing can be tried.
        and (torch.cuda.is_current_stream_capturing() or _broken(x.device.index) is None)
    )
