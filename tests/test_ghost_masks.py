"""Ghost batches with masks: what does not count takes no part, in any group."""

import math

import pytest
import torch

from batchnorm import batch_norm
from ghost_steps import check

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("as_weights", [False, True])
def test_a_group_of_which_nothing_counts_takes_no_part(as_weights):
    x, residual = torch.randn(2, 9, 3, 4).double()
    mask = torch.ones(9, 4, dtype=torch.bool)
    mask[3:6] = False
    mask[0, 1] = False
    mask = mask.double() * 1.5 if as_weights else mask
    check(x, 3, mask=mask, residual=residual, activation="relu")
    # And what it holds reaches neither the statistics nor the other groups, nor their gradients.
    results = []
    for junk in (0.0, torch.nan, torch.inf):
        leaf = x.clone()
        leaf[3:6] = junk
        mean, var = torch.zeros(3), torch.ones(3)
        leaf.requires_grad_()
        y = batch_norm(leaf, mean, var, training=True, mask=mask, virtual_batch_size=3)
        dy = torch.ones_like(y).cumsum(0)
        dy[3:6] = 0
        (dx,) = torch.autograd.grad(y, leaf, dy)
        kept = [0, 1, 2, 6, 7, 8]
        results.append((y.detach()[kept], dx[kept], mean, var))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_masks_that_broadcast():
    x = torch.randn(7, 3, 4, 5).double()
    for shape in [(7, 1, 1), (4, 5), (5,), (1, 4, 1)]:
        mask = torch.rand(shape) > 0.4
        mask.view(-1)[:2] = True
        mask[(0,) * mask.dim()] = True
        if len(shape) == 3 and shape[0] == 7:
            mask[:] = mask | (torch.arange(7) % 2 == 0).reshape(7, 1, 1)
        check(x, 3, mask=mask)
        check(x, 7, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_group_of_padding_stays_in_range(kernels, dtype):
    """Variance 1 where nothing counts: divided by √eps, 1000 would leave half precision."""
    x = torch.full((4, 3, 2), 1000.0, dtype=dtype)
    x[:2] = torch.randn(2, 3, 2, dtype=dtype)
    mask = torch.tensor([True, True, False, False])[:, None].expand(4, 2)
    y = batch_norm(x, None, None, training=True, mask=mask, virtual_batch_size=2)
    torch.testing.assert_close(y[2:], (x[2:].double() / math.sqrt(1 + 1e-5)).to(dtype))
