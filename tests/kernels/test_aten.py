"""torch's kernels: what they are given, and that their limits are where they fail."""

import pytest
import torch

import oracle
from batchnorm import batch_norm
from batchnorm.kernels import aten

pytestmark = pytest.mark.usefixtures("without_native")


def image():
    return torch.randn(4, 6, 5, 7)


@pytest.mark.parametrize(
    ("x", "served"),
    [
        (torch.randn(1024, 6), True),
        (torch.randn(1025, 6), False),
        (torch.randn(1025, 1, 3), False),
        (torch.randn(1025, 2, 1), False),
        (torch.randn(1025, 2, 2), True),
        (torch.randn(4, 6, 5, 7), True),
        (torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last), False),
        (torch.randn(4, 6, 10)[..., ::2], False),
        (torch.randn(4, 6).double(), False),
        (torch.randn(4, 6).bfloat16(), False),
        (torch.randn(0, 6), False),
        (torch.randn(4, 6, device="meta"), False),
    ],
)
def test_serves(x, served):
    assert aten.serves(x, None, channel_dim=1) is served


def test_serves_no_other_channel_axis_or_parameters():
    assert aten.serves(image(), channel_dim=-3)
    assert not aten.serves(image(), channel_dim=-1)
    assert not aten.serves(image(), torch.ones(6).double(), channel_dim=1)


@pytest.mark.parametrize(
    ("mean", "var", "accurate"),
    [
        ([0.0, 15.9], [1.0, 1.0], True),
        ([0.0, 16.1], [1.0, 1.0], False),
        ([0.0, -16.1], [1.0, 1.0], False),
        ([0.0, 0.1], [1.0, 0.0], False),
        ([0.0, 0.0], [1.0, 0.0], True),
        ([0.0, 1e-3], [1.0, 1e-9], False),
        ([0.0, torch.nan], [1.0, 1.0], False),
        ([0.0, torch.inf], [1.0, 1.0], False),
        ([0.0, 0.0], [torch.nan, 1.0], False),
        ([0.0, 0.0], [torch.inf, 1.0], False),
    ],
)
def test_accurate(mean, var, accurate):
    assert aten.accurate(torch.tensor(mean), torch.tensor(var)) is accurate


def test_the_limits_are_where_precision_ends():
    """Beyond each limit torch's error exceeds what the reference has: the limits are needed."""

    def error(x):
        y, *_ = aten.train(x, None, None, 1e-5)
        return float(abs(oracle.wide(y) - oracle.forward(x).y).max())

    u = 2.0**-24
    assert error(image() + 2) < 32 * u
    assert error(image() + 1e4) > 1000 * u
    assert error(torch.randn(16384, 6) + 2) > 64 * u


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("given", [False, True])
def test_values(activation, with_residual, affine, given):
    """Through the public function, which must have chosen these kernels."""
    x = image().requires_grad_()
    weight, bias = (torch.randn(6, requires_grad=True) if has else None for has in affine)
    residual = torch.randn(4, 6, 5, 7, requires_grad=True) if with_residual else None
    statistics = (torch.randn(6), torch.rand(6) + 0.5) if given else (None, None)
    y = batch_norm(
        x, *statistics, weight, bias, not given, residual=residual, activation=activation
    )
    dy = torch.randn_like(y)
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    assert y.grad_fn.backend == "aten"
    grads = torch.autograd.grad(y, leaves, dy)
    options = {
        "residual": residual,
        "activation": activation,
        "given": statistics if given else None,
    }
    f = oracle.forward(x, weight, bias, **options)
    back = oracle.backward(dy, x, weight, bias, **options)
    wanted = [f.y] + [
        g for g, t in zip(back, (x, weight, bias, residual), strict=True) if t is not None
    ]
    for got, want in zip((y, *grads), wanted, strict=True):
        # float32 sums of 140 terms of size up to 10: 64 u of the largest result and more.
        assert (abs(oracle.wide(got) - want) <= 64 * 2.0**-24 * (8 + abs(want).max())).all()


@pytest.mark.parametrize("shape", [(1024, 3), (4, 3, 64, 64), (2, 3, 65, 64), (1, 2, 512, 512)])
def test_sums_of_the_backward_pass(shape):
    """A constant dy is the worst case of a sum that is taken one value after the other."""
    x = torch.randn(shape, requires_grad=True)
    bias = torch.zeros(shape[1], requires_grad=True)
    y = batch_norm(x, None, None, None, bias, True)
    assert y.grad_fn.backend == "aten"
    dy = torch.full(shape, 1 / x.numel())
    dx, d_bias = torch.autograd.grad(y, (x, bias), dy)
    want_x, _, want, _ = oracle.backward(dy, x, None, bias)
    assert (abs(oracle.wide(d_bias) - want) <= 64 * 2.0**-24 * want).all()
    # dx is what cancels: in truth about 0, its terms as large as dy / σ.
    assert (abs(oracle.wide(dx) - want_x) <= 64 * 2.0**-24 * 2 * dy.max().item()).all()


@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchs_own_result_to_the_last_bit(training):
    """So it cannot be less exact than torch."""
    x = (torch.randn(16, 6, 8, 8) + 3).requires_grad_()
    weight, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    dy = 3 + 5 * x.detach() + 0.01 * torch.randn_like(x)
    statistics = torch.randn(6), torch.rand(6) + 0.5
    results = []
    for function in (batch_norm, torch.nn.functional.batch_norm):
        y = function(x, *(s.clone() for s in statistics), weight, bias, training)
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), dy)))
    assert results[0][0].grad_fn.backend == "aten"
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
