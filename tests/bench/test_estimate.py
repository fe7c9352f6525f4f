import math
import random
import statistics

import pytest

from batchnorm.bench.estimate import (
    PRIOR,
    between,
    estimates,
    geometric_mean,
    interval,
    ratios,
)


def test_ratios_are_taken_round_by_round():
    assert ratios([10.0, 2.0], [1.0, 4.0]) == [10.0, 0.5]
    with pytest.raises(ValueError, match="shorter"):
        ratios([10.0, 2.0], [1.0])


def test_the_value_is_the_median_of_medians_and_not_of_ratios_of_medians():
    # Medians 3, 5 and 400: a process that shared its core for a second does not move it.
    row = [[10.0, 1.0, 3.0], [5.0, 5.0, 4.0], [400.0, 9.0, 500.0]]
    assert [e.value for e in estimates([row])] == pytest.approx([5.0])
    assert [e.value for e in between([[2.0, 8.0]])] == pytest.approx([4.0])


def test_the_formula():
    rows = [[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]]
    spread = statistics.variance(map(math.log, rows[0]))
    first, second = between(rows)
    t, median = 2.447, 1.16  # of 6 degrees of freedom; of three values
    shared = PRIOR * (spread + 0) / 2
    for estimate, own, centre in ((first, spread, 2.0), (second, 0, 3.0)):
        half = t * median * math.sqrt((shared + 2 * own) / (PRIOR + 2) / 3)
        expected = (centre, centre * math.exp(-half), centre * math.exp(half))
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected, rel=1e-3)


def test_what_differs_between_processes_is_in_the_interval_though_rounds_agree():
    apart = [[1.0, 1.01, 0.99] * 5, [1.3, 1.31, 1.29] * 5]
    (found,) = estimates([apart])
    assert found.low < 1.0 < 1.3 < found.high
    # All rounds in one process: nothing is known of others.
    (alone,) = estimates([[apart[0]]])
    assert (alone.low, alone.high) == (0.99, 1.01)


def test_rounds_that_scatter_widen_an_interval_of_processes_that_agree():
    scattered = [[1.0, 2.0, 4.0], [2.0, 1.0, 4.0], [4.0, 2.0, 1.0]]
    (found,) = estimates([scattered])
    assert (found.value, found.low, found.high) == (2.0, 1.0, 4.0)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_intervals_hold_the_truth_as_often_as_they_say(processes):
    draw = random.Random(processes)
    held = tried = 0
    for _ in range(300):
        rows = []
        for _ in range(9):
            # Spreads that differ a little from row to row, and less within a process.
            spread = 0.1 * math.exp(draw.gauss(0, 0.5))
            offsets = [draw.gauss(0, spread) for _ in range(processes)]
            rows.append([[math.exp(o + draw.gauss(0, 0.02)) for _ in range(5)] for o in offsets])
        held += sum(found.low <= 1.0 <= found.high for found in estimates(rows))
        tried += 9
    assert 0.94 < held / tried < 0.99
    # Of one process alone, as all rounds in one process have it, far fewer do.
    alone = estimates([[row[0]] for row in rows])
    assert sum(found.low <= 1.0 <= found.high for found in alone) <= 6


def test_rows_with_fewer_processes_lean_on_the_others():
    short, *_ = between([[2.0], [1.0, 2.0], [1.0, 2.0]])
    assert 0.5 < short.low < 1.0
    assert between([[2.0]])[0].high == math.inf


@pytest.mark.parametrize("n", [6, 7, 15, 31])
def test_the_interval_holds_the_median_with_95_percent_and_is_no_wider(n):
    low, high = interval([float(i) for i in range(n, 0, -1)])
    k = int(low)
    assert high == n + 1 - k

    def miss(k):  # fewer than k values, or more than n − k, below the true median
        return 2 * sum(math.comb(n, heads) for heads in range(k)) / 2**n

    assert miss(k) <= 0.05 < miss(k + 1)


def test_the_interval_of_few_values_is_their_range():
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_geometric_mean():
    assert geometric_mean([1.0, 2.0, 4.0, 8.0]) == pytest.approx(2**1.5)
