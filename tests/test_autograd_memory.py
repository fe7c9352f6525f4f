"""A layer's output made again from its input, to the bit; its input from its output, nearly."""

import contextlib

import numpy as np
import pytest
import torch

import oracle
from batchnorm import BatchNorm, NonFiniteWarning, freeze, save_memory
from batchnorm.autograd_memory import LEAST_GAMMA, LIMIT, call_of, input_again, output_again

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((64, 12), (4, 12, 9, 7), (3, 12, 40), (2, 12, 1, 1), (2000, 12))


def layer(dtype, **options):
    """Channels with every relation of γ, β and mean; see `hard`."""
    bn = BatchNorm(12, dtype=torch.float64 if dtype is torch.float64 else torch.float32, **options)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(12) + 0.5)
        bn.weight[1] *= -1
        bn.bias.copy_(torch.randn(12))
        bn.weight[2:5] = torch.tensor([0.0, 1e-35, -1e-4])
        bn.bias[5], bn.bias[6] = 0.0, 100.0
        bn.weight[7], bn.bias[7] = 1e-3, 1e-3
    return bn


def data(shape, dtype):
    x = torch.randn(shape, dtype=torch.float64)
    x[:, 8] += 3  # |mean|/σ within the limit, and beyond
    x[:, 9] += 100
    return x.to(dtype)


def hard(dtype, activation):
    """The channels that keep x: γ zero, below any use, β/γ beyond the limit; the far mean."""
    channels = {2, 3, 4, 6, 9}
    # 1e-3 · 0.01 comes near the least that float16 has in full.
    return channels | {7} if dtype is torch.float16 and activation else channels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_output(dtype, shape, activation, channel_dim):
    x = data(shape, dtype).movedim(1, channel_dim).requires_grad_()
    bn = layer(dtype, activation=activation, channel_dim=channel_dim)
    for train in (True, False):
        y = bn.train(train)(x)
        call = call_of(y, x, bn.bias)
        made = output_again(call)(x.detach())
        assert not made.requires_grad
        assert made.stride() == y.stride()
        bits = torch.int64 if dtype is torch.float64 else torch.int16
        assert torch.equal(made.contiguous().view(bits), y.detach().contiguous().view(bits))
        # What an optimizer does meanwhile makes no difference.
        bn.weight.data.add_(0.25)
        bn.bias.data.add_(0.25)
        assert torch.equal(output_again(call)(x.detach()), made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_input(dtype, shape, activation):
    if shape[0] == 2:
        pytest.skip("two values have no spread to keep their mean within")
    x, bn = data(shape, dtype), layer(dtype, activation=activation)
    y = bn(leaf := x.clone().requires_grad_())
    make, besides = input_again(call_of(y, leaf, bn.bias), x, y.detach())
    made = make(y.detach())
    assert made.dtype is dtype
    assert made.shape == x.shape
    kept = [c for c in range(12) if torch.equal(made[:, c], x[:, c])]
    wanted = hard(dtype, activation)
    assert wanted <= set(kept)
    assert besides == len(wanted) * (x[:, 0].nbytes + 8)
    f = oracle.forward(x, bn.weight, bn.bias)
    gamma, beta = oracle.wide(bn.weight), oracle.wide(bn.bias)
    scale = np.sqrt(f.var + oracle.Wide(bn.eps))
    u = torch.finfo(dtype).eps / 2
    for c in sorted(set(range(12)) - wanted):
        error = np.abs(oracle.wide(made[:, c]).reshape(-1) - oracle.wide(x[:, c]).reshape(-1))
        # y is rounded once, after the kernel's few roundings in float32 (of float64, in float64);
        # the slope is divided out by one more, and what is left of all is rounded as x.
        rounded = 2 * np.abs(f.x_hat[c]) + np.abs(beta[c] / gamma[c]) + np.abs(f.mean[c]) / scale[c]
        few = 8 if dtype.itemsize > 2 else 3
        assert (error / scale[c] <= few * u * rounded).all()
        assert rounded.max() <= 2 * np.abs(f.x_hat[c]).max() + LIMIT


def test_the_limits():
    """Which channels keep x, each by one of the conditions."""
    x = torch.randn(100, 6, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x[:, 4] = x[:, 4] + 8.1
    bn = BatchNorm(6, eps=1e-12, dtype=torch.float64)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -1.0, 2 * LEAST_GAMMA, LEAST_GAMMA / 2, 1.0, 1e307]))
        bn.bias.copy_(torch.tensor([7.9, 8.1, 0.0, 0.0, 0.0, 1.0]))
    x[:, 5] *= 3
    y = bn(x.requires_grad_())
    found = input_again(call_of(y, x, bn.bias), x.detach(), y.detach())
    make, besides = found
    # γ·√100 is beyond float64 in the last one.
    kept = {1, 3, 4, 5}
    assert besides == len(kept) * (800 + 8)
    made = make(torch.zeros_like(y))
    assert {c for c in range(6) if torch.equal(made[:, c], x[:, c])} == kept


