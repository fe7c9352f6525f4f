"""Moments, and normalising by them, as two differentiable operations.

`autograd` has both in one, which needs less memory traffic. Apart, moments can be merged in between
with those of other passes through the same graph: torch's autograd brings their gradients together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import reference, select
from batchnorm.moments import Moments, along_channel, expand_mask


def moments_of(x: Tensor, mask: Tensor | None, channel_dim: int) -> Moments:
    """`Moments.of`, whose gradient needs no more memory than x."""
    count, mean, m2 = _Moments.apply(x, mask, channel_dim)
    return Moments(count, mean, m2)


def normalize_by(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    channel_dim: int,
) -> Tensor:
    """y = activation(γ·x̂ + β + residual), differentiable in mean and biased variance too."""
    y: Tensor = _Normalize.apply(
        x, weight, bias, residual, mask, mean, var, eps, activation, channel_dim
    )
    return y


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, channel_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = select.moments(x, mask, channel_dim)
        ctx.channel_dim = channel_dim
        ctx.mark_non_differentiable(found.count)
        # Detached, here and below: hooks that keep an output as it is would close a circle.
        ctx.save_for_backward(x, mask, found.count, found.mean.detach())
        return found.count, found.mean, found.m2

    @staticmethod
    def backward(ctx: Any, _: Any, d_mean: Tensor, d_m2: Tensor) -> tuple[Tensor, None, None]:
        x, mask, count, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Someone will differentiate this gradient: a function of x, not of the mean saved.
            mean = Moments.of(x, mask, channel_dim=ctx.channel_dim).mean
        weights = None if mask is None else expand_mask(mask, x, ctx.channel_dim).to(mean.dtype)
        counted = x if weights is None else torch.where(weights > 0, x, 0.0)
        # ∂m2/∂mean is −2·Σ w·(x − mean) = 0.
        centred = counted.to(mean.dtype) - along_channel(mean, x, ctx.channel_dim)
        dx = centred * along_channel(2 * d_m2, x, ctx.channel_dim)
        share = d_mean / torch.where(count > 0, count, 1.0)
        dx = dx + along_channel(share, x, ctx.channel_dim)
        return (dx if weights is None else dx * weights).to(x.dtype), None, None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        activation: str | None,
        channel_dim: int,
    ) -> Tensor:
        ctx.options = {"eps": eps, "activation": activation, "channel_dim": channel_dim}
        y = select.normalize(x, mean, var, weight, bias, residual, **ctx.options)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, residual)]
        # The activation's slope is told from the sign of y.
        sign = None if activation is None else y.detach()
        ctx.save_for_backward(x, weight, sign, mask, mean, var)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, mask, mean, var = ctx.saved_tensors
        eps, channel_dim = ctx.options["eps"], ctx.options["channel_dim"]
        weights = None if mask is None else expand_mask(mask, x, channel_dim).to(mean.dtype)
        dz, x_hat = reference.backward_terms(dy, x, y, weights, mean, var, **ctx.options)
        d_weight, d_bias = reference.backward_reduce(dz, x_hat, channel_dim)
        scale = reference.inverse_std(var, eps)
        scale = scale if weight is None else scale * weight
        dx = dz * along_channel(scale, x, channel_dim)
        gradients = zip((dx, d_weight, d_bias, dz), ctx.dtypes, strict=True)
        # x̂ = (x − mean)/√(var + eps), so ∂x̂/∂var is −x̂ / (2·(var + eps)).
        slope = d_weight if weight is None else d_weight * weight
        return (
            *(None if dtype is None else g.to(dtype) for g, dtype in gradients),
            None,
            -scale * d_bias,
            slope / (var + eps) * -0.5,
            None,
            None,
            None,
        )
