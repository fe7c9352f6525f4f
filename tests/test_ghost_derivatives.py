"""Ghost batches: derivatives of first and second order, by autograd and by torch.func."""

import itertools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import oracle
from batchnorm import batch_norm, batch_norm_pure
from within import assert_step

pytestmark = pytest.mark.usefixtures("kernels")

close = {"rtol": 1e-11, "atol": 1e-11}  # float64, and sums of some hundred terms

GRID = [  # of 5 samples, in groups of 2 the last is alone; in one of 5 there is one group
    *itertools.product([2, 3], [None, "bool", "weights"], [None, "relu"], [1]),
    *((3, None, "relu", 0), (2, "bool", None, 0), (5, "weights", "relu", 1)),
]


def function(size, mask_kind, activation, channel_dim):
    counts = torch.rand(5, 3) > 0.3
    counts[:, :2] = True
    masks = {None: None, "bool": counts, "weights": counts * (torch.rand(5, 3) + 1)}
    shape = (5, 2, 3) if channel_dim else (2, 5, 3)

    def call(x, weight, bias, residual):
        return batch_norm(
            *(x, None, None, weight, bias, True),
            mask=masks[mask_kind],
            residual=residual,
            activation=activation,
            virtual_batch_size=size,
            channel_dim=channel_dim,
        )

    shapes = shape, (2,), (2,), shape
    return call, tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


@pytest.mark.parametrize(("size", "mask_kind", "activation", "channel_dim"), GRID)
def test_first_and_second_order(size, mask_kind, activation, channel_dim):
    call, leaves = function(size, mask_kind, activation, channel_dim)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        *(call, leaves), gen_non_contig_grad_outputs=True, check_fwd_over_rev=True, fast_mode=True
    )


def by_loop(x, weight, bias, mask, size):
    """Differentiable, in torch's own operations, group by group."""
    outputs = []
    for part, counts in zip(x.split(size), mask.split(size), strict=True):
        picked = part.movedim(1, -1)[counts]
        var, mean = torch.var_mean(picked, 0, correction=0)
        shape = (-1,) + (1,) * (x.dim() - 2)
        scale = weight / (var + 1e-5).sqrt()
        outputs.append((part - mean.view(shape)) * scale.view(shape) + bias.view(shape))
    return torch.cat(outputs)


def ghost(x, weight, bias, mask, size=3):
    zeros, ones = torch.zeros(2).double(), torch.ones(2).double()
    return batch_norm_pure(
        *(x, zeros, ones, weight, bias, True), mask=mask, virtual_batch_size=size
    )


def inputs():
    x, weight, bias = (torch.randn(s).double() for s in ((5, 2, 3), (2,), (2,)))
    mask = torch.rand(5, 3) > 0.3
    mask[:, :2] = True
    return x, weight, bias, mask


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians(transform):
    *point, mask = inputs()
    got = transform(lambda x, w, b: ghost(x, w, b, mask).output, argnums=(0, 1, 2))(*point)
    want = transform(lambda x, w, b: by_loop(x, w, b, mask, 3), argnums=(0, 1, 2))(*point)
    torch.testing.assert_close(got, want, **close)


def test_directional_derivatives():
    *point, mask = inputs()
    *directions, _ = inputs()
    got = jvp(lambda x, w, b: ghost(x, w, b, mask).output, (*point,), (*directions,))
    want = jvp(lambda x, w, b: by_loop(x, w, b, mask, 3), (*point,), (*directions,))
    torch.testing.assert_close(got, want, **close)


def test_vmap_over_batches_is_a_loop_over_batches():
    x, mask = torch.randn(4, 5, 2, 3).double(), torch.rand(4, 5, 3) > 0.3
    mask[:, :, :2] = True
    weight, bias = torch.randn(2, 4, 2).double()
    for counts, in_dims in ((mask, 0), (None, None)):
        got = vmap(ghost, in_dims=(0, 0, 0, in_dims))(x, weight, bias, counts)
        loop = [
            ghost(*one, None if counts is None else mask[k])
            for k, one in enumerate(zip(x, weight, bias, strict=True))
        ]
        for field, stacked in zip(zip(*loop, strict=True), got, strict=True):
            torch.testing.assert_close(stacked, torch.stack(field), **close)

    def loss(weight, x, mask):
        return ghost(x, weight, bias[0], mask).output.square().cumsum(0).sum()

    got = vmap(grad(loss, argnums=(0, 1)))(weight, x, mask)
    for k in range(4):
        leaves = weight[k].clone().requires_grad_(), x[k].clone().requires_grad_()
        y = by_loop(leaves[1], leaves[0], bias[0], mask[k], 3)
        want = torch.autograd.grad(y.square().cumsum(0).sum(), leaves)
        torch.testing.assert_close(tuple(g[k] for g in got), want, **close)


def test_hessian():
    x, weight, bias, mask = inputs()
    cotangent = torch.randn(5, 2, 3).double()
    got = hessian(lambda x: (ghost(x, weight, bias, mask).output * cotangent).sum())(x)
    want = hessian(lambda x: (by_loop(x, weight, bias, mask, 3) * cotangent).sum())(x)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("asked", [1, 2, 4, 6, 7, 8, 10, 15])  # a bit for each input
def test_gradients_of_any_of_the_inputs(affine, activation, asked):
    """To second order: a gradient that is asked for alone is the same."""
    x, residual, dy, ddx = torch.randn(4, 7, 2, 3).double()
    weight = torch.randn(2).double() if affine in ("both", "weight") else None
    bias = torch.randn(2).double() if affine in ("both", "bias") else None
    tensors = [x, weight, bias, residual]
    leaves = [
        None if t is None else t.clone().requires_grad_(bool(asked >> k & 1))
        for k, t in enumerate(tensors)
    ]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not wanted:
        pytest.skip("nothing is asked for")
    y = batch_norm(
        *(leaves[0], None, None, *leaves[1:3], True),
        residual=leaves[3],
        activation=activation,
        virtual_batch_size=3,
    )
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    again = torch.autograd.grad(y, wanted, dy, create_graph=True)
    torch.testing.assert_close(first, again, **close)
    want = oracle.step(*(dy, x, weight, bias), residual=residual, activation=activation, size=3)
    names = ("dx", "d_weight", "d_bias", "d_residual")
    names = [n for n, t in zip(names, leaves, strict=True) if t is not None and t.requires_grad]
    assert_step(dict(zip(names, first, strict=True)), want, x)
    if names[0] == "dx" and activation is None:
        got = torch.autograd.grad(again[0], leaves[0], ddx)[0]
        leaf = x.clone().requires_grad_()
        gamma = torch.ones(2).double() if weight is None else weight
        z = by_loop(leaf, gamma, torch.zeros(2).double(), torch.ones(7, 3) > 0, 3)
        (dx,) = torch.autograd.grad(z, leaf, dy, create_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(dx, leaf, ddx)[0], **close)


def test_gradients_in_batches():
    """is_grads_batched has a vmap of its own, which the kernels must leave to others."""
    x = torch.randn(7, 2, 3).double().requires_grad_()
    dy = torch.randn(4, 7, 2, 3).double()
    y = batch_norm(x, None, None, training=True, virtual_batch_size=3)
    (got,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in dy])
    torch.testing.assert_close(got, want, **close)
