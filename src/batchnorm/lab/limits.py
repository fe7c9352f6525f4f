"""The largest learning rate at which a network still learns, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

ByRate = Mapping[float, Sequence[float]]
"""For each rate, in rising order, a number a seed."""


def largest(values: ByRate, learned: Callable[[float], bool]) -> list[float | None]:
    """Return the largest rate at which each seed learned; None if it never did.

    >>> largest({0.1: [0.9, 0.8], 1.0: [0.95, 0.1]}, lambda accuracy: accuracy >= 0.9)
    [1.0, None]
    """
    seeds = range(len(next(iter(values.values()))))
    return [
        max((rate for rate, found in values.items() if learned(found[i])), default=None)
        for i in seeds
    ]


def below(rates: Sequence[float]) -> float:
    """What a seed that learned at no rate counts as: the grid's next smaller one.

    That is as near as can be to a rate that was tried.

    >>> below([0.01, 0.1, 1.0])
    0.001
    """
    return rates[0] * rates[0] / rates[1]


def decades(limits: Sequence[float | None], rates: Sequence[float]) -> list[float]:
    """Return the limits of seeds as logarithms to base 10, with `below` for those without one."""
    return [math.log10(limit or below(rates)) for limit in limits]


def reach(rates: Sequence[float | None]) -> str:
    """The middle rate (of two, the lower: one that was tried), and the range where there is one.

    >>> reach([0.3, 0.1, None, 1.0]), reach([0.1, 0.1])
    ('0.1 (none–1)', '0.1')
    """
    ordered = sorted(rate or 0.0 for rate in rates)
    low, middle, high = (
        f"{rate:g}" if rate else "none"
        for rate in (ordered[0], statistics.median_low(ordered), ordered[-1])
    )
    return middle if low == high else f"{middle} ({low}–{high})"
