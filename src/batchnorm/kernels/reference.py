"""The article's formulas in plain torch: the truth that every other kernel is tested against.

Works on any device, layout, rank and dtype, and under every torch transform, because it is nothing
but differentiable torch operations. It computes in the precision of the statistics it is given
(float64 wherever the device has it) and rounds once, at the end. README.md derives each formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from batchnorm.moments import Axes, Pool, along_channel, reduced_axes

#: Slope of "leaky_relu" below zero; torch.nn.LeakyReLU's default.
LEAKY_SLOPE = 0.01

#: The activations that kernels fuse, and the slope of each below zero.
ACTIVATIONS = {"relu": 0.0, "leaky_relu": LEAKY_SLOPE}


class Gradients(NamedTuple):
    """What the backward pass returns; `z` is the gradient before the activation, the residual's."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    z: Tensor


def inverse_std(var: Tensor, eps: float) -> Tensor:
    """1 / √(var + eps)."""
    return torch.rsqrt(var + eps)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    channel_dim: Axes,
) -> Tensor:
    """y = activation(γ·x̂ + β + residual) with x̂ = (x − mean) / √(var + eps).

    Returns:
        The shape of `x`; its dtype, promoted with the residual's.
    """
    z = normalized(x, mean, var, eps=eps, channel_dim=channel_dim)
    if weight is not None:
        z = z * along_channel(weight, x, channel_dim)
    if bias is not None:
        z = z + along_channel(bias, x, channel_dim)
    if residual is not None:
        z = z + residual
    z, dtype = activate(z, activation), output_dtype(x, residual)
    # Not z.to(dtype) alone: where that does nothing, torch 2.11 compiled loses the gradient.
    return z if z.dtype is dtype else z.to(dtype)


def output_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of y: that of x, promoted with the residual's."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The fused activations; NaN comes out as NaN."""
    if activation is None:
        return z
    # Not leaky_relu with slope 0 for both: −∞ · 0 is NaN.
    return z.relu() if activation == "relu" else leaky_relu(z, ACTIVATIONS[activation])


def activation_slope(d: Tensor, y: Tensor, activation: str | None) -> Tensor:
    """`d` · activation′(z), told from the sign of y, which is z's; at 0 it is the left one."""
    if activation is None:
        return d
    # Not a product for relu: an infinite gradient · 0 is NaN.
    left = torch.zeros_like(d) if activation == "relu" else d * ACTIVATIONS[activation]
    return torch.where(y <= 0, left, d)


def normalized(x: Tensor, mean: Tensor, var: Tensor, *, eps: float, channel_dim: Axes) -> Tensor:
    """x̂ = (x − mean) / √(var + eps), in the precision of `mean`."""
    # The difference first: x·s − mean·s would cancel, and lose |mean|/σ in relative precision.
    centred = x.to(mean.dtype) - along_channel(mean, x, channel_dim)
    return centred * along_channel(inverse_std(var, eps), x, channel_dim)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    channel_dim: Axes,
    pool: Pool | None = None,
) -> Gradients:
    """Gradients of `normalize`, and through the moments where they came from `x` itself.

        dz = dy · activation′(z)        dβ = Σ dz        dγ = Σ dz·x̂
        dx = γ/√(var + eps) · (dz − w/count · (dβ + x̂·dγ))

    Args:
        dy: gradient of y.
        x: the input of the forward pass.
        y: its output, whose sign is z's; not read without an activation.
        weights: the mask as weights in the precision of `mean`, channel axis 1; None = all ones.
        count: total weight behind the moments; None where they are constants (evaluation).
        mean: per channel.
        var: biased variance, per channel.
        weight: γ, or None for ones.
        eps: as in the forward pass.
        activation: as in the forward pass.
        channel_dim: as in the forward pass.
        pool: where others have a share in the moments, of the sums in dx only: dγ and dβ are those
            of the elements here.
    """
    dz, x_hat = backward_terms(
        dy, x, y, weights, mean, var, eps=eps, activation=activation, channel_dim=channel_dim
    )
    sums = backward_reduce(dz, x_hat, channel_dim)
    pooled = pool_sums(pool, sums) if count is not None else sums
    dx = backward_input(
        dz, x_hat, weights, count, var, weight, *pooled, eps=eps, channel_dim=channel_dim
    )
    return Gradients(dx, *sums, dz)


