"""The backward direction: sums of a channel, then the gradient of each element; or both at once."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.forward import channel_numbers
from batchnorm.kernels.triton.device.tiles import (
    activation_slope,
    affine,
    along,
    as_stored,
    axes,
    count_of,
    double,
    finite,
    group_of,
    inverse_std,
    moved,
    or_one,
    sizes,
    slots_of,
    split,
    start,
    total,
    weights_at,
    within,
    within_threads,
)


@triton.jit
def read_channels(statistics, row, weight, bias, slot, inside, eps):
    """A channel's numbers; and what the mean has besides the first of them, and 1/√(var + eps)."""
    mean = tl.load(statistics + slot, mask=inside, other=0.0)
    var = tl.load(statistics + row + slot, mask=inside, other=1.0)
    _, rest = split(mean)
    numbers = channel_numbers(mean, var, weight, bias, slot, inside, eps)
    return numbers, rest, inverse_std(var, eps)


@triton.jit
def lever(distances, dz_sum, rest, invstd):
    """Σdz·x̂ from Σdz·d, where d = x − near and so x̂ = (d − rest)/√(var + eps)."""
    return (distances - rest.to(tl.float64) * dz_sum) * invstd.to(tl.float64)


@triton.jit
def terms(
    dy,
    x,
    y,
    mask,
    at,
    inside,
    at_mask,
    numbers,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """dz, x − near and the weight of each element of a tile."""
    near, scale, shift = numbers
    first_o, first_i, o, i, inner, inside_oi = at_mask
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    d = v - near
    dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        z = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    else:
        z = affine(d, scale, shift)
    dz = activation_slope(dz, z, ACTIVATION, SLOPE)
    # What lies outside of the tensor was read as 0, which is not its channel's mean.
    weights = tl.where(inside_oi, 1.0, 0.0)
    if mask is not None:
        # What does not count may hold NaN, or get it from the loss; a finite share stays.
        weights = weights_at(mask, first_o, first_i, o, i, inner, inside_oi)
        sound = (weights > 0) | (finite(d) & finite(dz))
        dz = tl.where(sound, dz, 0.0)
        d = tl.where(sound, d, 0.0)
    return dz, d, weights


@triton.jit
def pulls(dz_sum, lever_sum, n, rest, invstd):
    """(Σdz + x̂·Σdz·x̂) / count as a number and a factor of d."""
    share = 1.0 / or_one(n)
    factor = (lever_sum * share).to(tl.float32) * invstd
    return along((dz_sum * share).to(tl.float32) - rest * factor), along(factor)


@triton.jit
def gradient_of(dz, d, weights, mask, scale, constant, factor):
    """dx = γ/√(var + eps) · (dz − w · (Σdz + x̂·Σdz·x̂) / count)."""
    pull = constant + d * factor
    if mask is not None:
        pull = tl.where(weights > 0, pull * weights, 0.0)
    return scale * (dz - pull)


@triton.jit
def sums_kernel(
    dy,
    x,
    y,
    mask,
    dz_out,
    statistics,
    weight,
    bias,
    partial,  # (2, groups, channels, splits)
    eps_high,
    eps_low,
    outer,
    all_outer,
    c_units,
    i_units,
    tiles_i,
    tiles,
    per_split,
    UC: tl.constexpr,
    UI: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    RO: tl.constexpr,
    RI: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Each program: Σdz and Σdz·x̂ of its part of its channels; and dz, where it is wanted."""
    channels, inner = sizes(c_units, i_units, UC, UI, WIDE)
    index, group = tl.program_id(1), tl.program_id(2)
    before, outer = group_of(group, outer, all_outer, WIDE)
    skipped = before * channels * inner
    dy = moved(dy, skipped)
    x = moved(x, skipped)
    y = moved(y, skipped)
    dz_out = moved(dz_out, skipped)
    mask = moved(mask, before * inner)
    first_c = tl.program_id(0) * BC
    channel = first_c + tl.arange(0, BC)
    known = channel < channels
    slot, slots, row = slots_of(group, channel, channels, all_outer)
    numbers, rest, invstd = read_channels(
        statistics, row, weight, bias, slot, known, double(eps_high, eps_low)
    )
    o, c, i = axes(BO, BC, BI, WIDE)
    inside_c = within(first_c, c, channels, WIDE)
    offsets = (o * channels + c) * inner + i
    dz_sum = tl.zeros([BO // RO, BC, BI // RI], tl.float32)
    distance_sum = tl.zeros([BO // RO, BC, BI // RI], tl.float32)
    begin = index * per_split
    end = tl.minimum(begin + per_split, tiles)
    for tile in tl.range(begin, end, num_stages=STAGES):
        first_o, first_i = start(tile, tiles_i, BO, BI)
        inside_oi = within(first_o, o, outer, WIDE) & within(first_i, i, inner, WIDE)
        inside = inside_oi & inside_c
        at = (first_o * channels + first_c) * inner + first_i + offsets
        at_mask = first_o, first_i, o, i, inner, inside_oi
        dz, d, _ = terms(dy, x, y, mask, at, inside, at_mask, numbers, ACTIVATION, SLOPE)
        dz_sum += within_threads(dz, RO, RI)
        distance_sum += within_threads(dz * d, RO, RI)
        if dz_out is not None:
            tl.store(dz_out + at, dz.to(dz_out.dtype.element_ty), mask=inside)
    stride = tl.num_programs(1).to(tl.int64) * slots
    to = partial + slot.to(tl.int64) * tl.num_programs(1) + index
    of_dz = total(dz_sum, 1, 1)
    tl.store(to, of_dz, mask=known)
    of_lever = lever(total(distance_sum, 1, 1), of_dz, rest, invstd)
    tl.store(to + stride, of_lever, mask=known)


@triton.jit
def added(partial, slot, inside, slots, splits, BS: tl.constexpr):
    """Both sums of all parts of these channels, always in the same order."""
    dz_sum = tl.zeros(slot.shape, tl.float64)
    lever_sum = tl.zeros(slot.shape, tl.float64)
    stride = (tl.full([], 0, tl.int64) + splits) * slots
    for first in range(0, splits, BS):
        s = first + tl.arange(0, BS)
        at = partial + slot.to(tl.int64)[None, :] * splits + s[:, None]
        there = (s < splits)[:, None] & inside[None, :]
        dz_sum += tl.sum(tl.load(at, mask=there, other=0.0), axis=0)
        lever_sum += tl.sum(tl.load(at + stride, mask=there, other=0.0), axis=0)
    return dz_sum, lever_sum


@triton.jit
def write_sums(dz_sum, lever_sum, slot, inside, slots, sums, d_weight, d_bias):
    """Keep both sums, or what they are: the gradients of β and γ."""
    if sums is not None:
        tl.store(sums + slot, dz_sum, mask=inside)
        tl.store(sums + slots + slot, lever_sum, mask=inside)
    if d_weight is not None:
        tl.store(d_weight + slot, as_stored(lever_sum, d_weight), mask=inside)
        tl.store(d_bias + slot, as_stored(dz_sum, d_bias), mask=inside)


@triton.jit
def finish_sums_kernel(
    partial, sums, d_weight, d_bias, channels, splits, BC: tl.constexpr, BS: tl.constexpr
):
    """Add alone, where there are too many parts for each program of the next pass to do it."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    dz_sum, lever_sum = added(partial, c, inside, channels, splits, BS)
    write_sums(dz_sum, lever_sum, c, inside, channels, sums, d_weight, d_bias)


@triton.jit
def gradient_kernel(
    dy,
    x,
    y,
    mask,
    dx,
    statistics,
    weight,
    bias,
    sums,  # given, or None: to be added from `partial`; without either the moments are constants
    partial,
    d_weight,
    d_bias,
    count,
    count_high,
    count_low,
    eps_high,
    eps_low,
    outer,
    all_outer,
    c_units,
    i_units,
    tiles_i,
    tiles,
    per_split,
    splits,
    UC: tl.constexpr,
    UI: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    RO: tl.constexpr,  # noqa: ARG001 - every kernel is told of the same cut
    RI: tl.constexpr,  # noqa: ARG001
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    BS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Each program: the gradient of x in its part, in the reverse order of `sums_kernel`."""
    channels, inner = sizes(c_units, i_units, UC, UI, WIDE)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    before, outer = group_of(group, outer, all_outer, WIDE)
    skipped = before * channels * inner
    dy = moved(dy, skipped)
    x = moved(x, skipped)
    y = moved(y, skipped)
    dx = moved(dx, skipped)
    mask = moved(mask, before * inner)
    first_c = block * BC
    channel = first_c + tl.arange(0, BC)
    known = channel < channels
    slot, slots, row = slots_of(group, channel, channels, all_outer)
    numbers, rest, invstd = read_channels(
        statistics, row, weight, bias, slot, known, double(eps_high, eps_low)
    )
    constant = tl.zeros([1, BC, 1], tl.float32)
    factor = constant
    if (sums is not None) or (partial is not None):
        n = count_of(count, count_high, count_low, group, outer, inner, all_outer)
        if sums is not None:
            dz_sum = tl.load(sums + slot, mask=known, other=0.0)
            lever_sum = tl.load(sums + slots + slot, mask=known, other=0.0)
        else:
            dz_sum, lever_sum = added(partial, slot, known, slots, splits, BS)
            if index == 0:
                write_sums(dz_sum, lever_sum, slot, known, slots, None, d_weight, d_bias)
        constant, factor = pulls(dz_sum, lever_sum, n, rest, invstd)
    o, c, i = axes(BO, BC, BI, WIDE)
    inside_c = within(first_c, c, channels, WIDE)
    offsets = (o * channels + c) * inner + i
    begin = index * per_split
    end = tl.minimum(begin + per_split, tiles)
    for passed in tl.range(0, end - begin, num_stages=STAGES):
        tile = end - 1 - passed
        first_o, first_i = start(tile, tiles_i, BO, BI)
        inside_oi = within(first_o, o, outer, WIDE) & within(first_i, i, inner, WIDE)
        inside = inside_oi & inside_c
        at = (first_o * channels + first_c) * inner + first_i + offsets
        at_mask = first_o, first_i, o, i, inner, inside_oi
        dz, d, weights = terms(dy, x, y, mask, at, inside, at_mask, numbers, ACTIVATION, SLOPE)
        out = gradient_of(dz, d, weights, mask, numbers[1], constant, factor)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def whole_gradient_kernel(
    dy,
    x,
    y,
    mask,
    dx,
    dz_out,
    statistics,
    weight,
    bias,
    d_weight,
    d_bias,
    count,
    count_high,
    count_low,
    eps_high,
    eps_low,
    outer,
    all_outer,
    c_units,
    i_units,
    UC: tl.constexpr,
    UI: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    RO: tl.constexpr,
    RI: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,  # noqa: ARG001
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    TRAINING: tl.constexpr,
):
    """All gradients in one launch: x and dy are read once."""
    channels, inner = sizes(c_units, i_units, UC, UI, WIDE)
    group = tl.program_id(2)
    before, outer = group_of(group, outer, all_outer, WIDE)
    skipped = before * channels * inner
    dy = moved(dy, skipped)
    x = moved(x, skipped)
    y = moved(y, skipped)
    dx = moved(dx, skipped)
    dz_out = moved(dz_out, skipped)
    mask = moved(mask, before * inner)
    first_c = tl.program_id(0) * BC
    channel = first_c + tl.arange(0, BC)
    known = channel < channels
    slot, slots, row = slots_of(group, channel, channels, all_outer)
    numbers, rest, invstd = read_channels(
        statistics, row, weight, bias, slot, known, double(eps_high, eps_low)
    )
    o, c, i = axes(BO, BC, BI, WIDE)
    inside_oi = (o < outer) & (i < inner)
    inside = inside_oi & within(first_c, c, channels, WIDE)
    at = (o * channels + first_c + c) * inner + i
    at_mask = 0, 0, o, i, inner, inside_oi
    dz, d, weights = terms(dy, x, y, mask, at, inside, at_mask, numbers, ACTIVATION, SLOPE)
    dz_sum = total(dz, RO, RI)
    lever_sum = lever(total(dz * d, RO, RI), dz_sum, rest, invstd)
    write_sums(dz_sum, lever_sum, slot, known, slots, None, d_weight, d_bias)
    if dz_out is not None:
        tl.store(dz_out + at, dz.to(dz_out.dtype.element_ty), mask=inside)
    if dx is not None:
        constant = tl.zeros([1, BC, 1], tl.float32)
        factor = constant
        if TRAINING:
            n = count_of(count, count_high, count_low, group, outer, inner, all_outer)
            constant, factor = pulls(dz_sum, lever_sum, n, rest, invstd)
        out = gradient_of(dz, d, weights, mask, numbers[1], constant, factor)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
