"""Cut in blocks of any size, the reference gives the same."""

import itertools

import pytest
import torch

from batchnorm import batch_norm
from batchnorm.kernels import blocked, reference, select
from batchnorm.moments import Moments, expand_mask

pytestmark = pytest.mark.usefixtures("without_native")

# float64 sums of 100 terms of size up to 10, in another order.
CLOSE = {"rtol": 1e-13, "atol": 1e-12}

SHAPES = [((7, 4, 5), 1), ((1, 4, 30), 1), ((4, 9, 3), 0), ((8, 5, 4), -1), ((1, 4), 1)]
BLOCKS = [1, 13, 40, 10**6]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
@pytest.mark.parametrize("mask_kind", [None, "bool", "weights"])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_equals_the_whole(monkeypatch, block, shape, channel_dim, mask_kind, activation):
    monkeypatch.setattr(blocked, "BLOCK", block)
    x, residual, dy = (torch.randn(shape, dtype=torch.float64) * 2 + 1 for _ in range(3))
    rest = [s for axis, s in enumerate(shape) if axis != channel_dim % len(shape)]
    mask = {None: None, "bool": torch.rand(rest) > 0.3, "weights": torch.rand(rest) * 2}[mask_kind]
    whole = Moments.of(x, mask, channel_dim=channel_dim)
    parts = blocked.moments(x, mask, channel_dim)
    torch.testing.assert_close(parts.count, whole.count, **CLOSE)
    torch.testing.assert_close(parts.mean, whole.mean, **CLOSE)
    torch.testing.assert_close(parts.m2, whole.m2, **CLOSE)

    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    statistics = (whole.mean, whole.variance())
    options = {"eps": 1e-3, "activation": activation, "channel_dim": channel_dim}
    arguments = (x, *statistics, weight, bias, residual)
    y = reference.normalize(*arguments, **options)
    assert torch.equal(blocked.normalize(*arguments, **options), y)

    weights = None if mask is None else expand_mask(mask, x, channel_dim).double()
    for count in (whole.count, None):
        arguments = (dy, x, y, weights, count, *statistics, weight)
        got = blocked.backward(*arguments, **options)
        want = reference.backward(*arguments, **options)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, **CLOSE)


def test_memory_formats_and_promotion():
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    residual = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    m = Moments.of(x)
    options = {"eps": 1e-3, "activation": "relu", "channel_dim": 1}
    y = blocked.normalize(x, m.mean, m.variance(), None, None, residual, **options)
    assert y.dtype is torch.float64
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_where_it_serves():
    big = torch.empty(1).expand(blocked.BLOCK + 1, 2)
    with torch.no_grad():
        assert select.blocks(big)
        assert not select.blocks(torch.empty(blocked.BLOCK // 2, 2))
        assert not select.blocks(torch.empty(blocked.BLOCK + 1, 2, device="meta"))
    assert not select.blocks(big)


@pytest.mark.parametrize("training", [True, False])
def test_the_public_function_goes_through_it(monkeypatch, training):
    """Small blocks or one: the same output and gradients, with everything switched on."""
    x, residual = (torch.randn(9, 4, 6) + 50 for _ in range(2))
    mask, dy = torch.rand(9, 6) > 0.3, torch.randn(9, 4, 6)
    results = []
    for block in (17, 10**6):
        monkeypatch.setattr(blocked, "BLOCK", block)
        weight = torch.arange(1.0, 5.0)
        leaves = [t.clone().requires_grad_() for t in (x, weight, residual)]
        running = torch.full((4,), 49.0), torch.ones(4)
        y = batch_norm(
            leaves[0], *running, leaves[1], None, training,
            mask=mask, residual=leaves[2], activation="relu",
        )  # fmt: skip
        results.append([y, *torch.autograd.grad(y, leaves, dy), *running])
    for got, want in itertools.zip_longest(*results):
        # Both computed in float64 and rounded once; sums in another order may round apart.
        torch.testing.assert_close(got, want, rtol=2.0**-23, atol=1e-10)
    assert results[0][0].grad_fn.backend == "reference"


def test_nan_in_what_is_left_out(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 13)
    x = torch.randn(9, 4, 6)
    mask = torch.rand(9, 6) > 0.4
    out = ~mask[:, None].expand_as(x)
    dy = torch.where(out, 0.0, torch.randn_like(x))
    results = []
    for junk in (0.0, torch.nan):
        leaves = [torch.where(out, junk, x).requires_grad_(), torch.ones(4, requires_grad=True)]
        y = batch_norm(leaves[0], None, None, leaves[1], None, True, mask=mask)
        dx, dgamma = torch.autograd.grad(y, leaves, dy)
        results.append((y[~out], dx[~out], dgamma))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1, 4, 3, 5000), (64, 4, 8)])
def test_no_block_is_much_larger_than_asked(monkeypatch, shape):
    monkeypatch.setattr(blocked, "BLOCK", 2048)
    x = torch.empty(shape)
    sizes = [block.numel() for block, _ in blocked.cut(x, 1)]
    assert sum(sizes) == x.numel()
    assert max(sizes) <= 2048
