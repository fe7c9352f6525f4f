"""Derivatives to second order, in every mode, by finite differences and with random cotangents."""

import itertools

import pytest
import torch

from batchnorm import batch_norm
from batchnorm.kernels import native

pytestmark = pytest.mark.usefixtures("kernels")

GRID = list(itertools.product([True, False], [None, "bool", "weights"], [None, "relu"]))


def function(training, mask_kind, activation):
    mask = {None: None, "bool": torch.rand(4, 3) > 0.3, "weights": torch.rand(4, 3) * 2}[mask_kind]
    statistics = (torch.randn(2).double(), torch.rand(2).double() + 0.5)

    def call(x, weight, bias, residual):
        return batch_norm(
            x,
            *(s.clone() for s in statistics),
            weight,
            bias,
            training,
            mask=mask,
            residual=residual,
            activation=activation,
        )

    return call


def leaves():
    shapes = (4, 2, 3), (2,), (2,), (4, 2, 3)
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


@pytest.mark.parametrize(("training", "mask_kind", "activation"), GRID)
def test_first_and_second_order(training, mask_kind, activation):
    call = function(training, mask_kind, activation)
    # gradcheck compares whole Jacobians, so no cotangent can hide an error; gradgradcheck draws
    # random ones.
    assert torch.autograd.gradcheck(call, leaves(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        call, leaves(), gen_non_contig_grad_outputs=True, check_fwd_over_rev=True
    )


@pytest.mark.parametrize("training", [True, False])
def test_second_order_through_kernels_in_float32(training):
    """Forward by kernels that compute in float32; the second order must be float64's."""
    wanted = "aten" if native.MISSING else "native"

    def penalty(dtype):
        torch.manual_seed(3)
        x = torch.randn(8, 2, 5).to(dtype).requires_grad_()
        weight = torch.randn(2).to(dtype).requires_grad_()
        dy = torch.randn(8, 2, 5).to(dtype)
        statistics = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
        y = batch_norm(x, *statistics, weight, None, training)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        # In evaluation y is linear in x, and dx no function of it.
        leaves = (x, weight) if training else (weight,)
        return y.grad_fn.backend, torch.autograd.grad(dx.square().sum(), leaves)

    backend, single = penalty(torch.float32)
    assert backend == wanted
    _, double = penalty(torch.float64)
    for got, want in zip(single, double, strict=True):
        # Sums of 40 float32 terms of the size of the largest result.
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=64 * 2.0**-24 * want.abs().max().item()
        )


def test_third_order():
    call = function(True, "weights", None)
    _, weight, bias, residual = leaves()

    def second(x):
        y = call(x, weight, bias, residual)
        torch.manual_seed(1)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
        return torch.autograd.grad(dx, x, torch.randn_like(dx), create_graph=True)[0]

    assert torch.autograd.gradcheck(second, leaves()[:1])


def test_gradients_only_for_what_asks():
    x, weight, bias, residual = leaves()
    y = function(True, None, None)(x.detach(), weight, bias.detach(), residual)
    got = torch.autograd.grad(y, (weight, residual), torch.randn_like(y))
    assert all(g is not None for g in got)
    assert not y.grad_fn.needs_input_grad[0]


def test_gradients_have_the_dtypes_of_their_tensors():
    x = torch.randn(6, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, requires_grad=True)
    residual = torch.randn(6, 2, dtype=torch.float32, requires_grad=True)
    y = batch_norm(x, None, None, weight, training=True, residual=residual)
    grads = torch.autograd.grad(y, (x, weight, residual), torch.randn_like(y))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("mask_kind", ["bool", "weights"])
def test_nan_in_what_is_left_out_reaches_no_derivative(mask_kind):
    """First and second order, forward mode: as with clean padding, at the elements that count."""
    torch.manual_seed(5)
    counts = torch.rand(6, 3) > 0.4
    mask = counts if mask_kind == "bool" else counts * torch.rand(6, 3).double() * 3
    clean, weight, bias = torch.randn(6, 2, 3).double(), *torch.randn(2, 2).double()
    where = counts[:, None].expand_as(clean)
    dy, direction, ddx = torch.where(where, torch.randn(3, 6, 2, 3).double(), 0.0)

    def derivatives(x):
        def call(x, weight):
            return batch_norm(x, None, None, weight, bias, True, mask=mask)

        x, gamma = x.clone().requires_grad_(), weight.clone().requires_grad_()
        dx, dgamma = torch.autograd.grad(call(x, gamma), (x, gamma), dy, create_graph=True)
        second = torch.autograd.grad(dx, (x, gamma), ddx)
        tangent = torch.func.jvp(call, (x.detach(), weight), (direction, torch.ones(2).double()))[1]
        return dx.detach()[where], dgamma.detach(), second[0][where], second[1], tangent[where]

    for junk in (torch.nan, torch.inf, 1e200):
        dirty = derivatives(torch.where(where, clean, junk))
        for got, want in zip(dirty, derivatives(clean), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_gradient_from_above_is_no_gradient_below():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y * 1

        @staticmethod
        def backward(ctx, dy):
            return None

    x = torch.randn(6, 2, requires_grad=True)
    Stop.apply(batch_norm(x, None, None, training=True)).sum().backward()
    assert x.grad is None


def test_tangents_have_the_outputs_dtype():
    """Forward-mode differentiation refuses any other; the residual may be the wider of the two."""
    x, residual = torch.randn(4, 2, dtype=torch.bfloat16), torch.randn(4, 2)
    for skip in (None, residual):
        y, y_dot = torch.func.jvp(
            lambda x, skip=skip: batch_norm(x, None, None, training=True, residual=skip), (x,), (x,)
        )
        assert y.dtype == y_dot.dtype == (torch.bfloat16 if skip is None else torch.float32)