def pool_sums(pool: Pool | None, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both sums of all who share the statistics, in one exchange."""
    if pool is None:
        return sums
    # In the order that all kernels send them: another process may have others.
    second, first = pool.sum(torch.stack(sums[::-1])).unbind()
    return first, second


def backward_terms(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    activation: str | None,
    channel_dim: Axes,
) -> tuple[Tensor, Tensor]:
    """Per element: dz, the gradient before the activation, and x̂."""
    dz = activation_slope(dy.to(mean.dtype), y, activation)
    if weights is None:
        return dz, normalized(x, mean, var, eps=eps, channel_dim=channel_dim)
    # An element that does not count may hold NaN, or get NaN from a loss that divides by it. Its
    # share of the sums would poison every gradient that does count; a finite one stays, because y
    # at such an element does depend on γ, β and the moments.
    sound = (weights > 0) | (x.isfinite() & dz.isfinite())
    dz = torch.where(sound, dz, 0.0)
    # Before the arithmetic, not after: differentiated again, it would send back 0 · NaN.
    x = torch.where(sound, x, 0.0)
    x_hat = normalized(x, mean, var, eps=eps, channel_dim=channel_dim)
    return dz, torch.where(sound, x_hat, 0.0)


def backward_reduce(dz: Tensor, x_hat: Tensor, channel_dim: Axes) -> tuple[Tensor, Tensor]:
    """Per channel: dγ = Σ dz·x̂ and dβ = Σ dz."""
    axes = reduced_axes(dz, channel_dim)
    return (dz * x_hat).sum(axes), dz.sum(axes)


def backward_input(
    dz: Tensor,
    x_hat: Tensor,
    weights: Tensor | None,
    count: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    d_weight: Tensor,
    d_bias: Tensor,
    *,
    eps: float,
    channel_dim: Axes,
) -> Tensor:
    """Per element: dx = γ/√(var + eps) · (dz − w/count · (dβ + x̂·dγ))."""
    dx = dz
    if count is not None:
        total = torch.where(count > 0, count, 1.0)
        pull = x_hat * along_channel(d_weight / total, dz, channel_dim)
        pull = pull + along_channel(d_bias / total, dz, channel_dim)
        dx = dx - (pull if weights is None else pull * weights)
    scale = inverse_std(var, eps) if weight is None else inverse_std(var, eps) * weight
    return dx * along_channel(scale, dz, channel_dim)


def tangent(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    *,
    eps: float,
    activation: str | None,
    channel_dim: Axes,
    pool: Pool | None = None,
) -> Tensor:
    """Directional derivative of y along (ẋ, γ̇, β̇, residual̇); None where a direction is zero.

    x̂̇ = (ẋ − Σ w·ẋ/count − x̂·Σ w·x̂·ẋ/count) / √(var + eps)
    ẏ = activation′(z) · (γ·x̂̇ + γ̇·x̂ + β̇ + residual̇)
    """
    axes = reduced_axes(x, channel_dim)
    x_dot, weight_dot, bias_dot, residual_dot = tangents
    x_hat = normalized(x, mean, var, eps=eps, channel_dim=channel_dim)
    z_dot = torch.zeros_like(x_hat)
    if x_dot is not None:
        x_dot = x_dot.to(mean.dtype)  # mutant: precision of a sum in float32
        hat_dot = x_dot
        if count is not None:
            share, lever = x_dot, x_hat * x_dot
            if weights is not None:
                share = torch.where(weights > 0, share, 0.0) * weights
                lever = torch.where(weights > 0, lever, 0.0) * weights
            total = torch.where(count > 0, count, 1.0)
            first, second = pool_sums(pool, (share.sum(axes), lever.sum(axes)))
            mean_dot = along_channel(first / total, x, channel_dim)
            stretch = along_channel(second / total, x, channel_dim)
            hat_dot = x_dot - mean_dot - x_hat * stretch
        scale = inverse_std(var, eps) if weight is None else inverse_std(var, eps) * weight
        z_dot = hat_dot * along_channel(scale, x, channel_dim)
    if weight_dot is not None:
        z_dot = z_dot + x_hat * along_channel(weight_dot, x, channel_dim)
    if bias_dot is not None:
        z_dot = z_dot + along_channel(bias_dot, x, channel_dim)
    if residual_dot is not None:
        z_dot = z_dot + residual_dot
    return activation_slope(z_dot, y, activation)
