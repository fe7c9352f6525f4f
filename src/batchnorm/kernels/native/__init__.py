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

from batchnorm.kernels import calls

NAME = "native"

#: Another build of the operators may be named, such as one with sanitizers.
LIBRARY = Path(
    os.environ.get("BATCHNORM_NATIVE_LIBRARY") or Path(__file__).with_name("_kernels.abi3.so")
)

#: The instruction sets, from the least; `use(k)` uses the k-th.
INSTRUCTIONS = ("baseline", "AVX2", "AVX-512")

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


def serves(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether these are plain tensors on the CPU, and operations are done as they are called."""
    return MISSING is None and calls.plain(x, weight, bias, residual) and x.is_cpu


def use(level: int = -1, *, serial_elements: int = -1, stream_bytes: int = -1) -> int:
    """Use the instructions of a level, below 0 the best that this processor has; how many it has.

    The same results to rounding; for tests and measurements. So are `serial_elements` and
    `stream_bytes`: from how many elements on more than one thread works, and beyond how many bytes
    in all tensors of a call its outputs are written past the cache; below 0 as measured.
    """
    return int(torch.ops.batchnorm.use(level, serial_elements, stream_bytes))


#: How many of `INSTRUCTIONS` this processor has.
LEVELS = use() if MISSING is None else 0
