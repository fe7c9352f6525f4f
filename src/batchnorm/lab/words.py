"""Numbers as readers expect them in a sentence."""

from __future__ import annotations

import math


def counted(number: int, noun: str) -> str:
    """Return the number and the noun in its right form.

    >>> counted(1, "seed"), counted(8, "seed")
    ('1 seed', '8 seeds')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def bands(seeds: int) -> str:
    """Return what the lines and bands of a figure are.

    >>> bands(8), bands(1)
    ('Lines: median of 8 seeds; bands: lowest to highest seed.', 'One seed.')
    """
    if seeds == 1:
        return "One seed."
    return f"Lines: median of {counted(seeds, 'seed')}; bands: lowest to highest seed."


def compared(ratio: float, more: str, less: str, same: str) -> str:
    """Say a ratio so that its number is never below one.

    >>> [compared(r, "larger", "smaller", "as large") for r in (0.191, 1.02, 340)]
    ['5.2 times smaller', 'about as large', '340 times larger']
    """
    if not 0 < ratio < math.inf:
        return "not comparable"
    factor = max(ratio, 1 / ratio)
    if factor < 1.05:
        return f"about {same}"
    number = f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"
    return f"{number} times {more if ratio > 1 else less}"


def duration(seconds: float) -> str:
    """Say a time in the unit that suits it.

    >>> duration(8.21), duration(95), duration(7384)
    ('8 s', '1.6 min', '2.1 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
