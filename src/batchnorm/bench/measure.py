"""From calls to times."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]

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


def rounds(
    calls: Mapping[str, Call],
    number: int,
    *,
    seed: int,
    synchronize: Call = lambda: None,
    loop_s: float = LOOP_S,
    clock: Callable[[], float] | None = None,
) -> dict[str, Times]:
    """Time every call in every round, back to back, in an order drawn anew for each round.

    Whatever else the machine does then meets all of them alike, and divides out of their ratios.

    Args:
        calls: what to time, by name.
        number: how many rounds.
        seed: of the orders.
        synchronize: waits until a device has done what it was given.
        loop_s: how long to call each in a round.
        clock: in seconds; `time.perf_counter`, or `time.process_time`, which leaves out what other
            processes take from a thread.
    """
    clock = clock or time.perf_counter
    loops = {name: _loops(call, synchronize, loop_s, clock) for name, call in calls.items()}
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
                seconds[name].append(_time(calls[name], loops[name], synchronize, clock))
                faults[name].append((_page_faults() - before) / loops[name])
    finally:
        if collects:
            gc.enable()
    return {name: Times(tuple(seconds[name]), tuple(faults[name])) for name in calls}


def _time(call: Call, loops: int, synchronize: Call, clock: Callable[[], float]) -> float:
    synchronize()
    start = clock()
    for _ in range(loops):
        call()
    synchronize()
    return (clock() - start) / loops


def _loops(call: Call, synchronize: Call, loop_s: float, clock: Callable[[], float]) -> int:
    """How many calls fill the time; and a first one or two to warm up."""
    once = _time(call, 1, synchronize, clock)
    if once < loop_s:
        once = min(_time(call, 3, synchronize, clock) for _ in range(2))
    return max(1, math.ceil(loop_s / once))


def _page_faults() -> int:
    """How many pages this process has been given, as far as the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
