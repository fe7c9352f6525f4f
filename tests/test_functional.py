"""The running update: momentum, precision, what is refused; and the pure form."""

import warnings

import pytest
import torch

import oracle
from batchnorm import InputError, batch_norm, batch_norm_pure
from batchnorm.moments import Moments
from batchnorm.running import updated
from interpreted import warns_of_non_finite

pytestmark = pytest.mark.usefixtures("kernels")


def fresh(dtype=torch.float32):
    return torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)


@pytest.mark.parametrize(
    "momentum", [0.0, 0.1, 0.75, 1.0, torch.tensor(0.3), torch.tensor(0.3).double()]
)
def test_momentum_weighs_the_newest_batch(momentum):
    x = torch.randn(8, 3, dtype=torch.float64)
    mean, var = fresh(torch.float64)
    batch_norm(x, mean, var, training=True, momentum=momentum)
    want = oracle.running(*fresh(torch.float64), oracle.forward(x), float(momentum))
    for got, value in zip((mean, var), want, strict=True):
        torch.testing.assert_close(
            got, torch.from_numpy(value.astype(float)), rtol=1e-14, atol=1e-14
        )


def test_evaluation_changes_nothing():
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    batch_norm(torch.randn(8, 3), mean, var)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_empty_batch_changes_nothing():
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    weight = torch.ones(3, requires_grad=True)
    x = torch.randn(0, 3, 4, requires_grad=True)
    y = batch_norm(x, mean, var, weight, training=True)
    assert y.shape == x.shape
    grads = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
    assert grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros(3))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_statistics_stay_out_of_the_buffers(poison, dtype):
    x = torch.randn(8, 3, dtype=dtype)
    mean, var = fresh(dtype)
    batch_norm(x, mean, var, training=True)
    clean = mean.clone(), var.clone()
    x[3, 1] = poison
    mean, var = fresh(dtype)
    told = r"1 of 3 channels \(1\).*left as they were.*loss scale, the data$"
    with warns_of_non_finite(dtype, match=told):
        y = batch_norm(x, mean, var, training=True)
    assert y[:, 1].isnan().all()
    for got, good, initial in zip((mean, var), clean, fresh(dtype), strict=True):
        assert got[1] == initial[1]
        # Which kernel serves depends on the whole batch, so the others agree to rounding only.
        torch.testing.assert_close(got[[0, 2]], good[[0, 2]])


def test_a_variance_beyond_the_buffers_dtype_counts_as_infinite():
    x = torch.randn(8, 3)
    x[:, 2] *= 1e25  # finite, and so is y; the variance 1e50 is not in float32
    mean, var = fresh()
    with warns_of_non_finite(x.dtype, match=r"channels \(2\)"):
        y = batch_norm(x, mean, var, training=True)
    assert (abs(oracle.wide(y) - oracle.forward(x).y) <= 1e-6).all()
    assert (mean[2], var[2]) == (0, 1)


def test_many_bad_channels_are_summed_up():
    x, mean, var = torch.full((4, 20), torch.nan), torch.zeros(20), torch.ones(20)
    with warns_of_non_finite(x.dtype, match=r"20 of 20 channels \(0, 1, 2, 3, 4, 5, 6, 7, …\)"):
        batch_norm(x, mean, var, training=True)


def test_no_moments_no_update():
    """A count of 0 or 1 has no unbiased variance: compiled code, which cannot raise, skips it."""
    for mask in (torch.tensor([False] * 4), torch.tensor([True] + [False] * 3)):
        m = Moments.of(torch.randn(4, 3), mask)
        update = updated(*fresh(), m, 0.1)
        assert update.refused.all()
        assert torch.equal(update.mean, torch.zeros(3))
        assert torch.equal(update.var, torch.ones(3))


@pytest.mark.parametrize("training", [True, False])
def test_pure_form_equals_the_other_and_changes_nothing(training):
    x, residual = torch.randn(2, 6, 3)
    mask = torch.rand(6) > 0.3
    weight, bias = torch.randn(2, 3)
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    options = {"mask": mask, "residual": residual, "activation": "relu"}
    pure = batch_norm_pure(x, mean, var, weight, bias, training, 0.3, **options)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    y = batch_norm(x, mean, var, weight, bias, training, 0.3, **options)
    assert torch.equal(pure.output, y)
    assert torch.equal(pure.running_mean, mean)
    assert torch.equal(pure.running_var, var)
    assert training != torch.equal(mean, before[0])


def test_pure_form_without_statistics():
    x = torch.randn(6, 3)
    pure = batch_norm_pure(x, None, None, training=True)
    assert pure.running_mean is None
    assert pure.running_var is None
    assert torch.equal(pure.output, batch_norm(x, None, None, training=True))


def test_pure_form_keeps_bad_channels_silently():
    x = torch.randn(6, 3)
    x[0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, mean, var = batch_norm_pure(x, *fresh(), training=True)
    assert (mean[0], var[0]) == (0, 1)
    assert mean.isfinite().all()
    assert mean[1] != 0


def test_running_statistics_leave_no_graph_behind():
    mean, var = fresh()
    x = torch.randn(6, 3, requires_grad=True)
    batch_norm(x, mean, var, torch.ones(3, requires_grad=True), training=True)
    assert mean.grad_fn is None
    assert not var.requires_grad


def test_nor_does_a_momentum_that_needs_a_gradient():
    mean, var = fresh()
    momentum = torch.tensor(0.5, requires_grad=True)
    batch_norm(torch.randn(6, 3), mean, var, training=True, momentum=momentum)
    assert not mean.requires_grad
    assert not var.requires_grad


def test_captured_buffers_under_a_transform():
    mean, var = fresh()
    with pytest.raises(InputError, match=r"transform \(vmap, grad, jvp.*batch_norm_pure"):
        torch.func.vmap(lambda t: batch_norm(t, mean, var, training=True))(torch.randn(2, 6, 3))
    assert torch.equal(mean, torch.zeros(3))


@pytest.mark.parametrize(
    "activation", [torch.tanh, torch.nn.PReLU(3, 0.3), torch.nn.functional.gelu]
)
def test_any_other_activation_is_applied_after(activation):
    x, residual = torch.randn(2, 8, 3, 4)
    z = batch_norm(x, None, None, training=True, residual=residual)
    y = batch_norm(x, None, None, training=True, residual=residual, activation=activation)
    assert torch.equal(y, activation(z))
