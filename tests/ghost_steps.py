"""One training step in groups of samples, checked against the oracle's loop over the groups."""

import torch

import oracle
from batchnorm import batch_norm
from within import assert_running, assert_step


def check(x, size, *, mask=None, residual=None, activation=None, channel_dim=1):
    """One training step against a loop over the groups."""
    channels = x.shape[channel_dim]
    parameters = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (torch.randn(channels, dtype=parameters) for _ in range(2))
    mean, var = torch.randn(channels, dtype=parameters), torch.rand(channels, dtype=parameters)
    old = mean.clone(), var.clone()
    dy = torch.randn(x.shape).to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    options = {"mask": mask, "activation": activation, "channel_dim": channel_dim}
    y = batch_norm(
        *(leaves[0], mean, var, *leaves[1:3], True, 0.3),
        residual=(*leaves, None)[3],
        virtual_batch_size=size,
        **options,
    )
    names = ["dx", "d_weight", "d_bias", "d_residual"][: len(leaves)]
    got = dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))
    want = oracle.step(dy, x, weight, bias, residual=residual, size=size, **options)
    assert_step({"y": y, **got}, want, x, parameters=parameters)
    assert_running((mean, var), old, want, 0.3)
    return y
