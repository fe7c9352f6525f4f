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
        values = values.detach().double().cpu().numpy()
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


def correction(mean, var, running_mean, running_var, r_max, d_max, eps=1e-5):
    """Renormalization's r and d, clipped: Ioffe 2017."""
    sigma = np.sqrt(wide(running_var) + Wide(eps))
    r = np.sqrt(var + Wide(eps)) / sigma
    d = (mean - wide(running_mean)) / sigma
    r_max, d_max = Wide(r_max), Wide(d_max)
    return np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max)


@dataclass
class Result:
    """A result and its natural size: the sum of the magnitudes of its terms."""

    value: np.ndarray
    size: np.ndarray


def step(
    dy,
    x,
    weight=None,
    bias=None,
    *,
    mask=None,
    residual=None,
    size=None,
    renorm=None,
    eps=1e-5,
    activation=None,
    channel_dim=1,
) -> dict[str, Result]:
    """A training step by a loop over the groups of `size` samples, forward and backward.

    `renorm` = (running mean, running variance, r_max, d_max). The running statistics are to take in
    "mean" and "unbiased", those of all elements. Sizes assume statistics relative to σ, not to the
    mean: an offset of many σ in float64 needs more.
    """
    x, dy = wide(x), wide(dy)
    residual = None if residual is None else wide(residual)
    channels = x.shape[channel_dim]
    gamma = np.ones(channels, Wide) if weight is None else wide(weight)
    beta = np.zeros(channels, Wide) if bias is None else wide(bias)
    if mask is not None:
        axes = [n for axis, n in enumerate(x.shape) if axis != channel_dim % x.ndim]
        mask = np.broadcast_to(wide(mask), axes)
    y, y_size, dx, dx_size, dz, added = (np.zeros(x.shape, Wide) for _ in range(6))
    d_gamma, d_gamma_size, d_beta, d_beta_size = (np.zeros(channels, Wide) for _ in range(4))
    axis = 0 if channel_dim % x.ndim else 1  # of the samples
    samples = x.shape[axis]
    for start in range(0, samples, size or samples):
        group = slice(start, start + (size or samples))
        part = (slice(None),) * axis + (group,)
        of_mask = None if mask is None else mask[group]
        nothing = of_mask is not None and not (of_mask > 0).any()
        # Where nothing counts, mean 0 and variance 1, constants.
        given = (np.zeros(channels), np.ones(channels)) if nothing else None
        options = {"eps": eps, "channel_dim": channel_dim, "given": given}
        options["mask"] = None if nothing else of_mask
        mean, var = given or moments(x[part], of_mask, channel_dim)[1:3]
        r, d = np.ones(channels, Wide), np.zeros(channels, Wide)
        if renorm is not None:
            r, d = correction(mean, var, *renorm, eps=eps)
        scale, shift = gamma * r, gamma * d + beta
        skip = None if residual is None else residual[part]
        extra = {"residual": skip, "activation": activation}
        f = forward(x[part], scale, shift, **options, **extra)
        grads = backward(dy[part], x[part], scale, shift, **options, **extra)
        y[part], dx[part], dz[part] = f.y, grads[0], grads[3]
        d_gamma += r * grads[1] + d * grads[2]
        d_beta += grads[2]

        column = lambda v: np.asarray(v)[:, None]  # noqa: E731
        up = lambda v: unrows(v, x[part].shape, channel_dim)  # noqa: E731, B023
        flow = rows(abs(grads[3]), channel_dim)
        lean, tilt = flow.sum(1), (flow * (abs(f.x_hat) + 1)).sum(1)
        pull = 0 if nothing else f.weights / f.count
        pull = pull * (column(lean) + abs(f.x_hat) * column(tilt))
        s = 1 / np.sqrt(var + Wide(eps))
        offset = abs(gamma * d) + abs(beta)
        y_size[part] = up(column(abs(scale)) * (abs(f.x_hat) + 1) + column(offset))
        dx_size[part] = up(column(abs(scale) * s) * (flow + pull))
        added[part] = 0 if skip is None else abs(skip)
        d_gamma_size += r * tilt + abs(d) * lean
        d_beta_size += lean
    _, mean, var, unbiased, _ = moments(x, mask, channel_dim)
    return {
        "y": Result(y, y_size + added),
        "dx": Result(dx, dx_size),
        "d_weight": Result(d_gamma, d_gamma_size),
        "d_bias": Result(d_beta, d_beta_size),
        "d_residual": Result(dz, abs(dz)),
        "mean": Result(mean, np.sqrt(var) + abs(mean)),
        "unbiased": Result(unbiased, unbiased),
    }
