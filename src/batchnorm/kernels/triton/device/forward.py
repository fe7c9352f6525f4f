"""The second pass of the forward direction; and all of it at once where a tile holds enough."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.merge import are_sound, conclude, keep, take_in, variance
from batchnorm.kernels.triton.device.moments import SMALL
from batchnorm.kernels.triton.device.tiles import (
    activate,
    affine,
    along,
    axes,
    double,
    finite,
    group_of,
    inverse_std,
    moved,
    or_one,
    parameter,
    sizes,
    slots_of,
    split,
    start,
    total,
    weights_at,
    within,
)


@triton.jit
def finish(v, residual, at, inside, numbers, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """y of a tile."""
    near, scale, shift = numbers
    z = affine(v - near, scale, shift)
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return activate(z, ACTIVATION, SLOPE)


@triton.jit
def channel_numbers(mean, var, weight, bias, slot, inside, eps):
    """What an element needs of its channel, to become (x − near) · scale + shift.

    Near is the mean as a float32, from which x is subtracted exactly where it is near, too; what
    the mean has besides is in the shift.
    """
    near, rest = split(mean)
    scale = inverse_std(var, eps) * parameter(weight, slot, inside, 1.0)
    shift = parameter(bias, slot, inside, 0.0) - rest * scale
    return along(near), along(scale), along(shift)


@triton.jit
def normalize_kernel(
    x,
    residual,
    y,
    weight,
    bias,
    mean,  # given, or None: to be merged from `partial`
    var,
    partial,
    statistics,
    count,
    running_mean,
    running_var,
    counter,
    share_high,
    share_low,
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
    """Each program: the output of its part of its channels.

    In the reverse order of `moments_kernel`: what that read last may still be in the cache.
    """
    channels, inner = sizes(c_units, i_units, UC, UI, WIDE)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    before, outer = group_of(group, outer, all_outer, WIDE)
    skipped = before * channels * inner
    x = moved(x, skipped)
    residual = moved(residual, skipped)
    y = moved(y, skipped)
    eps = double(eps_high, eps_low)
    first_c = block * BC
    channel = first_c + tl.arange(0, BC)
    known = channel < channels
    slot, slots, row = slots_of(group, channel, channels, all_outer)
    if mean is None:
        n, of_batch, m2 = conclude(
            partial,
            block,
            tl.num_programs(0),
            slot,
            known,
            slots,
            row,
            splits,
            statistics,
            count,
            running_mean,
            running_var,
            counter,
            share_high,
            share_low,
            index == 0,
            BC,
            BS,
        )
        var_of = variance(n, m2)
    else:
        of_batch = tl.load(mean + slot, mask=known, other=0.0).to(tl.float64)
        var_of = tl.load(var + slot, mask=known, other=1.0).to(tl.float64)
    numbers = channel_numbers(of_batch, var_of, weight, bias, slot, known, eps)
    o, c, i = axes(BO, BC, BI, WIDE)
    inside_c = within(first_c, c, channels, WIDE)
    offsets = (o * channels + c) * inner + i
    begin = index * per_split
    end = tl.minimum(begin + per_split, tiles)
    for passed in tl.range(0, end - begin, num_stages=STAGES):
        tile = end - 1 - passed
        first_o, first_i = start(tile, tiles_i, BO, BI)
        inside = within(first_o, o, outer, WIDE) & within(first_i, i, inner, WIDE) & inside_c
        at = (first_o * channels + first_c) * inner + first_i + offsets
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        out = finish(v, residual, at, inside, numbers, ACTIVATION, SLOPE)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def whole_tile(first_c, outer, channels, inner, BO, BC, BI, WIDE):
    """Where a tile lies that holds all elements of its channels, and what of it there is.

    Told apart from what is read there: torch.compile takes a kernel to write whatever the place
    that it writes to was computed from.
    """
    o, c, i = axes(BO, BC, BI, WIDE)
    inside = (o < outer) & (i < inner) & within(first_c, c, channels, WIDE)
    return (o * channels + first_c + c) * inner + i, inside


@triton.jit
def whole_moments(x, mask, first_c, outer, channels, inner, BO, BC, BI, RO, RI, WIDE):
    """The elements of such a tile, and their moments."""
    at, inside = whole_tile(first_c, outer, channels, inner, BO, BC, BI, WIDE)
    o, _, i = axes(BO, BC, BI, WIDE)
    inside_oi = (o < outer) & (i < inner)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if mask is None:
        n = tl.zeros([BC], tl.float64) + outer * inner
        weights = tl.where(inside_oi, 1.0, 0.0)
    else:
        weights = weights_at(mask, 0, 0, o, i, inner, inside_oi)
        n = tl.zeros([BC], tl.float64) + tl.sum(weights.to(tl.float64))
    counted = inside & (weights > 0)
    share = weights * along((1.0 / or_one(n)).to(tl.float32))
    # The second mean, of what the first one leaves, has lost nothing to the offset.
    pivot = total(tl.where(counted, v * share, 0.0), RO, RI).to(tl.float32)
    apart = tl.where(counted, v - along(pivot), 0.0)
    shift = total(apart * weights, RO, RI) / or_one(n)
    d = tl.where(counted, apart - along(shift.to(tl.float32)), 0.0)
    m2 = total(d * d * weights, RO, RI)
    if tl.max(tl.where(finite(m2), 0, 1), axis=0) > 0:
        # NaN, infinity, or squares beyond float32: those channels once more, small enough.
        scale = tl.where(finite(m2), 1.0, SMALL)
        d *= along(scale)
        unit = 1.0 / scale.to(tl.float64)
        m2 = total(d * d * weights, RO, RI) * unit * unit
    return v, n, pivot.to(tl.float64) + shift, m2


@triton.jit
def whole_kernel(
    x,
    mask,
    residual,
    y,
    weight,
    bias,
    statistics,
    count,
    running_mean,
    running_var,
    counter,
    share_high,
    share_low,
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
):
    """Moments, running update and output in one launch: x is read once."""
    channels, inner = sizes(c_units, i_units, UC, UI, WIDE)
    block, group = tl.program_id(0), tl.program_id(2)
    before, outer = group_of(group, outer, all_outer, WIDE)
    skipped = before * channels * inner
    x = moved(x, skipped)
    residual = moved(residual, skipped)
    y = moved(y, skipped)
    mask = moved(mask, before * inner)
    first_c = block * BC
    at, inside = whole_tile(first_c, outer, channels, inner, BO, BC, BI, WIDE)
    v, n, mean, m2 = whole_moments(
        x, mask, first_c, outer, channels, inner, BO, BC, BI, RO, RI, WIDE
    )
    channel = first_c + tl.arange(0, BC)
    known = channel < channels
    slot, _slots, row = slots_of(group, channel, channels, all_outer)
    numbers = channel_numbers(
        mean, variance(n, m2), weight, bias, slot, known, double(eps_high, eps_low)
    )
    out = finish(v, residual, at, inside, numbers, ACTIVATION, SLOPE)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    keep(n, mean, m2, slot, known, row, statistics, count)
    if running_mean is not None:
        sound = are_sound(n, mean, m2, running_mean, running_var, known)
        share = double(share_high, share_low)
        take_in(n, mean, m2, channel, sound, running_mean, running_var, share)
        if counter is not None:
            # As `conclude`: alone if a channel here is sound, else by a look at the others.
            if block == 0:
                taken = tl.max(sound.to(tl.int32), axis=0)
                other = block + 1
                while (taken == 0) & (other < tl.num_programs(0)):
                    _, counts, means, squares = whole_moments(
                        x, mask, other * BC, outer, channels, inner, BO, BC, BI, RO, RI, WIDE
                    )
                    there = other * BC + tl.arange(0, BC) < channels
                    sound = are_sound(counts, means, squares, running_mean, running_var, there)
                    taken = tl.max(sound.to(tl.int32), axis=0)
                    other += 1
                tl.store(counter, tl.load(counter) + taken)
