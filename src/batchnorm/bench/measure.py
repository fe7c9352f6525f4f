"""From calls to times, and from times to ratios."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Call = Callable[[], object]

#: Seconds that a contender is called for in a round, once at least: some ten thousand ticks of the
#: clock, and long against an interrupt.
LOOP_S = 2e-3

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Times:
    """What the rounds gave: in each, seconds per call and page faults per call."""

    seconds: tuple[float, ...]
    faults: tuple[float, ...]

    @property
    def us(self) -> float:
        """Median time of a call in microseconds."""
        return statistics.median(self.seconds) * 1e6


@dataclass(frozen=True)
class Estimate:
    """A median over rounds and the interval that holds the true one."""

    value: float
    low: float
    high: float


def rounds(
    calls: Mapping[str, Call],
    number: int,
    *,
    seed: int,
    synchronize: Call = lambda: None,
    loop_s: float = LOOP_S,
) -> dict[str, Times]:
    """Time every call in every round, back to back, in an order drawn anew for each round.

    Whatever else the machine does then meets all of them alike, and divides out of their ratios.

    Args:
        calls: what to time, by name.
        number: how many rounds.
        seed: of the orders.
        synchronize: waits until a device has done what it was given.
        loop_s: how long to call each in a round.
    """
    loops = {name: _loops(call, synchronize, loop_s) for name, call in calls.items()}
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
                seconds[name].append(_time(calls[name], loops[name], synchronize))
                faults[name].append((_page_faults() - before) / loops[name])
    finally:
        if collects:
            gc.enable()
    return {name: Times(tuple(seconds[name]), tuple(faults[name])) for name in calls}


def _time(call: Call, loops: int, synchronize: Call) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(loops):
        call()
    synchronize()
    return (time.perf_counter() - start) / loops


def _loops(call: Call, synchronize: Call, loop_s: float) -> int:
    """How many calls fill the time; and a first one or two to warm up."""
    once = _time(call, 1, synchronize)
    if once < loop_s:
        once = min(_time(call, 3, synchronize) for _ in range(3))
    return max(1, math.ceil(loop_s / once))


def _page_faults() -> int:
    """How many pages this process has been given, as far as the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return the median of the ratios round by round, not the ratio of two medians.

    >>> paired([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    Estimate(value=2.0, low=1.0, high=3.0)
    """
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return Estimate(statistics.median(ratios), *interval(ratios))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return two of the values that hold the true median between them, with 95 % confidence.

    Each value falls below the true median like a coin. So the k-th from either end are the bounds
    for the largest k with P(fewer than k heads) <= 2.5 %, however the values are distributed. Below
    six values there is no such k, and the lowest and highest are less sure than that.

    >>> interval([float(i) for i in range(1, 16)])
    (4.0, 12.0)
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    for heads in range(n):
        tail += math.comb(n, heads) / 2**n
        if tail > (1 - CONFIDENCE) / 2:
            break
        k = heads + 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def geometric_mean(values: Sequence[float]) -> float:
    """Return the mean of factors: 2 and ½ make 1.

    >>> geometric_mean([2.0, 0.5])
    1.0
    """
    return math.exp(math.fsum(map(math.log, values)) / len(values))
