"""Moments of parts, merged in a fixed order, and what the running statistics make of them."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.tiles import as_stored, double, finite, or_one

#: As validation.MIN_COUNT: of fewer values there is no unbiased variance.
MIN_COUNT = tl.constexpr(2.0)


@triton.jit
def joined(n, mean, m2, counts, means, squares):
    """Moments with those of more parts, one in each row."""
    more = tl.sum(counts, axis=0)
    # Shares before products: a part that is alone in having elements comes out as it is.
    centre = tl.sum(counts / or_one(more)[None, :] * means, axis=0)
    apart = means - centre[None, :]
    m2 += tl.sum(squares, axis=0) + tl.sum(counts * apart * apart, axis=0)
    delta = centre - mean
    share = more / or_one(n + more)
    return n + more, mean + delta * share, m2 + delta * delta * (n * share)


@triton.jit
def merged(partial, slot, inside, slots, splits, BS: tl.constexpr):
    """Moments of all parts of these channels, always in the same order."""
    n = tl.zeros(slot.shape, tl.float64)
    mean = tl.zeros(slot.shape, tl.float64)
    m2 = tl.zeros(slot.shape, tl.float64)
    # A size that is 1 comes as a constant, which has no methods.
    stride = (tl.full([], 0, tl.int64) + splits) * slots
    for first in range(0, splits, BS):
        s = first + tl.arange(0, BS)
        at = partial + slot.to(tl.int64)[None, :] * splits + s[:, None]
        there = (s < splits)[:, None] & inside[None, :]
        counts = tl.load(at, mask=there, other=0.0)
        means = tl.load(at + stride, mask=there, other=0.0)
        squares = tl.load(at + 2 * stride, mask=there, other=0.0)
        n, mean, m2 = joined(n, mean, m2, counts, means, squares)
    return n, mean, m2


@triton.jit
def are_sound(n, mean, m2, running_mean, running_var, inside):
    """Which channels' statistics the running ones may take in, in the buffers' dtypes."""
    unbiased = m2 / or_one(n - 1.0)
    fits_mean = finite(as_stored(mean, running_mean).to(tl.float64))
    fits_var = finite(as_stored(unbiased, running_var).to(tl.float64))
    return inside & fits_mean & fits_var & (n >= MIN_COUNT)


@triton.jit
def take_in(n, mean, m2, c, sound, running_mean, running_var, share):
    """(1 − share) · running + share · batch, with the unbiased variance, where that is sound."""
    for_mean, for_var = running_mean + c, running_var + c
    unbiased = m2 / or_one(n - 1.0)
    old_mean = tl.load(for_mean, mask=sound, other=0.0).to(tl.float64)
    old_var = tl.load(for_var, mask=sound, other=0.0).to(tl.float64)
    new_mean = (1.0 - share) * old_mean + share * mean
    new_var = (1.0 - share) * old_var + share * unbiased
    tl.store(for_mean, as_stored(new_mean, running_mean), mask=sound)
    tl.store(for_var, as_stored(new_var, running_var), mask=sound)


@triton.jit
def variance(n, m2):
    """The biased one; 1 where nothing counts, so that what is normalised by it stays in range."""
    return tl.where(n > 0, m2 / or_one(n), 1.0)


@triton.jit
def keep(n, mean, m2, slot, inside, row, statistics, count):
    """Write mean and biased variance, (2, row), and the count where it is not known."""
    tl.store(statistics + slot, mean, mask=inside)
    tl.store(statistics + row + slot, variance(n, m2), mask=inside)
    if count is not None:
        tl.store(count + slot, n, mask=inside & (slot == 0))


@triton.jit
def conclude(
    partial,
    block,
    blocks,
    slot,
    inside,
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
    writes,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Moments of a block of channels from its parts; one program for each block writes them.

    Running statistics are given only where there is one group. The counter counts a batch that any
    channel has taken in. The program of the first block looks at its own, and only if all of those
    refuse at the others': so no program waits for another.
    """
    n, mean, m2 = merged(partial, slot, inside, slots, splits, BS)
    if writes:
        keep(n, mean, m2, slot, inside, row, statistics, count)
        if running_mean is not None:
            sound = are_sound(n, mean, m2, running_mean, running_var, inside)
            share = double(share_high, share_low)
            take_in(n, mean, m2, slot, sound, running_mean, running_var, share)
            if counter is not None:
                if block == 0:
                    taken = tl.max(sound.to(tl.int32), axis=0)
                    other = block + 1
                    while (taken == 0) & (other < blocks):
                        there = other * BC + tl.arange(0, BC)
                        found = there < slots
                        counts, means, squares = merged(partial, there, found, slots, splits, BS)
                        sound = are_sound(counts, means, squares, running_mean, running_var, found)
                        taken = tl.max(sound.to(tl.int32), axis=0)
                        other += 1
                    tl.store(counter, tl.load(counter) + taken)
    return n, mean, m2