def test_a_scale_beyond_the_dtype():
    x = torch.randn(50, 2) * 1e12
    bn = BatchNorm(2)
    bn.weight.data[1] = 1e-29
    y = bn(leaf := x.clone().requires_grad_())
    make, besides = input_again(call_of(y, leaf, bn.bias), x, y.detach())
    assert besides == 50 * 4 + 8
    assert torch.equal(make(y.detach())[:, 1], x[:, 1])


def test_a_call_of_something_else():
    bn, x = BatchNorm(3), torch.randn(8, 3, requires_grad=True)
    y = bn(x)
    assert call_of(y, x, bn.bias) is not None
    for other in (x.clone(), x[:4], x[1:], x.view(4, 6), x.as_strided((8, 3), (1, 8))):
        assert call_of(y, other, bn.bias) is None
    assert call_of(y * 1, x, bn.bias) is None


def test_no_input_can_be_made_and_why():
    relu, constant, masked, zero = (
        BatchNorm(3, activation="relu"), BatchNorm(3).eval(), BatchNorm(3), BatchNorm(3)
    )  # fmt: skip
    zero.weight.data.zero_()
    frozen, far, nan = BatchNorm(3), torch.randn(8, 3) + 1e3, torch.randn(8, 3)
    freeze(frozen)
    nan[0] = float("nan")
    for bn, values, mask, reason in (
        (relu, None, None, "ReLU has no inverse"),
        (constant, None, None, "evaluation, frozen"),
        (frozen, None, None, "evaluation, frozen"),
        (masked, None, torch.ones(8), "a mask"),
        (zero, None, None, "in no channel"),
        (BatchNorm(3), far, None, "in no channel"),
        (BatchNorm(3), nan, None, "in no channel"),
    ):
        x = (torch.randn(8, 3) if values is None else values).requires_grad_()
        with pytest.warns(NonFiniteWarning) if values is nan else contextlib.nullcontext():
            y = bn(x, mask)
        assert reason in input_again(call_of(y, x, bn.bias), x.detach(), y.detach())
    groups, x = BatchNorm(3, virtual_batch_size=4), torch.randn(8, 3, requires_grad=True)
    y = groups(x)
    call = call_of(y, x, groups.bias)
    assert call is None or "ghost batches" in input_again(call, x.detach(), y.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_gradients_beside_the_oracle(dtype, activation):
    shape = (16, 12, 8, 8)
    x, dy = data(shape, dtype), torch.randn(shape).to(dtype)
    bn = layer(dtype, activation=activation)
    leaf = x.clone().requires_grad_()
    after = torch.nn.Conv2d(12, 12, 1, bias=False, dtype=dtype)
    with save_memory(torch.nn.Sequential(bn), "output") as saved:
        y = bn(leaf)
        z = after(y)
    assert saved.layers["0"] > x.nbytes // 3
    y.retain_grad()
    z.backward(dy)
    f = oracle.forward(x, bn.weight, bn.bias, activation=activation)
    dx, dw, db, _ = oracle.backward(y.grad, x, bn.weight, bn.bias, activation=activation)
    u = torch.finfo(dtype).eps / 2
    # x̂ errs by few roundings of 2·|x̂| + LIMIT (see above): |x̂| < 5 here. The two sums take in n of
    # those times dz, and so does dx, in the unit of γ/σ; beside what the kernels lose themselves.
    error = 8 * u * (2 * 5 + LIMIT)
    n = x.numel() // 12
    dz = np.abs(oracle.rows(oracle.wide(y.grad), 1) * f.slope)
    share = dz.mean(1)
    scale = np.abs(oracle.wide(bn.weight)) / np.sqrt(f.var + oracle.Wide(bn.eps))
    bound = 2 * error * share * n
    assert (np.abs(oracle.wide(bn.weight.grad) - dw) <= bound + u * np.abs(dw)).all()
    assert (np.abs(oracle.wide(bn.bias.grad) - db) <= 64 * u * share * n).all()
    got, want = oracle.rows(oracle.wide(leaf.grad), 1), oracle.rows(dx, 1)
    # dz − (dβ + x̂·dγ)/n: dγ is wrong by the bound and met by |x̂|, x̂ by the error and met by dγ/n.
    slack = (5 * bound / n + error * np.abs(dw) / n + 8 * u * dz.max(1)) * scale
    least = torch.finfo(dtype).tiny * 2 * u
    assert (np.abs(got - want) <= slack[:, None] + least).all()


def test_the_side_of_the_activation_is_that_of_the_output():
    """Near z = 0 an input made again may lie on the other side: y, which is kept, tells."""
    torch.manual_seed(3)
    x = torch.randn(4000, 4).bfloat16()
    bn, dy = BatchNorm(4, activation="leaky_relu"), torch.ones(4000, 4).bfloat16()
    leaf = x.clone().requires_grad_()
    with save_memory(torch.nn.Sequential(bn), "output") as saved:
        y = bn(leaf)
    assert saved.bytes == x.nbytes  # by the layer itself y is kept
    (dx,) = torch.autograd.grad(y, leaf, dy)
    (expected,) = torch.autograd.grad(bn(leaf), leaf, dy)
    # On the wrong side, dz would be 0.01 in place of 1, or the reverse.
    torch.testing.assert_close(dx, expected, rtol=0.02, atol=0.02)
