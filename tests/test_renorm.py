"""Batch Renormalization: the paper's formula and limits; running statistics as without."""

import copy

import pytest
import torch
from torch import nn

import oracle
from batchnorm import BatchNorm, Renorm, batch_norm, pause_statistics
from batchnorm.kernels import native
from renorm_limits import AT_ONCE, OPEN, TIGHT, close, state
from within import assert_running, assert_step

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 3), (6, 3, 5), (4, 3, 2, 5), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("renorm", [OPEN, TIGHT, Renorm(1.1, 100.0), Renorm(100.0, 0.05)])
def test_a_step_is_the_papers(renorm, shape, dtype):
    parameters = torch.promote_types(dtype, torch.float32)
    x, dy = (torch.randn(2, *shape) * 3 + 1).to(dtype)
    mean, var = state(dtype=parameters)
    old = mean.clone(), var.clone()
    leaves = [x.clone(), torch.randn(3, dtype=parameters), torch.randn(3, dtype=parameters)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = batch_norm(leaves[0], mean, var, *leaves[1:], True, 0.3, renorm=renorm)
    grads = torch.autograd.grad(y, leaves, dy)
    want = oracle.step(dy, x, *leaves[1:], renorm=(*old, renorm.r_max, renorm.d_max))
    got = dict(zip(("dx", "d_weight", "d_bias"), grads, strict=True))
    assert_step({"y": y, **got}, want, x, renorm=True)
    # The batch's own statistics are taken in, not the corrected ones.
    assert_running((mean, var), old, want, 0.3)


def test_each_side_of_each_limit():
    """Channels with σ and mean far below, within, and far above: r and d by hand."""
    x_hat = torch.tensor([-1.0, 1.0]).double().reshape(2, 1)
    sigmas, means = torch.tensor([0.01, 0.8, 1.5, 100.0]), torch.tensor([-9.0, -0.3, 0.4, 9.0])
    x = x_hat * sigmas + means
    renorm = Renorm(2.0, 0.5)
    y = batch_norm(x, torch.zeros(4), torch.ones(4), training=True, eps=1e-12, renorm=renorm)
    r, d = torch.tensor([0.5, 0.8, 1.5, 2.0]), torch.tensor([-0.5, -0.3, 0.4, 0.5])
    # σ and means are float32 numbers; eps is 1e-12 of the running variance, 1e-8 of the least.
    torch.testing.assert_close(y, x_hat * r.double() + d.double(), rtol=0, atol=1e-7)


def test_without_limits_it_is_evaluation():
    """r and d then undo the batch's statistics: the training output is evaluation's, before."""
    x = torch.randn(8, 3, 4).double() * 5 + 2
    bn = BatchNorm(3, renorm=Renorm(1e9, 1e9, **AT_ONCE)).double()
    bn.running_mean.copy_(torch.randn(3))
    bn.running_var.uniform_(0.5, 2.0)
    before = copy.deepcopy(bn).eval()
    torch.testing.assert_close(bn(x), before(x), **close)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_limits_are_plain_batch_normalization(size, dtype):
    x, residual, dy = torch.randn(3, 8, 3, 5).to(dtype)
    gamma = torch.rand(3) + 0.5
    results = []
    # The last one's schedule has not begun.
    for renorm in (None, Renorm(1, 0, **AT_ONCE), Renorm(3.0, 5.0)):
        bn = BatchNorm(3, activation="relu", virtual_batch_size=size, renorm=renorm)
        bn = bn.to(torch.promote_types(dtype, torch.float32))
        bn.weight.data.copy_(gamma)
        results.append([])
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            y = bn(leaf, residual=residual)
            grads = torch.autograd.grad(y, (leaf, bn.weight, bn.bias), dy)
            results[-1] += [y.detach(), *grads, bn.running_mean.clone(), bn.running_var.clone()]
    for other in results[1:]:
        for k, (a, b) in enumerate(zip(results[0], other, strict=True)):
            if k % 6 == 0 and (native.MISSING is None or dtype is not torch.float32):
                # γ·1 and β + γ·0 in float64 are γ and β, and the kernels are the same.
                assert torch.equal(a, b)
            else:
                # A few roundings of sums of 40 terms of size 4, or one where it is stored.
                u = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps / 2
                torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=64 * u)


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_as_without_and_evaluation_is(steps, momentum):
    """They do not depend on the correction; but each step's correction depends on them."""
    renorm = Renorm(1.5, 0.5, **AT_ONCE)
    bn, plain = BatchNorm(3, momentum=momentum, renorm=renorm), BatchNorm(3, momentum=momentum)
    mean, var = oracle.wide(torch.zeros(3)), oracle.wide(torch.ones(3))
    for step in range(steps):
        x = torch.randn(6, 3, 5) * 2 + 1
        want = oracle.step(torch.zeros(x.shape), x, renorm=(mean, var, 1.5, 0.5))
        y = bn(x)
        plain(x)
        # The running statistics of the steps before, in float32: 1e-7 of r, d ≤ 1.5 and x̂ ≤ 4.
        assert (abs(oracle.wide(y) - want["y"].value) <= 32 * 2.0**-24 * want["y"].size).all()
        f = oracle.forward(x)
        mean, var = oracle.running(mean, var, f, 1 / (step + 1) if momentum is None else momentum)
    for got, expected in ((bn.running_mean, mean), (bn.running_var, var)):
        assert (abs(oracle.wide(got) - expected) <= 2.0**-24 * (steps + 1) * 4).all()
    assert bn.num_batches_tracked == steps
    torch.testing.assert_close(bn.state_dict(), plain.state_dict(), rtol=2.0**-22, atol=2.0**-22)
    plain.load_state_dict(bn.state_dict())
    x, before = torch.randn(6, 3, 5), copy.deepcopy(bn.state_dict())
    assert torch.equal(bn.eval()(x), plain.eval()(x))
    torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)


def test_paused_statistics_correct_but_do_not_move():
    """Toward the running statistics as they stand, by the limits of the steps so far."""
    renorm = Renorm(2.0, 1.0, r_steps=(0, 2), d_steps=(0, 2))
    bn = BatchNorm(3, renorm=renorm).double()
    bn(torch.randn(8, 3).double() * 3 + 1)
    before = copy.deepcopy(bn.state_dict())
    x = torch.randn(8, 3).double() * 3 + 1
    with pause_statistics(bn):
        y = bn(x)
    torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)
    statistics = before["running_mean"].clone(), before["running_var"].clone()
    want = batch_norm(x, *statistics, training=True, renorm=Renorm(1.5, 0.5))
    torch.testing.assert_close(y, want, **close)


def test_state_dicts_are_torchs_both_ways():
    ours = BatchNorm(3, renorm=Renorm(**AT_ONCE))
    for _ in range(3):
        ours(torch.randn(8, 3) * 2 + 1)
    theirs = nn.BatchNorm1d(3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(8, 3)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))
    back = BatchNorm(3, renorm=Renorm(2.0, 1.0))
    back.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(back.eval()(x), ours(x))
    assert "renorm=Renorm(r_max=2.0, d_max=1.0" in repr(back)
