"""Batch normalization once more, in NumPy: the independent truth of the tests.

Shares no code and no way of computing with the package: it moves the channels to the front, walks
them one by one, and works in extended precision (80 bits on x86; float64 where NumPy has no more).
The mask is applied by picking elements, not by weights, except where weights are real.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Wide = np.longdouble


def wide(values) -> np.ndarray:
    """Any tensor or array, exactly, in the oracle's precision."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().numpy()
    return np.asarray(values).astype(Wide)


def rows(x, channel_dim: int) -> np.ndarray:
    """(C, everything else)."""
    moved = np.moveaxis(x, channel_dim, 0)
    return moved.reshape(moved.shape[0], -1)


def unrows(r, shape, channel_dim: int) -> np.ndarray:
    moved = np.moveaxis(np.empty(shape, dtype=np.bool_), channel_dim, 0).shape
    return np.moveaxis(r.reshape(moved), 0, channel_dim)


@dataclass
class Forward:
    y: np.ndarray
    count: float
    mean: np.ndarray
    var: np.ndarray  # biased
    unbiased: np.ndarray
    x_hat: np.ndarray  # (C, n)
    slope: np.ndarray  # (C, n), the activation's
    weights: np.ndarray  # (n,)


SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}


def moments(x, mask=None, channel_dim=1):
    """count, mean, biased and unbiased variance per channel."""
    x = wide(x)
    r = rows(x, channel_dim)
    if mask is None:
        weights = np.ones(r.shape[1], dtype=Wide)
    else:
        shape = tuple(s for axis, s in enumerate(x.shape) if axis != channel_dim % x.ndim)
        weights = np.broadcast_to(wide(mask), shape).reshape(-1)
    counts = weights > 0
    count = weights[counts].sum()
    mean, var, unbiased = (np.zeros(len(r), dtype=Wide) for _ in range(3))
    for c, channel in enumerate(r):
        picked, w = channel[counts], weights[counts]
        mean[c] = (w * picked).sum() / count
        # Again from the first estimate: its own rounding would otherwise show at large offsets.
        mean[c] += (w * (picked - mean[c])).sum() / count
        spread = (w * (picked - mean[c]) ** 2).sum()
        var[c] = spread / count
        unbiased[c] = spread / (count - 1) if count > 1 else np.nan
    return count, mean, var, unbiased, weights


def forward(
    x,
    weight=None,
    bias=None,
    *,
    mask=None,
    residual=None,
    eps=1e-5,
    activation=None,
    channel_dim=1,
    given=None,
) -> Forward:
    """One pass; `given` = (mean, var) for evaluation."""
    count, mean, var, unbiased, weights = moments(x, mask, channel_dim)
    if given is not None:
        mean, var = map(wide, given)
    shape = x.shape
    r = rows(wide(x), channel_dim)
    x_hat, z = np.empty_like(r), np.empty_like(r)
    for c in range(len(r)):
        x_hat[c] = (r[c] - mean[c]) / np.sqrt(var[c] + Wide(eps))
        gamma = Wide(1) if weight is None else wide(weight)[c]
        beta = Wide(0) if bias is None else wide(bias)[c]
        z[c] = gamma * x_hat[c] + beta
    if residual is not None:
        z = z + rows(wide(residual), channel_dim)
    slope = np.where(z > 0, Wide(1), Wide(SLOPES[activation]))
    y = unrows(np.where(z > 0, z, z * SLOPES[activation]), shape, channel_dim)
    return Forward(y, count, mean, var, unbiased, x_hat, slope, weights)


def backward(
    dy, x, weight=None, bias=None, *, eps=1e-5, channel_dim=1, given=None, mask=None, **options
):
    """Gradients (x, weight, bias, residual), by the chain rule through mean and variance."""
    f = forward(
        x, weight, bias, mask=mask, eps=eps, channel_dim=channel_dim, given=given, **options
    )
    r, dz = rows(wide(x), channel_dim), rows(wide(dy), channel_dim) * f.slope
    dx = np.empty_like(r)
    d_weight, d_bias = (dz * f.x_hat).sum(1), dz.sum(1)
    for c in range(len(r)):
        gamma = Wide(1) if weight is None else wide(weight)[c]
        s = 1 / np.sqrt(f.var[c] + Wide(eps))
        d_hat = dz[c] * gamma
        dx[c] = d_hat * s
        if given is None:
            centred = r[c] - f.mean[c]
            d_var = (d_hat * centred).sum() * (-0.5) * s**3
            d_mean = -(d_hat * s).sum()
            dx[c] += f.weights / f.count * (d_mean + 2 * centred * d_var)
    back = lambda v: unrows(v, x.shape, channel_dim)  # noqa: E731
    return back(dx), d_weight, d_bias, back(dz)


def running(old_mean, old_var, f: Forward, momentum: float):
    """The running statistics after one more batch."""
    m = Wide(momentum)
    return (
        (1 - m) * wide(old_mean) + m * f.mean,
        (1 - m) * wide(old_var) + m * f.unbiased,
    )
