"""How a tensor is cut up: shapes of tiles, how many programs, one launch or several.

All of it depends on shape and dtype alone, so that the same input gives the same bits on every GPU
of a kind. No number here has been measured yet: each says what it is derived from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

#: Bytes that a thread reads of a tile: four loads of 16. Where memory is not aligned for those, at
#: most 16 loads: each needs an address and a comparison of its own, and 32 of them 230 registers.
#: So a thread has 32 to 130 for aligned data, and 4 or more programs of 4 warps share a
#: multiprocessor (tests/kernels/triton_code/test_ptx.py looks).
PER_THREAD = 64
LOADS = 16
WARPS = 4

#: Elements of a channel that one program may hold at once, with as many warps as a thread's part
#: asks for. Where there are programs enough, each takes more than a few elements.
WHOLE = 8192
MOST_WARPS = 16
FEW = 1024

#: Programs of a pass: 32 for each of 132 multiprocessors, of which 4 to 12 are there at a time. The
#: last ones run while others idle, so the more there are the less that costs; and each has a start
#: and partial sums of its own.
PROGRAMS = 4224

#: One in so many of a pass's bytes may be a partial sum's: 24 for each channel of a program.
OVERHEAD = 20
PARTIAL = 24

#: Bytes that all programs of a second pass may read from the second-level cache, each merging the
#: parts for itself: one or two microseconds' worth, and a launch that merges takes longer.
FOLD = 8 << 20
#: And channels of such a program: of more, the merge takes registers from all that follows (168
#: instead of 80 at 64 channels).
FOLDED = 4

#: How many numbers of each kind a program of the second pass reads at once to merge them: 8 of
#: float64 a thread.
PARTS = 1024

#: The same of a launch that only merges, a program for each channel; as many of a thread.
MERGED_PARTS = 2048

#: Tiles of a program whose loads are in flight: one of 8 KB, with 4 programs on a multiprocessor,
#: makes 32 KB; at 3.35 TB/s and 700 ns 18 KB must be. More would need shared memory.
STAGES = 1

#: A run of memory that is worth a request of its own: a line of the cache; and the least, a sector.
LINE = 128
SECTOR = 32

#: Below this part of lanes at work a shorter tile is tried.
FULL = 0.87


@dataclass(frozen=True)
class Arrangement:
    """A tensor's memory as (outer, channels, inner), and its axes in the order of memory."""

    outer: int
    channels: int
    inner: int
    order: tuple[int, ...]


@lru_cache(maxsize=1024)
def arrangement(shape: Sequence[int], strides: Sequence[int], channel: int) -> Arrangement | None:
    """How a tensor lies in memory; None if there are gaps or overlaps."""
    # Of equal strides one axis has the size 1, and may stand on either side.
    order = tuple(sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis)))
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != expected:
            return None
        expected *= shape[axis]
    place = order.index(channel)
    outer = inner = 1
    for axis in order[:place]:
        outer *= shape[axis]
    for axis in order[place + 1 :]:
        inner *= shape[axis]
    return Arrangement(outer, shape[channel], inner, order)


