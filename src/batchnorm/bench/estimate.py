"""From the ratios of rounds, in several processes, to one ratio and how sure it is."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95

#: As if this many further processes had shown how much processes differ; see `between`. Simulated
#: with three processes and nine rows that share half of what moves them, their spreads differing by
#: a factor of e either way: the intervals hold in 96 % of the rows; with one in 98 %, and they are
#: 1.15 times as wide.
PRIOR = 4

#: Student's t that is exceeded by chance in 2.5 %, for PRIOR + P − 1 degrees of freedom, and the
#: standard error of the median of P normal values as a multiple of their mean's.
_T = {1: 2.776, 2: 2.571, 3: 2.447, 4: 2.365, 5: 2.306}
_MEDIAN = {1: 1.0, 2: 1.0, 3: 1.16, 4: 1.09, 5: 1.20}


@dataclass(frozen=True)
class Estimate:
    """A ratio and the interval that holds the true one; up to infinity where nothing is known."""

    value: float
    low: float = 0.0
    high: float = math.inf


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratios round by round.

    >>> ratios([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    [2.0, 3.0, 1.0]
    """
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def estimates(rows: Sequence[Sequence[Sequence[float]]]) -> list[Estimate]:
    """Return what the rounds of several processes say about each of several related rows.

    The value is the median over processes of the median over a process's rounds. Its interval is
    that of `between`, widened to `interval` of all rounds where that reaches further, as it can
    where single rounds differ more than processes do. With one process there is only the latter,
    which says nothing about another process.

    Args:
        rows: the ratios, by row, process and round.
    """
    found = between([[statistics.median(rounds) for rounds in row] for row in rows])
    wide = []
    for row, estimate in zip(rows, found, strict=True):
        low, high = interval(list(itertools.chain.from_iterable(row)))
        if estimate.high < math.inf:
            low, high = min(low, estimate.low), max(high, estimate.high)
        wide.append(Estimate(estimate.value, low, high))
    return wide


def between(rows: Sequence[Sequence[float]]) -> list[Estimate]:
    """Return the median over processes of each row, and how far that of another run may differ.

    A process keeps what it began with: where its memory lies, on which pages, on which core. So its
    rounds agree with each other more than with those of another process, and it is processes that
    must be counted. With y the logarithms of a row's P values and s² their variance:

        v = (PRIOR · mean of s² over the rows + (P − 1) · s²) / (PRIOR + P − 1)
        interval = exp(median of y ± t · c · √(v / P)),  t of Student, PRIOR + P − 1 degrees

    where c is how much less sure a median is than a mean; it is taken because a process that shared
    its core for a second can be off a thousandfold. That is a t interval whose variance leans on
    the other rows, for a few values say little about their own. It assumes that processes differ as
    independent normal logarithms, about as much in one row as in the next, and that they were as
    different from each other as those of another run would be: what lasts longer than a run, such
    as a neighbour on the same hardware, is not in it.

    Args:
        rows: values by row and process. Where no row has two there is no interval.

    >>> [estimate] = between([[1.0, 4.0]])
    >>> round(estimate.value, 6), 0.1 < estimate.low < 1.0, 4.0 < estimate.high < 40.0
    (2.0, True, True)
    """
    logs = [[math.log(value) for value in row] for row in rows]
    spreads = [statistics.variance(row) for row in logs if len(row) > 1]
    found = []
    for row in logs:
        centre, processes = statistics.median(row), len(row)
        if not spreads:
            found.append(Estimate(math.exp(centre)))
            continue
        own = statistics.variance(row) if processes > 1 else 0.0
        degrees = PRIOR + processes - 1
        variance = (PRIOR * statistics.fmean(spreads) + (processes - 1) * own) / degrees
        half = _T[processes] * _MEDIAN[processes] * math.sqrt(variance / processes)
        found.append(Estimate(*(math.exp(centre + step) for step in (0.0, -half, half))))
    return found


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
