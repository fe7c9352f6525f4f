"""Mask × ghost groups × renormalization × activation × residual × channel axis: each with each."""

import itertools

import pytest
import torch
from torch.nn.functional import leaky_relu

import oracle
from batchnorm import Renorm, batch_norm, batch_norm_pure
from within import assert_running, assert_step

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = {0: (3, 7, 4), 1: (7, 3, 4), -1: (7, 2, 2, 3)}
RENORMS = {None: None, "within": (100.0, 100.0), "clipped": (1.1, 0.05)}
# The oracle knows the function that is not fused by the name of the one that is.
ACTIVATIONS = {None: None, "relu": "relu", "function": leaky_relu}


def masks(kind, samples, rest):
    """Nothing of the second group counts, and all of some samples."""
    if kind is None:
        return None
    counts = torch.rand(samples, *rest) > 0.3
    counts[0], counts[6], counts[2:4] = True, True, False
    return counts if kind == "bool" else counts * (torch.rand(samples, *rest).double() + 0.5)


@pytest.mark.parametrize("mask_kind", [None, "bool", "weights"])
@pytest.mark.parametrize("size", [None, 2, 7])  # 2: the last group is one sample
@pytest.mark.parametrize("limits", RENORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_with_each(mask_kind, size, limits, activation):
    for with_residual, channel_dim in itertools.product((False, True), SHAPES):
        shape = SHAPES[channel_dim]
        x, residual, dy = (torch.randn(shape, dtype=torch.float64) * 2 + 1 for _ in range(3))
        weight, bias, mean = (torch.randn(3, dtype=torch.float64) for _ in range(3))
        var = torch.rand(3, dtype=torch.float64) + 0.5
        rest = [n for axis, n in enumerate(shape) if axis != channel_dim % len(shape)]
        mask = masks(mask_kind, rest[0], rest[1:])
        old = mean.clone(), var.clone()
        leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
        arguments = (weight, bias, True, 0.3)
        options = {
            "mask": mask,
            "residual": residual if with_residual else None,
            "channel_dim": channel_dim,
            "activation": ACTIVATIONS[activation],
            "virtual_batch_size": size,
            "renorm": RENORMS[limits] and Renorm(*RENORMS[limits]),
        }
        y = batch_norm(x, mean, var, *arguments, **options)
        names = ["dx", "d_weight", "d_bias", "d_residual"][: 3 + with_residual]
        got = dict(zip(names, torch.autograd.grad(y, leaves[: len(names)], dy), strict=True))
        want = oracle.step(
            *(dy, x, weight, bias),
            mask=mask,
            residual=options["residual"],
            size=size,
            renorm=RENORMS[limits] and (*old, *RENORMS[limits]),
            activation="leaky_relu" if activation == "function" else activation,
            channel_dim=channel_dim,
        )
        assert_step({"y": y, **got}, want, x, renorm=limits is not None)
        assert_running((mean, var), old, want, 0.3)
        pure = batch_norm_pure(x, *old, *arguments, **options)
        assert all(torch.equal(a, b) for a, b in zip(pure, (y, mean, var), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_evaluation_is_as_without_to_the_bit(dtype):
    """By the same kernels, forward and backward; nothing is refused for its groups, or updated."""
    x, residual, dy = torch.randn(3, 5, 3, 4).to(dtype)
    statistics = torch.randn(3), torch.rand(3) + 0.5
    before = [s.clone() for s in statistics]
    results = []
    for options in ({}, {"virtual_batch_size": 2}, {"renorm": Renorm()}):
        leaf = x.clone().requires_grad_()
        y = batch_norm(leaf, *statistics, residual=residual, activation="relu", **options)
        backend = y.grad_fn.backend
        results.append([backend, y.detach(), *torch.autograd.grad(y, leaf, dy)])
        pure = batch_norm_pure(x, *statistics, residual=residual, activation="relu", **options)
        assert torch.equal(pure.output, y)
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(other[1:], results[0][1:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(statistics, before, strict=True))
