"""Every test starts from the same seed, on one thread, with uninitialised memory full of NaN."""

import os

# One thread a process: the suite runs two processes on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("batchnorm", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("batchnorm")


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """Fill torch.empty with NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
