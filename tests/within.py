"""Bounds on errors against the oracle, from the unit roundoff; see test_numerics.py for why.

Those of Triton's kernels, where its interpreter computes, have their derivation in triton_steps.py.
"""

import torch

import oracle
from interpreted import computes
from triton_steps import ELEMENT, SUMS, roundoff


def assert_step(got, want, x, *, parameters=None, renorm=False):
    """y and gradients, by name, against `oracle.step`.

    An element of y or dx has at most 8 roundings of float32 (of float64, for float64), and one more
    when it is stored. Sums are in float64, but of half precision eight terms at a time are added in
    float32 first. Renormalization's r and d have 8 more, in float64.
    """
    float64 = x.dtype is torch.float64
    compute = roundoff(torch.promote_types(x.dtype, torch.float32))
    parameters = parameters or torch.promote_types(x.dtype, torch.float32)
    folded = 7 if x.dtype.itemsize == 2 else 0
    roundings = {"y": 8, "dx": 8, "d_weight": 4 + folded, "d_bias": 1 + folded, "d_residual": 1}
    if computes(x.dtype):
        roundings |= dict.fromkeys(("y", "dx", "d_weight", "d_bias"), ELEMENT + SUMS)
    terms = x.numel() + 64
    for name, tensor in got.items():
        value, size = want[name].value, want[name].size
        stored = parameters if name in ("d_weight", "d_bias") else x.dtype
        assert tensor.dtype is stored, name
        # float64 sums of all the terms, and statistics that carry their error on.
        bound = (roundings[name] + 8 * (renorm and float64)) * compute + terms * 2.0**-53
        bound = 1.01 * roundoff(stored) * abs(value) + bound * size
        bound = bound + torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
        error = abs(oracle.wide(tensor) - value)
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times the bound"


def assert_running(buffers, old, want, momentum=0.1):
    """Running mean and variance after a step, from what they were."""
    f = oracle.Forward(None, None, want["mean"].value, None, want["unbiased"].value, *[None] * 3)
    for tensor, before, value, name in zip(
        buffers, old, oracle.running(*old, f, momentum), ("mean", "unbiased"), strict=True
    ):
        # Rounded once; float64 sums of at most 2¹⁰ terms before that.
        size = abs(oracle.wide(before)) + want[name].size
        bound = 1.01 * roundoff(tensor.dtype) * abs(value) + 2.0**-43 * size
        if computes(tensor.dtype):
            bound = bound + SUMS * 2.0**-24 * momentum * want[name].size
        error = abs(oracle.wide(tensor) - value)
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times the bound"
