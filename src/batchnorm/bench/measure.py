"""From calls to times."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]

Stopwatch = Callable[[Call, int], float]
"""Seconds that so many calls take, one after the other."""

#: Seconds that a contender is called for in a round, once at least: some ten thousand ticks of the
#: clock, and long against an interrupt.
LOOP_S = 2e-3


@dataclass(frozen=True)
class Times:
    """What the rounds gave: in each, seconds per call and page faults per call."""

    seconds: tuple[float, ...]
    faults: tuple[float, ...]

    @property
    def us(self) -> float:
        """Median time of a call in microseconds."""
        return statistics.median(self.seconds) * 1e6

    def of_one(self, calls: int) -> Times:
        """Return the times of one, where what was called made so many calls."""
        return Times(tuple(s / calls for s in self.seconds), tuple(f / calls for f in self.faults))


def rounds(
    calls: Mapping[str, Call],
    number: int,
    *,
    seed: int,
    loop_s: float = LOOP_S,
    clock: Callable[[], float] | None = None,
    stopwatch: Stopwatch | None = None,
    around: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> dict[str, Times]:
    """Time every call in every round, back to back, in an order drawn anew for each round.

    Whatever else the machine does then meets all of them alike, and divides out of their ratios.

    Args:
        calls: what to time, by name.
        number: how many rounds.
        seed: of the orders.
        loop_s: how long to call each in a round.
        clock: in seconds; `time.perf_counter`, or `time.process_time`, which leaves out what other
            processes take from a thread.
        stopwatch: what times calls instead of the clock, such as a device's own.
        around: what to enter before the calls of that name are timed.
    """
    clocked = stopwatch or wall(clock or time.perf_counter)
    loops = {}
    for name, call in calls.items():
        with around(name):
            loops[name] = _loops(call, clocked, loop_s)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(seed).shuffle  # noqa: S311 - an order, not a secret
    collects = gc.isenabled()
    gc.disable()  # it would strike one contender for what another left behind
    try:
        for _ in range(number):
            order = list(calls)
            shuffle(order)
            for name in order:
                before = _page_faults()
                with around(name):
                    seconds[name].append(clocked(calls[name], loops[name]) / loops[name])
                faults[name].append((_page_faults() - before) / loops[name])
    finally:
        if collects:
            gc.enable()
    return {name: Times(tuple(seconds[name]), tuple(faults[name])) for name in calls}


def wall(clock: Callable[[], float]) -> Stopwatch:
    """Return what times calls by a clock of the processor."""

    def timed(call: Call, loops: int) -> float:
        start = clock()
        for _ in range(loops):
            call()
        return clock() - start

    return timed


def _loops(call: Call, stopwatch: Stopwatch, loop_s: float) -> int:
    """How many calls fill the time; and a first one or two to warm up."""
    once = stopwatch(call, 1)
    if once < loop_s:
        once = min(stopwatch(call, 3) / 3 for _ in range(2))
    return max(1, math.ceil(loop_s / once))


def _page_faults() -> int:
    """How many pages this process has been given, as far as the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
