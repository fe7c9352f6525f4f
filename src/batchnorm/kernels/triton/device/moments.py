"""The first pass of the forward direction: moments of tiles."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.tiles import (
    along,
    axes,
    elements_before,
    finite,
    group_of,
    moved,
    or_one,
    sizes,
    slots_of,
    start,
    total,
    weights_at,
    within,
    within_threads,
)

#: A power of 2 that brings the largest deviations in float32, 2¹²⁹, to where 2²⁰ of their squares
#: can be added: 2⁻⁷⁸ would do for one.
SMALL = tl.constexpr(2.0**-90)

#: In standard deviations; the pivot of ordinary data is a fraction of one away. A choice.
FAR = tl.constexpr(4.0)


@triton.jit
def pivot_of(values, counted, found, RO: tl.constexpr, RI: tl.constexpr):
    """About the mean of the elements of a tile that count: any number near them is right."""
    # Shares before the sum, which might overflow.
    shares = tl.where(counted, values * (1.0 / or_one(found)), 0.0)
    return tl.sum(tl.sum(within_threads(shares, RO, RI), axis=2), axis=0)


@triton.jit
def read_tile(x, tile, first_c, outer, channels, inner, tiles_i, there, offsets, o, i, WIDE):
    """A tile as it lies in memory, if it is there at all."""
    BO: tl.constexpr = o.shape[0]
    BI: tl.constexpr = i.shape[2]
    first_o, first_i = start(tile, tiles_i, BO, BI)
    inside_oi = within(first_o, o, outer, WIDE) & within(first_i, i, inner, WIDE)
    at = (first_o * channels + first_c) * inner + first_i + offsets
    return tl.load(x + at, mask=inside_oi & there, other=0.0)


@triton.jit
def sums_of(
    x,
    mask,
    pivot,
    scale,
    first_c,
    begin,
    end,
    outer,
    channels,
    inner,
    tiles_i,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    RO: tl.constexpr,
    RI: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Σd and Σd² of the tiles from `begin` to before `end`, d = scale · (x − pivot), and the pivot.

    If it is not known: about the mean of the first tile that has an element. Also Σw, with a mask.
    """
    o, c, i = axes(BO, BC, BI, WIDE)
    inside_c = within(first_c, c, channels, WIDE)
    offsets = (o * channels + c) * inner + i
    d_sum = tl.zeros([BO // RO, BC, BI // RI], tl.float32)
    square_sum = tl.zeros([BO // RO, BC, BI // RI], tl.float32)
    weight_sum = tl.zeros([BO, 1, BI], tl.float32)
    seen = tl.full([], 0.0, tl.float32)
    v = read_tile(x, begin, first_c, outer, channels, inner, tiles_i, inside_c, offsets, o, i, WIDE)
    if (mask is None) and (not KNOWN):
        first_o, first_i = start(begin, tiles_i, BO, BI)
        inside = within(first_o, o, outer, WIDE) & within(first_i, i, inner, WIDE) & inside_c
        found = elements_before(begin + 1, tiles_i, outer, inner, BO, BI)
        found -= elements_before(begin, tiles_i, outer, inner, BO, BI)
        pivot = pivot_of(v.to(tl.float32), inside, found.to(tl.float32), RO, RI)
    for tile in tl.range(begin, end, num_stages=STAGES):
        # The next tile is on its way while this one is added up.
        there = inside_c & (tile + 1 + 0 * c < end)
        following = read_tile(
            x, tile + 1, first_c, outer, channels, inner, tiles_i, there, offsets, o, i, WIDE
        )
        first_o, first_i = start(tile, tiles_i, BO, BI)
        inside_oi = within(first_o, o, outer, WIDE) & within(first_i, i, inner, WIDE)
        counted = inside_oi & inside_c
        u = v.to(tl.float32)
        if mask is None:
            d = tl.where(counted, u * along(scale) - along(pivot * scale), 0.0)
            d_sum += within_threads(d, RO, RI)
            square_sum += within_threads(d * d, RO, RI)
        else:
            weights = weights_at(mask, first_o, first_i, o, i, inner, inside_oi)
            counted = counted & (weights > 0)
            if not KNOWN:
                if seen == 0:
                    seen = tl.sum((weights > 0).to(tl.float32))
                    pivot = pivot_of(u, counted, seen, RO, RI)
            d = tl.where(counted, u * along(scale) - along(pivot * scale), 0.0)
            d_sum += within_threads(d * weights, RO, RI)
            square_sum += within_threads(d * d * weights, RO, RI)
            weight_sum += weights
        v = following
    return (
        total(d_sum, 1, 1),
        total(square_sum, 1, 1),
        pivot,
        tl.sum(weight_sum.to(tl.float64)),
    )


@triton.jit
def moments_of(
    x,
    mask,
    first_c,
    begin,
    end,
    outer,
    channels,
    inner,
    tiles_i,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    RO: tl.constexpr,
    RI: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Count, mean and m2 of the tiles from `begin` to before `end`, for BC channels.

    Where the pivot turns out to be more than `FAR` from the mean, or the squares too large for
    float32, the sums are taken once more, from the mean found and small enough. So no more than
    1 + FAR² roundings of Σd² are lost to Σd² − (Σd)²/n, whatever the data are.
    """
    scale = tl.full([BC], 1.0, tl.float32)
    pivot = tl.zeros([BC], tl.float32)
    d_sum, squares, pivot, n = sums_of(
        x, mask, pivot, scale, first_c, begin, end, outer, channels, inner, tiles_i,
        BO, BC, BI, RO, RI, WIDE, STAGES, False,
    )  # fmt: skip
    if mask is None:
        first = elements_before(begin, tiles_i, outer, inner, BO, BI)
        n = (elements_before(end, tiles_i, outer, inner, BO, BI) - first).to(tl.float64)
    # No division for each channel: every thread makes those of all its channels.
    share = 1.0 / or_one(n)
    moved = d_sum * d_sum * share
    again = (moved > FAR * FAR * (squares - moved)) | ~finite(squares)
    if tl.max(tl.where(again, 1, 0), axis=0) > 0:
        # The other channels come out as they were: what one of them holds is nothing to the rest.
        better = (pivot.to(tl.float64) + d_sum * share).to(tl.float32)
        pivot = tl.where(again & finite(better), better, pivot)
        scale = tl.where(finite(squares), 1.0, SMALL)
        d_sum, squares, pivot, _ = sums_of(
            x, mask, pivot, scale, first_c, begin, end, outer, channels, inner, tiles_i,
            BO, BC, BI, RO, RI, WIDE, STAGES, True,
        )  # fmt: skip
    unit = tl.where(scale == 1.0, 1.0, 1.0 / SMALL).to(tl.float64)
    shift = d_sum * unit * share
    n += tl.zeros([BC], tl.float64)
    m2 = squares * unit * unit - n * shift * shift
    # Not maximum, which need not pass NaN on.
    return n, pivot.to(tl.float64) + shift, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def moments_kernel(
    x,
    mask,
    partial,  # (3, groups, channels, splits)
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
):
    """Each program: the moments of its part of its channels, in its group."""
    index = tl.program_id(1)
    first_c = tl.program_id(0) * BC
    tile = index * per_split
    end = tl.minimum(tile + per_split, tiles)
    channels, inner = sizes(c_units, i_units, UC, UI, WIDE)
    before, outer = group_of(tl.program_id(2), outer, all_outer, WIDE)
    x = moved(x, before * channels * inner)
    mask = moved(mask, before * inner)
    n, mean, m2 = moments_of(
        x,
        mask,
        first_c,
        tile,
        end,
        outer,
        channels,
        inner,
        tiles_i,
        BO,
        BC,
        BI,
        RO,
        RI,
        WIDE,
        STAGES,
    )
    c = first_c + tl.arange(0, BC)
    inside = c < channels
    slot, slots, _ = slots_of(tl.program_id(2), c, channels, all_outer)
    stride = tl.num_programs(1).to(tl.int64) * slots
    at = partial + slot.to(tl.int64) * tl.num_programs(1) + index
    tl.store(at, n, mask=inside)
    tl.store(at + stride, mean, mask=inside)
    tl.store(at + 2 * stride, m2, mask=inside)
