"""What all kernels share: where a tile lies, what a channel's numbers are, what an element becomes.

A tensor's memory is (outer, channels, inner), whatever its axes are called: the channels' axis in
the order of memory, all axes before it and all after it. So NCHW has inner = H·W, channels-last and
(N, C) have inner = 1, and one source serves them all by the shape of its tile, [BO, BC, BI]: one
channel and a long run of it, or many channels and one element of each.

Numbers of a channel are float64, numbers of an element float32: the first are few, and the second
are close to memory's speed that way.
"""

# The kernels are Triton's language, which has no types that mypy knows of.

import triton
import triton.language as tl


@triton.jit
def double(high, low):
    """The float64 that came as two float32, all that a kernel can be given."""
    return (tl.full([], 0.0, tl.float64) + high) + low


@triton.jit
def axes(BO: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr, WIDE: tl.constexpr):
    """Indices within a tile, along its three axes."""
    o = tl.arange(0, BO)[:, None, None]
    c = tl.arange(0, BC)[None, :, None]
    i = tl.arange(0, BI)[None, None, :]
    if WIDE:
        # Not returned here: the compiler would go on to the other return, of another type.
        o, c, i = o.to(tl.int64), c.to(tl.int64), i.to(tl.int64)
    return o, c, i


@triton.jit
def sizes(c_units, i_units, UC: tl.constexpr, UI: tl.constexpr, WIDE: tl.constexpr):
    """Channels and inner, which may need 64 bits where their units do not."""
    channels, inner = c_units * UC, i_units * UI
    if WIDE:
        zero = tl.full([], 0, tl.int64)  # a size that is 1 comes as a constant
        channels, inner = (zero + c_units) * UC, (zero + i_units) * UI
    return channels, inner


@triton.jit
def group_of(number, outer, all_outer, WIDE: tl.constexpr):
    """How many rows lie before a group of samples, and how many of `outer` it has.

    The last one may have fewer. All are one group where `all_outer` is None.
    """
    before = tl.full([], 0, tl.int64)
    rows = outer
    if all_outer is not None:
        before += number
        before *= outer
        rows = tl.minimum(all_outer - before, outer)
        if not WIDE:
            rows = rows.to(tl.int32)
    return before, rows


@triton.jit
def moved(pointer, by):
    """A pointer to so many elements behind, if there is one."""
    there = pointer  # one in a statement: Triton 3.6 knows no tuples with None
    if pointer is not None:
        there = pointer + by
    return there


@triton.jit
def slots_of(group, channel, channels, all_outer):
    """Where the numbers of a group's channels stand, how many such there are, and in a row.

    In a row of statistics those of all groups together come behind those of each.
    """
    slot, slots, row = channel, channels, channels
    if all_outer is not None:
        slot, slots = group * channels + channel, tl.num_programs(2) * channels
        row = slots + channels
    return slot, slots, row


@triton.jit
def count_of(count, high, low, group, outer, inner, all_outer):
    """The weight behind a group's statistics, which a mask decides, or the host knows.

    Or which are all of its elements, where there are several.
    """
    n = double(high, low)
    if all_outer is not None:
        n = ((tl.full([], 0, tl.int64) + outer) * inner).to(tl.float64)
    if count is not None:
        n = tl.load(count + (0 if all_outer is None else group))
    return n


@triton.jit
def start(tile, tiles_i, BO: tl.constexpr, BI: tl.constexpr):
    """The first outer and the first inner index of a tile."""
    zero = tl.full([], 0, tl.int64)
    if BI == 1:  # inner is 1 too; said so, or the compiler would not see that channels are dense
        return (zero + tile) * BO, zero
    return (zero + tile // tiles_i) * BO, (zero + tile % tiles_i) * BI


@triton.jit
def within(first, axis, size, WIDE: tl.constexpr):
    """Which indices of an axis there are."""
    if WIDE:
        return first + axis < size
    return first.to(tl.int32) + axis < size


@triton.jit
def elements_before(tile, tiles_i, outer, inner, BO: tl.constexpr, BI: tl.constexpr):
    """How many elements a channel has in the tiles before this one."""
    first_o, first_i = start(tile, tiles_i, BO, BI)
    rows = tl.minimum(first_o, outer)
    more = tl.minimum(outer - rows, BO)
    return rows * inner + more * tl.minimum(first_i, inner)


@triton.jit
def weights_at(mask, first_o, first_i, o, i, inner, inside):
    """The mask's weights, [BO, 1, BI]."""
    at = mask + first_o * inner + first_i
    read = tl.load(at + o * inner + i, mask=inside, other=0)
    if mask.dtype.element_ty.is_floating():
        return read.to(tl.float32)
    return (read != 0).to(tl.float32)


@triton.jit
def finite(values):
    """Neither NaN nor infinite."""
    return tl.abs(values) < float("inf")


@triton.jit
def or_one(count):
    """Of nothing, the mean is 0/1."""
    return tl.where(count > 0, count, 1.0)


@triton.jit
def within_threads(values, RO: tl.constexpr, RI: tl.constexpr):
    """Sums of RO · RI elements that lie in one thread, which costs nothing but the additions."""
    BO: tl.constexpr = values.shape[0]
    BC: tl.constexpr = values.shape[1]
    BI: tl.constexpr = values.shape[2]
    values = tl.reshape(values, (RO, BO // RO, BC, RI, BI // RI))
    return tl.sum(tl.sum(values, axis=3), axis=0)


@triton.jit
def total(values, RO: tl.constexpr, RI: tl.constexpr):
    """Sum of a tile for each of its channels: between threads in float64, which adds no error."""
    few = within_threads(values, RO, RI).to(tl.float64)
    return tl.sum(tl.sum(few, axis=2), axis=0)


@triton.jit
def along(values):
    """One number for each channel, against a tile."""
    return values[None, :, None]


@triton.jit
def inverse_std(var, eps):
    """1/√(var + eps), of float64, as float32: all threads that share a channel compute it."""
    # Not a division by a square root: in float64 they take 100 instructions, and this 15.
    return tl.rsqrt(var + eps).to(tl.float32)


@triton.jit
def split(mean):
    """A float64 as two float32: x minus the first is exact where x is near, then the rest."""
    high = mean.to(tl.float32)
    return high, (mean - high.to(tl.float64)).to(tl.float32)


@triton.jit
def parameter(pointer, slot, inside, default: tl.constexpr):
    """γ or β of channels."""
    if pointer is None:
        found = tl.full(slot.shape, default, tl.float32)
    else:
        found = tl.load(pointer + slot, mask=inside, other=0).to(tl.float32)
    return found


@triton.jit
def as_stored(value, pointer):
    """A float64 in the dtype of the memory that it is for."""
    if pointer.dtype.element_ty == tl.bfloat16:  # the interpreter knows no other way there
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def affine(d, scale, shift):
    """γ·x̂ + β; forward and backward must see the same sign of it, to the last bit."""
    return d * scale + shift


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The fused activation; NaN comes out as NaN."""
    if ACTIVATION == 0:
        return z
    if ACTIVATION == 1:  # not a product: −∞ · 0 is NaN
        return tl.where(z <= 0, 0.0, z)
    return tl.where(z <= 0, z * SLOPE, z)


@triton.jit
def activation_slope(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """`dy` · activation′(z), told from the sign of z or of y; at 0 it is the left one."""
    if ACTIVATION == 0:
        return dy
    if ACTIVATION == 1:
        return tl.where(z <= 0, 0.0, dy)
    return tl.where(z <= 0, dy * SLOPE, dy)