@dataclass(frozen=True)
class Plan:
    """One way to cut (outer, channels, inner), or each of several groups of that shape.

    What follows from it is asked in each call, and kept.

    Attributes:
        shape: outer, of a group and of all, or None if that is one; channels and inner in units.
        whole: a program holds all elements of its channels.
        tile: outer, channels and inner of a tile, powers of 2.
        units: powers of 2 that divide channels and inner, of which the kernels are to know.
        wide: indices within a tile need 64 bits.
        warps: of a program.
        loads: how many each thread makes of a tile.
        blocks: blocks of channels.
        tiles_i: tiles along inner.
        tiles: tiles of a block in all.
        per_split: tiles of a program.
        splits: programs of a block.
        groups: how many there are.
    """

    shape: tuple[int, int | None, int, int]
    whole: bool
    tile: tuple[int, int, int]
    units: tuple[int, int]
    wide: bool
    warps: int
    loads: int
    blocks: int
    tiles_i: int
    tiles: int
    per_split: int
    splits: int
    groups: int

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """The programs of a pass."""
        return self.blocks, self.splits, self.groups

    @cached_property
    def passes(self) -> tuple[int, int, int]:
        """What the kernels of two passes are told besides the shape."""
        return self.tiles_i, self.tiles, self.per_split

    @cached_property
    def constants(self) -> tuple[Any, ...]:
        """What every kernel is compiled for: UC, UI, BO, BC, BI, RO, RI, WIDE, STAGES."""
        return *self.units, *self.tile, *self.in_threads, self.wide, STAGES

    @property
    def in_threads(self) -> tuple[int, int]:
        """Into how many parts a tile is cut along outer and inner, each a load of every thread."""
        rows, _, run = self.tile
        return (1, min(self.loads, run)) if rows == 1 else (min(self.loads, rows), 1)

    @cached_property
    def folds(self) -> bool:
        """Whether each program of the second pass merges the parts by itself."""
        of_program = self.splits * self.tile[1] * PARTIAL
        programs = self.groups * self.blocks * self.splits
        return self.tile[1] <= FOLDED and programs * of_program <= FOLD

    @cached_property
    def parts(self) -> int:
        """How many parts a program of the second pass reads at once."""
        return min(power_of_two(self.splits), max(1, PARTS // self.tile[1]))

    @cached_property
    def merged_parts(self) -> int:
        """How many parts a launch that only merges reads at once."""
        return min(power_of_two(self.splits), MERGED_PARTS)

    @cached_property
    def merging_warps(self) -> int:
        """Warps of a program that only merges."""
        return max(1, self.merged_parts // (32 * 8))


@lru_cache(maxsize=1024)
def plan(
    outer: int, channels: int, inner: int, itemsize: int, all_outer: int | None = None
) -> Plan:
    """The way to cut this tensor, or each group of one that has more rows in all."""
    groups = 1 if all_outer is None else -(-all_outer // outer)
    # The largest power of 2 that divides what is dense, as far as a load of 16 bytes can use it.
    dense = channels if inner == 1 else inner
    width = min(dense & -dense, 16 // itemsize)
    units = (width, 1) if inner == 1 else (1, width)
    per_thread = min(PER_THREAD // itemsize, LOADS * width)

    def cut(tile: tuple[int, int, int], *, whole: bool, per_split: int = 1) -> Plan:
        size = _size(tile)
        warps = max(1, min(MOST_WARPS, size // (32 * per_thread)))
        loads = max(1, size // (32 * warps * width))
        blocks, tiles_i = -(-channels // tile[1]), -(-inner // tile[2])
        tiles = -(-outer // tile[0]) * tiles_i
        per_split = max(per_split, -(-tiles * blocks * groups // PROGRAMS))
        splits = -(-tiles // per_split)
        wide = _wide(outer, channels, inner, tile)
        cuts = blocks, tiles_i, tiles, per_split, splits, groups
        shape = outer, all_outer, channels // units[0], inner // units[1]
        return Plan(shape, whole, tile, units, wide, warps, loads, *cuts)

    tile = _whole_tile(outer, channels, inner, itemsize, groups)
    if tile is not None:
        return cut(tile, whole=True)
    tile = _tile(outer, channels, inner, itemsize, 32 * WARPS * per_thread)
    least = -(-OVERHEAD * PARTIAL * tile[1] // (_size(tile) * itemsize))
    return cut(tile, whole=False, per_split=least)


def power_of_two(size: int) -> int:
    """The least one that is no smaller."""
    return 1 << (size - 1).bit_length()


def _size(tile: tuple[int, int, int]) -> int:
    return tile[0] * tile[1] * tile[2]


def _wide(outer: int, channels: int, inner: int, tile: tuple[int, int, int]) -> bool:
    rows, _, run = tile
    return max(outer + rows, inner + run, rows * channels * inner) >= 2**31


def _whole_tile(
    outer: int, channels: int, inner: int, itemsize: int, groups: int
) -> tuple[int, int, int] | None:
    rows, run = power_of_two(outer), power_of_two(inner)
    # Neighbours in memory that a program should read together.
    together = max(1, SECTOR // (itemsize * run)) if inner * itemsize < SECTOR else 1
    block = min(power_of_two(channels), together)
    if rows * block * run > WHOLE:
        return None
    most = channels if together > 1 else FOLDED
    while rows * block * run < FEW and groups * channels // (2 * block) >= PROGRAMS // 4:
        if 2 * block > most:
            break
        block *= 2
    return rows, block, run


def _tile(
    outer: int, channels: int, inner: int, itemsize: int, elements: int
) -> tuple[int, int, int]:
    if inner * itemsize < SECTOR:
        run = power_of_two(inner)
        block = min(power_of_two(channels), max(1, LINE // (itemsize * run)))
    else:
        run, block = _run(inner, itemsize, elements), 1
    rows = min(power_of_two(outer), max(1, elements // (block * run)))
    # Few rows: more channels, for a quarter of a tile at least.
    block = min(power_of_two(channels), max(block, elements // 4 // (rows * run)))
    return rows, block, run


def _run(inner: int, itemsize: int, most: int) -> int:
    """The longest part of a run of which few lanes are wasted."""
    longest = min(power_of_two(inner), most)
    candidates = [longest]
    while candidates[-1] * itemsize > LINE:
        candidates.append(candidates[-1] // 2)

    def used(run: int) -> float:
        return inner / (-(-inner // run) * run)

    for run in candidates:
        if used(run) >= FULL:
            return run
    return max(candidates, key=lambda run: (used(run), run))
