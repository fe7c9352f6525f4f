"""What differs where Triton's interpreter computes on the CPU: see `make interpreted`.

The suites named there hold by the C++ kernels and by Triton's alike. What a test expects of one of
them only, it asks for here.
"""

import contextlib

import pytest

from batchnorm import NonFiniteWarning
from batchnorm.kernels import native, triton
from batchnorm.kernels.triton.operand import ELEMENTS

#: The kernels that whole calls are for.
KERNELS = triton if triton.INTERPRETED else native


def _not_there(reason):
    return pytest.mark.skipif(triton.INTERPRETED, reason=reason)


float64_only = _not_there("the Triton kernels leave float64 to plain torch")
too_large = _not_there("takes half a minute, and kernels/triton cuts small tensors as finely")


def missing():
    """Why those kernels are not there, or None."""
    return triton.missing() if triton.INTERPRETED else native.MISSING


def computes(dtype):
    """Whether the interpreter does, for elements of this dtype."""
    return triton.INTERPRETED and dtype in ELEMENTS


def leave_out(patch):
    """As if those kernels were not there, for comparison."""
    where, name = (triton, "ABSENT") if triton.INTERPRETED else (native, "MISSING")
    patch.setattr(where, name, "a test does without them")


def warns_of_non_finite(dtype, match=None):
    """A context in which the layer warns; on a GPU it looks at no values, and must be silent."""
    if computes(dtype):
        return contextlib.nullcontext()
    return pytest.warns(NonFiniteWarning, match=match)
