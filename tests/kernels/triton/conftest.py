"""The Triton kernels: on a GPU; without one, in Triton's interpreter: TRITON_INTERPRET=1."""

import pytest

import triton_steps
from batchnorm.kernels import triton


@pytest.fixture(autouse=True)
def _they_serve(without_native):
    if (reason := triton.missing()) is not None:
        pytest.skip(reason)


@pytest.fixture
def cut(request, monkeypatch):
    """Tensors are cut this way, which the test names; see `triton_steps.CUTS`."""
    triton_steps.cut(monkeypatch, **triton_steps.CUTS[request.param])
    return request.param
