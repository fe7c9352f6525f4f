"""The reference kernels against the oracle: each formula by itself, in float64."""

import pytest
import torch

import oracle
from batchnorm.kernels import reference
from batchnorm.moments import Moments, expand_mask

# float64, values of size up to 10 and sums of 40 terms: a few hundred roundings of 2^-53 at most.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}
EPS = 0.1


def case(mask_kind=None, channel_dim=1, affine=True):
    x = torch.randn(5, 4, 6, dtype=torch.float64) * 2 + 1
    channels = x.shape[channel_dim]
    rest = [s for axis, s in enumerate(x.shape) if axis != channel_dim]
    mask = {None: None, "bool": torch.rand(rest) > 0.4, "weights": torch.rand(rest).double() * 2}[
        mask_kind
    ]
    affines = (torch.randn(channels).double(), torch.randn(channels).double())
    weight, bias = affines if affine else (None, None)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    moments = Moments.of(x, mask, channel_dim=channel_dim)
    return x, mask, weight, bias, residual, dy, moments


def close(got, want):
    torch.testing.assert_close(got, torch.from_numpy(want.astype("float64")), **CLOSE)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("channel_dim", [0, 1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_normalize(activation, channel_dim, affine):
    x, _, weight, bias, residual, _, m = case(channel_dim=channel_dim, affine=affine)
    options = {"eps": EPS, "activation": activation, "channel_dim": channel_dim}
    y = reference.normalize(x, m.mean, m.variance(), weight, bias, residual, **options)
    close(y, oracle.forward(x, weight, bias, residual=residual, **options).y)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("mask_kind", [None, "bool", "weights"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("affine", [True, False])
def test_backward(activation, mask_kind, given, affine):
    x, mask, weight, bias, residual, dy, m = case(mask_kind, affine=affine)
    options = {"eps": EPS, "activation": activation, "channel_dim": 1}
    y = reference.normalize(x, m.mean, m.variance(), weight, bias, residual, **options)
    got = reference.backward(
        dy,
        x,
        y,
        None if mask is None else expand_mask(mask, x, 1).to(x.dtype),
        None if given else m.count,
        m.mean,
        m.variance(),
        weight,
        **options,
    )
    wanted = oracle.backward(
        dy,
        x,
        weight,
        bias,
        mask=mask,
        residual=residual,
        given=(m.mean, m.variance()) if given else None,
        **options,
    )
    for g, want in zip(got, wanted, strict=True):
        close(g, want)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("mask_kind", [None, "bool", "weights"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_tangent_is_the_adjoint_of_backward(activation, mask_kind, given, parts):
    """⟨dy, J·v⟩ = ⟨Jᵀ·dy, v⟩ for each argument by itself and all together."""
    x, mask, weight, bias, residual, dy, m = case(mask_kind)
    options = {"eps": EPS, "activation": activation, "channel_dim": 1}
    y = reference.normalize(x, m.mean, m.variance(), weight, bias, residual, **options)
    weights = None if mask is None else expand_mask(mask, x, 1).to(x.dtype)
    statistics = (weights, None if given else m.count, m.mean, m.variance(), weight)
    directions = [
        torch.randn_like(t) if index in parts else None
        for index, t in enumerate((x, weight, bias, residual))
    ]
    forward = reference.tangent(x, y, *statistics, tuple(directions), **options)
    back = reference.backward(dy, x, y, *statistics, **options)
    reverse = sum((g * v).sum() for g, v in zip(back, directions, strict=True) if v is not None)
    torch.testing.assert_close((dy * forward).sum(), reverse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_are_torchs_at_the_edges(activation):
    """At ±0, ±inf and NaN, forward and slope, torch.nn.functional decides."""
    function = getattr(torch.nn.functional, activation)
    z = torch.tensor([-2.0, -0.0, 0.0, 3.0, torch.inf, -torch.inf, torch.nan], requires_grad=True)
    want = function(z)
    got = reference.activate(z.detach(), activation)
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=0, equal_nan=True)
    for d in (1.5, torch.inf):
        cotangent = torch.full_like(want, d)
        (slope,) = torch.autograd.grad(want, z, cotangent, retain_graph=True)
        mine = reference.activation_slope(cotangent, got, activation)
        torch.testing.assert_close(mine[:-1], slope[:-1], rtol=0, atol=0)


def test_left_out_nan_reaches_no_gradient_that_counts():
    x, mask, weight, bias, _, dy, _ = case("bool")
    out = ~mask[:, None].expand_as(x)
    clean_dy = torch.where(out, 0.0, dy)
    m = Moments.of(x, mask)
    weights = expand_mask(mask, x, 1).to(x.dtype)
    options = {"eps": EPS, "activation": None, "channel_dim": 1}
    statistics = (weights, m.count, m.mean, m.variance(), weight)
    want = reference.backward(clean_dy, x, x, *statistics, **options)
    for x_junk, dy_junk in ((torch.nan, 0.0), (0.0, torch.nan), (torch.inf, torch.nan)):
        dirty_x, dirty_dy = torch.where(out, x_junk, x), torch.where(out, dy_junk, dy)
        got = reference.backward(dirty_dy, dirty_x, x, *statistics, **options)
        assert torch.equal(got.weight, want.weight)
        assert torch.equal(got.bias, want.bias)
        assert torch.equal(got.x[~out], want.x[~out])
        assert got.x.isfinite().all()
        assert got.z.isfinite().all()


def test_finite_elements_left_out_still_have_their_gradient():
    """y depends on γ, β and the moments at every element, whether or not it made them."""
    x, mask, weight, bias, _, dy, m = case("bool")
    only_out = torch.where(mask[:, None], 0.0, dy)
    weights = expand_mask(mask, x, 1).to(x.dtype)
    got = reference.backward(
        only_out, x, x, weights, m.count, m.mean, m.variance(), weight,
        eps=EPS, activation=None, channel_dim=1,
    )  # fmt: skip
    assert (got.x[mask[:, None].expand_as(x)] != 0).all()
    assert (got.weight != 0).all()


def test_rounded_once_to_the_input_or_promoted_with_the_residual():
    x, _, weight, bias, residual, _, m = case()
    options = {"eps": EPS, "activation": None, "channel_dim": 1}
    exact = reference.normalize(
        x.bfloat16().double(), m.mean, m.variance(), weight, bias, None, **options
    )
    half = reference.normalize(x.bfloat16(), m.mean, m.variance(), weight, bias, None, **options)
    assert torch.equal(half, exact.bfloat16())
    mixed = reference.normalize(
        x.bfloat16(), m.mean, m.variance(), weight, bias, residual.float(), **options
    )
    assert mixed.dtype is torch.float32
    assert torch.equal(mixed, (exact + residual.float()).float())
