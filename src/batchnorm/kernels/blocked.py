"""The reference, a block of the batch at a time.

The same formulas in the same precision, for calls so large that the reference's float64 temporaries
would leave the cache and be mapped and cleared by the system at each operation. The statistics of
the blocks are merged; everything else is element by element.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.reference import Gradients, pool_sums
from batchnorm.moments import Axes, Moments, Pool, channel_axis, expand_mask, reduced_axes

#: Elements in a block: 1 MB in float64. Measured, 2 cores with 1 MB of level-2 cache each, forward
#: as a multiple of torch's on (32, 64, 56, 56) channels-last: 27 for 2^13, 5.7 for 2^16, 6.4 for
#: 2^17 and 2^19, 8.3 for 2^21; on (4096, 1024): 14.5 for 2^15, 10.5 for 2^16, 9.0, 9.6, 17. Not cut
#: at all: 66 and 56.
BLOCK = 1 << 17

#: Elsewhere blocks only bound the memory of the temporaries, to 128 MB each in float64; smaller
#: ones would leave the device waiting for launches.
DEVICE_BLOCK = 1 << 24  # mutant: needs such a device


def block_size(x: Tensor) -> int:
    """How many elements of `x` to work on at a time."""
    return BLOCK if x.device.type == "cpu" else DEVICE_BLOCK


def pieces(x: Tensor, channel_dim: Axes) -> tuple[int, int]:
    """Along which axis to cut, and how many of its entries make a block."""
    axes = reduced_axes(x, channel_dim)
    # The first, whose entries lie together in memory, if one of them fits; else the longest.
    fits = (axis for axis in axes if x.numel() <= block_size(x) * x.shape[axis])
    axis = next(fits, max(axes, key=lambda axis: x.shape[axis]))
    return axis, max(1, block_size(x) * x.shape[axis] // x.numel())


def cut(x: Tensor, channel_dim: Axes, *others: Tensor | None) -> Iterator[tuple[Tensor, list[Any]]]:
    """Views of the blocks of `x`, each with those of other tensors of its shape or None."""
    axis, length = pieces(x, channel_dim)
    for start in range(0, x.shape[axis], length):
        size = min(length, x.shape[axis] - start)
        yield (
            x.narrow(axis, start, size),
            [None if t is None else t.narrow(axis, start, size) for t in others],
        )


def moments(x: Tensor, mask: Tensor | None, channel_dim: Axes) -> Moments:
    """Moments of the whole from those of its blocks."""
    weights = None if mask is None else expand_mask(mask, x, channel_dim)
    return Moments.merge_all(
        Moments.of(
            block,
            None if part is None else part.squeeze(channel_axis(channel_dim)),
            channel_dim=channel_dim,
        )
        for block, (part,) in cut(x, channel_dim, weights)
    )


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
    """As the reference's function of this name."""
    y = torch.empty_like(x, dtype=reference.output_dtype(x, residual))
    for block, (out, skip) in cut(x, channel_dim, y, residual):
        out.copy_(
            reference.normalize(
                block,
                mean,
                var,
                weight,
                bias,
                skip,
                eps=eps,
                activation=activation,
                channel_dim=channel_dim,
            )
        )
    return y


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
    """As the reference's function of this name; x's gradient comes in its dtype, z's in dy's."""

    def terms() -> Iterator[tuple[Tensor, Tensor, list[Any]]]:
        for block, (d, sign, part, *outs) in cut(x, channel_dim, dy, y, weights, dx, dz):
            yield (
                *reference.backward_terms(
                    d,
                    block,
                    sign,
                    part,
                    mean,
                    var,
                    eps=eps,
                    activation=activation,
                    channel_dim=channel_dim,
                ),
                [part, *outs],
            )

    dx = torch.empty_like(x)
    # Without mask and activation it is dy itself.
    dz = None if weights is None and activation is None else torch.empty_like(dy)
    d_weight, d_bias = torch.zeros_like(mean), torch.zeros_like(mean)
    for d, x_hat, _ in terms():
        more_weight, more_bias = reference.backward_reduce(d, x_hat, channel_dim)
        d_weight += more_weight
        d_bias += more_bias
    pooled = (d_weight, d_bias) if count is None else pool_sums(pool, (d_weight, d_bias))
    for d, x_hat, (part, dx_out, dz_out) in terms():
        dx_out.copy_(
            reference.backward_input(
                d,
                x_hat,
                part,
                count,
                var,
                weight,
                *pooled,
                eps=eps,
                channel_dim=channel_dim,
            )
        )
        if dz_out is not None:
            dz_out.copy_(d)
    return Gradients(dx, d_weight, d_bias, dy if dz is None else dz)
