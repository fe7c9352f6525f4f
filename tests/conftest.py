"""Every test starts from the same seed, on one thread, with uninitialised memory full of NaN."""

import os

# One thread a process: the suite runs two processes on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What Keras is to compute with, where it is installed.
os.environ.setdefault("KERAS_BACKEND", "torch")

import contextlib
import ctypes
import sys
import threading

import numpy as np
import pytest
import torch

from batchnorm.kernels import native, triton

torch.set_num_threads(1)

# `make gpu` runs the kernels' tests, which do without it, where it may be missing.
with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    hypothesis.settings.register_profile(
        "batchnorm", deadline=None, derandomize=True, max_examples=60
    )
    hypothesis.settings.load_profile("batchnorm")

if GLIBC := sys.platform == "linux":
    # Fill all that malloc gives with bytes of ones, NaN in every floating dtype: torch does not
    # poison what the C++ kernels allocate. M_PERTURB is -6; glibc fills with the complement of the
    # value's last byte, and takes 0 for off, but not 256.
    ctypes.CDLL(None).mallopt(-6, 256)

if triton.INTERPRETED:
    # The interpreter is NumPy, which warns of what no GPU does.
    np.seterr(all="ignore")


@pytest.fixture
def clean_memory():
    """Memory as the system gives it: for tests of sizes that should not be written twice."""
    torch.use_deterministic_algorithms(False)
    if GLIBC:
        ctypes.CDLL(None).mallopt(-6, 0)
    yield
    if GLIBC:
        ctypes.CDLL(None).mallopt(-6, 256)


@pytest.fixture
def without_native(monkeypatch):
    """As if the C++ kernels had not been built."""
    monkeypatch.setattr(native, "MISSING", "a test does without them")


@pytest.fixture(params=["native", "others"])
def kernels(request):
    """With the C++ kernels, and as if they had not been built."""
    if request.param == "others":
        request.getfixturevalue("without_native")
    elif native.MISSING is not None:
        pytest.skip(native.MISSING)


@pytest.fixture
def no_thread_stays():
    """No thread is left waiting."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """Fill torch.empty with NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
