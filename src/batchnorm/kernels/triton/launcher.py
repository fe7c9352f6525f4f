"""Launches: interpreted, into a graph that is recorded, or on a GPU with little ado."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.triton.operand import recorded

#: What Triton would else warn of, or decide by itself: products and sums fuse; and loops keep the
#: loads of as many tiles in flight as they say themselves.
COMPILED = {"enable_fp_fusion": True, "num_stages": 1}

#: Kernels by what they were compiled for. Lengths that always differ must not fill the memory.
_compiled: dict[Any, Any] = {}
MOST = 4096


def on(x: Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    if not x.is_cuda or recorded(x) or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def launch(
    kernel: Any,
    x: Tensor,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> None:
    """Run a kernel where x is. The constants are its last parameters, which it is compiled for.

    Triton's own launch finds out each time what the arguments are: 25 to 55 µs of Python for ours,
    more than most kernels take. So what it has compiled is kept, by all that decides it.
    """
    if recorded(x):
        # The graph has no place for the other option; without it Triton does the same.
        torch.library.wrap_triton(kernel)[grid](*args, *constants, num_warps=warps, num_stages=1)
        return
    if not x.is_cuda:
        kernel[grid](*args, *constants, num_warps=warps, **COMPILED)
        return
    key = id(kernel), x.device.index, warps, constants, kinds(args)
    found = _compiled.get(key)
    if found is not None:
        found[(*grid, 1, 1)[:3]](*args, *constants)
        return
    if len(_compiled) >= MOST:
        _compiled.clear()
    _compiled[key] = kernel[grid](*args, *constants, num_warps=warps, **COMPILED)


def kinds(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles for: dtypes and alignment of pointers, and whole numbers themselves.

    Of whole numbers it only looks whether they are 1, can be divided by 16, or need 64 bits.
    """
    return tuple(
        [
            (arg.dtype, arg.data_ptr() % 16 == 0)
            if isinstance(arg, Tensor)
            else arg
            if type(arg) is int
            else type(arg)
            for arg in args
        ]
    )
