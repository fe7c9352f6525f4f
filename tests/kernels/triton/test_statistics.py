"""Running statistics, their counter, and what must not get into them."""

import pytest
import torch

import oracle
from batchnorm import BatchNorm
from batchnorm.kernels import triton
from triton_steps import DEVICE, EPS, PATHS, counts, normal

each_path = pytest.mark.parametrize("cut", PATHS, indirect=True)

NAN, INF = torch.nan, torch.inf


def layer(channels, **options):
    return BatchNorm(channels, device=DEVICE, **options)


def state(bn):
    return [b.clone() for b in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@each_path
@pytest.mark.parametrize("momentum", [0.1, None, 0, 1])
@pytest.mark.parametrize("steps", [0, 1, 10])
def test_evaluation_after_some_steps(cut, momentum, steps):
    bn = layer(5, momentum=momentum)
    mean, var = oracle.wide(bn.running_mean), oracle.wide(bn.running_var)
    for step in range(steps):
        x = normal(6, 5) * 2 + 3
        bn(x)
        share = 1 / (step + 1) if momentum is None else momentum
        mean, var = oracle.running(mean, var, oracle.forward(x), share)
    assert bn.num_batches_tracked == steps
    # Every step rounds once, and the sums of a batch a few times.
    bound = (steps + 8) * 2.0**-24 * 20
    assert abs(oracle.wide(bn.running_mean) - mean).max() <= bound
    assert abs(oracle.wide(bn.running_var) - var).max() <= bound
    before = state(bn)
    bn.eval()
    x = normal(6, 5).requires_grad_()
    want = oracle.forward(x, given=(bn.running_mean, bn.running_var)).y
    for y in (bn(x), bn(x.detach())):
        assert abs(oracle.wide(y) - want).max() <= 1e-6 * (1 + abs(want).max())
    assert same(state(bn), before)


@each_path
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("bad", [[0], range(8), range(4, 20), range(19), range(20)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_is_not_finite_is_not_taken_in(cut, value, bad, momentum):
    """Channel by channel, unless in a plain average, which has one count for all of them."""
    x, bn, alone = normal(5, 20), layer(20, momentum=momentum), layer(20, momentum=momentum)
    alone(x)
    alone(x)
    bn(x)
    x[3, list(bad)] = value
    before = state(bn)
    bn(x)
    taken = len(bad) < 20 and momentum is not None
    assert bn.num_batches_tracked == 1 + taken
    good = [c for c in range(20) if c not in bad] if taken else []
    for new, old, want in zip(state(bn)[:2], before, state(alone), strict=False):
        old[good] = want[good]
        assert torch.equal(new, old)


@each_path
def test_what_the_buffers_cannot_hold_is_not_taken_in(cut):
    bn = layer(3, momentum=1.0).half()
    x = normal(6, 3) * torch.tensor([1.0, 1e3, 1e6], device=DEVICE)
    with torch.no_grad():
        bn.double()
        bn.running_mean, bn.running_var = bn.running_mean.half(), bn.running_var.half()
        bn(x)
    assert bn.running_var[1:].tolist() == [1.0, 1.0]
    assert bn.running_mean[1:].tolist() == [0.0, 0.0]
    assert bn.running_var[0] == x.double().var(0)[0].half()
    assert bn.num_batches_tracked == 1


@each_path
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_too_few_elements_for_a_variance(cut, counted, momentum):
    """Their number is not known here; where it is, the layer refuses it."""
    bn = layer(5, momentum=momentum)
    mask = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    mask[1, 4 : 4 + counted] = True
    before = state(bn)
    y = bn(normal(2, 5, 6), mask)
    assert y.isfinite().all()
    assert same(state(bn), before)


@each_path
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_what_a_mask_leaves_out_may_be_anything(cut, shape, with_residual):
    mask = counts(shape)
    out = ~mask.unsqueeze(1).expand(shape)
    # σ is 0.1: what is left out may be finite, and infinite once it is normalised.
    x, dy = 0.1 * normal(*shape), normal(*shape).masked_fill(out, 0.0)
    residual = normal(*shape).requires_grad_() if with_residual else None
    results = []
    for junk, of_loss in ((0.0, 0.0), (NAN, 0.0), (INF, 0.0), (1e38, 0.0), (NAN, NAN), (0.0, INF)):
        leaf = x.masked_fill(out, junk).requires_grad_()
        bn = layer(shape[1], activation="leaky_relu")
        y = bn(leaf, mask, residual)
        leaves = [leaf, bn.weight, bn.bias, *([residual] if with_residual else [])]
        grads = torch.autograd.grad(y, leaves, dy.masked_fill(out, of_loss))
        grads = [g[~out] if g.dim() > 1 else g for g in grads]
        results.append([y.detach()[~out], *grads, bn.running_mean, bn.running_var])
    for other in results[1:]:
        assert same(results[0], other)


@each_path
@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 7)], ids=str)
def test_what_is_not_finite_stays_in_its_channel(cut, value, activation, shape):
    x, dy, residual = (normal(*shape) for _ in range(3))
    x[1, 2, ...] = value
    others = [0, 1, 3, 4]
    results = []
    for channels in (range(5), others):
        leaves = [t[:, list(channels)].clone().requires_grad_() for t in (x, residual)]
        y = layer(len(channels), activation=activation)(leaves[0], residual=leaves[1])
        results.append([y, *torch.autograd.grad(y, leaves, dy[:, list(channels)])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got[:, others], want, rtol=1e-5, atol=1e-6)
    # As torch's own layers: NaN is passed on, through a relu too.
    assert results[0][0][:, 2].isnan().all()


@each_path
@pytest.mark.parametrize("value", [NAN, 1e4, 1e30])  # summed again: from a better pivot, or smaller
@pytest.mark.parametrize("masked", [False, True])
def test_what_one_channel_holds_leaves_the_others_their_bits(cut, value, masked):
    x = normal(7, 5, 3)
    mask = counts(x.shape).unsqueeze(1) if masked else None
    odd = x.clone()
    odd[0, 2], others = value, [0, 1, 3, 4]
    if masked:
        mask[0] = True
    for call in (
        lambda x: triton.moments(x, mask, 1, 0)[0][:, others],
        lambda x: layer(5)(x, None if mask is None else mask[:, 0])[:, others],
    ):
        assert torch.equal(call(odd), call(x))


@each_path
@pytest.mark.parametrize("training", [True, False])
def test_the_slope_at_zero_is_the_left_one(cut, training):
    x = torch.full((8, 3), 2.0 if training else 0.0, device=DEVICE).requires_grad_()
    skip, dy = torch.zeros(8, 3, device=DEVICE).requires_grad_(), normal(8, 3)
    for activation, slope in (("relu", 0.0), ("leaky_relu", 0.01)):
        for residual in (None, skip):
            bn = layer(3, activation=activation, eps=EPS).train(training)
            y = bn(x, residual=residual)
            assert torch.equal(y, torch.zeros_like(y))
            d_bias = torch.autograd.grad(y, bn.bias, dy, retain_graph=True)[0]
            torch.testing.assert_close(d_bias, slope * dy.sum(0))
            if residual is not None:
                d_skip = torch.autograd.grad(y, skip, dy)[0]
                torch.testing.assert_close(d_skip, slope * dy)
