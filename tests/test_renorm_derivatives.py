"""Batch Renormalization: derivatives of first and second order, to which r and d are constants."""

import functools
import itertools

import pytest
import torch
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

import oracle
from batchnorm import Renorm, batch_norm, batch_norm_pure
from renorm_limits import OPEN, TIGHT, close, state
from within import assert_step

pytestmark = pytest.mark.usefixtures("kernels")


def composed(x, mean, var, weight, bias, renorm, size=None, mask=None):
    """The paper's algorithm in torch's own operations, r and d detached; groups one by one."""
    mask = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
    outputs = []
    for part, counts in zip(x.split(size or len(x)), mask.split(size or len(x)), strict=True):
        picked = part.movedim(1, -1)[counts]
        var_b, mean_b = torch.var_mean(picked, 0, correction=0)
        sigma, sigma_b = (var + 1e-5).sqrt(), (var_b + 1e-5).sqrt()
        r = (sigma_b / sigma).clamp(1 / renorm.r_max, renorm.r_max).detach()
        d = ((mean_b - mean) / sigma).clamp(-renorm.d_max, renorm.d_max).detach()
        along = (-1,) + (1,) * (x.dim() - 2)
        x_hat = (part - mean_b.view(along)) / sigma_b.view(along)
        y = x_hat * r.view(along) + d.view(along)
        outputs.append(y * weight.view(along) + bias.view(along))
    return torch.cat(outputs)


def problem(size=None, masked=False):
    x, dy, ddx = (torch.randn(7, 2, 3).double() * 2 + 1 for _ in range(3))
    weight, bias = (torch.randn(2).double() for _ in range(2))
    mask = None
    if masked:
        mask = torch.rand(7, 3) > 0.3
        mask[:, :2] = True
    return x, weight, bias, mask, dy, ddx


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("renorm", [OPEN, TIGHT])
def test_first_and_second_order_are_those_with_r_and_d_detached(renorm, size, masked):
    x, weight, bias, mask, dy, ddx = problem(size, masked)
    mean, var = state(2, torch.float64)
    ours = functools.partial(
        batch_norm, training=True, mask=mask, virtual_batch_size=size, renorm=renorm
    )
    results = []
    for form in (
        lambda x, w, b: ours(x, mean.clone(), var.clone(), w, b),
        lambda x, w, b: composed(x, mean, var, w, b, renorm, size, mask),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = form(*leaves)
        plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        torch.testing.assert_close(plain, first, **close)
        second = torch.autograd.grad(first[:2], leaves[:2], (ddx, torch.ones(2).double()))
        results.append((y.detach(), *plain, *second))
    torch.testing.assert_close(*results, **close)
    # Not by accident: with gradients through r and d they are others, where no limit holds.
    if renorm is OPEN:
        leaf = x.clone().requires_grad_()
        evaluated = batch_norm(leaf, mean, var, weight, bias)
        (through,) = torch.autograd.grad(evaluated, leaf, dy)
        assert (through - results[0][1]).abs().max() > 0.1


@pytest.mark.parametrize(("size", "masked"), [(None, False), (3, False), (3, True)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_second_order_by_finite_differences(size, masked, activation):
    """Beyond the limits r and d are constants, and finite differences see no gradient of theirs.

    Within them finite differences do; so here both limits hold in every channel and group.
    """
    x, weight, bias, mask, _, _ = problem(size, masked)
    residual = torch.randn(7, 2, 3).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def call(x, weight, bias, residual):
        return batch_norm(
            *(x, torch.full((2,), -50.0).double(), torch.full((2,), 1e-3).double()),
            *(weight, bias, True),
            mask=mask,
            residual=residual,
            activation=activation,
            virtual_batch_size=size,
            renorm=TIGHT,
        )

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("size", [None, 3])
def test_jacobians_of_the_pure_form(transform, size):
    x, weight, bias, mask, _, _ = problem(size, True)
    mean, var = state(2, torch.float64)

    def ours(x, weight, bias):
        return batch_norm_pure(
            *(x, mean, var, weight, bias, True), mask=mask, virtual_batch_size=size, renorm=OPEN
        ).output

    got = transform(ours, argnums=(0, 1, 2))(x, weight, bias)
    want = transform(
        lambda x, w, b: composed(x, mean, var, w, b, OPEN, size, mask), argnums=(0, 1, 2)
    )(x, weight, bias)
    torch.testing.assert_close(got, want, **close)


def test_running_statistics_are_constants_both_ways():
    """Nothing flows from the old ones to y, nor from x to the new ones; in forward mode too."""
    x, weight, bias, *_ = problem()
    mean, var = state(2, torch.float64)

    def y(mean, var):
        return batch_norm_pure(x, mean, var, weight, bias, True, renorm=OPEN).output

    tangents = torch.randn(2, 2).double().unbind()
    assert not jvp(y, (mean, var), tangents)[1].any()
    assert not vjp(y, mean, var)[1](torch.randn_like(x))[0].any()

    for options in ({}, {"virtual_batch_size": 3}, {"renorm": OPEN}):
        step = functools.partial(batch_norm_pure, training=True, **options)
        new, moved = jvp(lambda x, step=step: step(x, mean, var)[1:], (x,), (x,))
        assert not torch.equal(new[0], mean)
        assert not any(m.any() for m in moved)


def test_vmap_of_the_pure_form_is_a_loop():
    """Batched running statistics, each batch's own correction."""
    x = torch.randn(4, 7, 2, 3).double() * 2 + 1
    mean, var = torch.randn(4, 2).double(), torch.rand(4, 2).double() + 0.5
    for size in (None, 3):
        step = functools.partial(
            batch_norm_pure, training=True, virtual_batch_size=size, renorm=Renorm(2.0, 1.0)
        )
        loop = [step(*one) for one in zip(x, mean, var, strict=True)]
        got = vmap(step)(x, mean, var)
        for field, stacked in zip(zip(*loop, strict=True), got, strict=True):
            torch.testing.assert_close(stacked, torch.stack(field), **close)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
def test_without_some_of_the_parameters(affine, activation, size):
    """And each gradient asked for alone."""
    x, dy, residual = torch.randn(3, 7, 2, 3).double()
    mean, var = state(2, torch.float64)
    weight = torch.randn(2).double() if affine in ("both", "weight") else None
    bias = torch.randn(2).double() if affine in ("both", "bias") else None
    want = oracle.step(
        *(dy, x, weight, bias),
        residual=residual,
        activation=activation,
        size=size,
        renorm=(mean, var, 1.1, 0.05),
    )
    names = ("dx", "d_weight", "d_bias", "d_residual")
    for asked in (*itertools.combinations(range(4), 1), (1, 2), (0, 3), (0, 1, 2, 3)):
        leaves = [
            None if t is None else t.clone().requires_grad_(k in asked)
            for k, t in enumerate((x, weight, bias, residual))
        ]
        wanted = {
            name: t
            for name, t in zip(names, leaves, strict=True)
            if t is not None and t.requires_grad
        }
        y = batch_norm(
            *(leaves[0], mean.clone(), var.clone(), *leaves[1:3], True),
            residual=leaves[3],
            activation=activation,
            virtual_batch_size=size,
            renorm=TIGHT,
        )
        assert_step({"y": y}, want, x, renorm=True)
        for again in (False, True):
            if wanted:
                grads = torch.autograd.grad(
                    y, list(wanted.values()), dy, retain_graph=True, create_graph=again
                )
                assert_step(dict(zip(wanted, grads, strict=True)), want, x, renorm=True)
