"""What differs where Triton's interpreter computes on the CPU: see `make interpreted`.

The suites that are named there hold by the C++ kernels and by Triton's alike. What a test expects of
one of them only it asks for here, so that all that does is found in one place.
"""

import contextlib

import pytest

from batchnorm import NonFiniteWarning
from batchnorm.kernels import native, triton
from batchnorm.kernels.triton.operand import ELEMENTS

#: The kernels that serve whole calls of float32, and why there are none.
KERNELS = triton if triton.INTERPRETED else native
MISSING = triton.missing() if triton.INTERPRETED else native.MISSING

#: For a test of what the Triton kernels leave to others.
float64_only = pytest.mark.skipif(triton.INTERPRETED, reason="Triton leaves float64 to plain torch")


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