@triton.jit
def finish_kernel(
    partial,
    statistics,
    count,
    running_mean,
    running_var,
    counter,
    share_high,
    share_low,
    slots,
    row,
    splits,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Merge alone, where there are too many parts for each program of the next pass to do it.

    Where there are groups, their channels are one after the other here, and none knows its group.
    """
    slot = tl.program_id(0) * BC + tl.arange(0, BC)
    conclude(
        partial,
        tl.program_id(0),
        tl.num_programs(0),
        slot,
        slot < slots,
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
        True,
        BC,
        BS,
    )


@triton.jit
def pool_kernel(
    statistics,
    counts,  # of each group, or None: all its elements
    total,
    channels,
    groups,
    outer,
    all_outer,
    inner,
    BC: tl.constexpr,
    BG: tl.constexpr,
):
    """Moments of all groups together, behind those of each; and their count."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    slots = (tl.full([], 0, tl.int64) + groups) * channels
    n = tl.zeros([BC], tl.float64)
    mean = tl.zeros([BC], tl.float64)
    m2 = tl.zeros([BC], tl.float64)
    for first in range(0, groups, BG):
        g = first + tl.arange(0, BG)
        there = (g < groups)[:, None] & inside[None, :]
        at = statistics + g.to(tl.int64)[:, None] * channels + c[None, :]
        if counts is None:
            rest = all_outer - g.to(tl.int64) * outer  # the last group may have fewer
            weights = (tl.maximum(tl.minimum(rest, outer), 0) * inner).to(tl.float64)
        else:
            weights = tl.load(counts + g, mask=g < groups, other=0.0)
        weights = tl.where(there, weights[:, None], 0.0)
        means = tl.load(at, mask=there, other=0.0)
        squares = tl.load(at + slots + channels, mask=there, other=0.0) * weights
        n, mean, m2 = joined(n, mean, m2, weights, means, squares)
    keep(n, mean, m2, c, inside, slots + channels, statistics + slots, total)


@triton.jit
def update_kernel(
    mean,
    var,
    count,
    known_high,
    known_low,
    running_mean,
    running_var,
    counter,
    share_high,
    share_low,
    channels,
    TOGETHER: tl.constexpr,
    BC: tl.constexpr,
):
    """The running update alone, by one program; `TOGETHER`: a plain average, of all or none."""
    n = double(known_high, known_low)
    if count is not None:
        n = tl.load(count)
    n += tl.zeros([BC], tl.float64)
    share = double(share_high, share_low)
    if TOGETHER:
        share = 1.0 / (tl.load(counter) + 1).to(tl.float64)
    refused = tl.full([], 0, tl.int32)
    taken = tl.full([], 0, tl.int32)
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        inside = c < channels
        m2 = tl.load(var + c, mask=inside, other=0.0) * n
        means = tl.load(mean + c, mask=inside, other=0.0)
        sound = are_sound(n, means, m2, running_mean, running_var, inside)
        taken = tl.maximum(taken, tl.max(sound.to(tl.int32), axis=0))
        refused = tl.maximum(refused, tl.max((inside & ~sound).to(tl.int32), axis=0))
    if TOGETHER:
        taken = taken * (1 - refused)
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        inside = (c < channels) & (taken + 0 * c > 0)
        m2 = tl.load(var + c, mask=inside, other=0.0) * n
        means = tl.load(mean + c, mask=inside, other=0.0)
        sound = are_sound(n, means, m2, running_mean, running_var, inside)
        take_in(n, means, m2, c, sound, running_mean, running_var, share)
    if counter is not None:
        tl.store(counter, tl.load(counter) + taken)
