"""Limits, running statistics and tolerances that the tests of renormalization share."""

import torch

from batchnorm import Renorm

OPEN, TIGHT = Renorm(100.0, 100.0), Renorm(1.1, 0.05)
AT_ONCE = {"r_steps": (0, 0), "d_steps": (0, 0)}

close = {"rtol": 1e-11, "atol": 1e-11}  # float64, and sums of some hundred terms


def state(channels=3, dtype=torch.float32):
    """Running statistics that no batch here has."""
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5
