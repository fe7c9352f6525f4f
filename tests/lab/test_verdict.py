import math

import numpy as np
import pytest

from batchnorm.errors import ArgumentError
from batchnorm.lab import verdict
from batchnorm.lab.verdict import (
    CONTRADICTED,
    REPRODUCED,
    UNRESOLVED,
    judge,
    judge_shares,
    judge_within,
)


def outcome(differences):
    return judge(differences, [0.0] * len(differences), unit="steps").outcome


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([5, 6, 7, 5, 6, 7, 5, 6], REPRODUCED),
        ([5, 6, 7, 5, 6, 7, 5, -1], REPRODUCED),  # 7 of 8 are enough
        ([5, 6, 7, 5, 6, 7, -1, -1], UNRESOLVED),  # 6 of 8 are not, though the mean is far
        ([5, 6, 7, 5, 6, 7, 5, 0], REPRODUCED),  # a tie counts for neither side
        ([5, 6, 7, 5, 6, 7, 0, 0], UNRESOLVED),
        ([1, 1, 1, 1, 1, 1, 1, 100], UNRESOLVED),  # 8 of 8, but the mean is 1.08 errors away
        ([4, 4, 4], REPRODUCED),  # zero variance
        ([-4, -4, -4], CONTRADICTED),
        ([0, 0, 0], UNRESOLVED),
        ([9], UNRESOLVED),
        ([], UNRESOLVED),
        ([1, 3.1], UNRESOLVED),  # mean 2.05, standard error 1.05: 1.95 of them
        ([1, 2.9], REPRODUCED),  # mean 1.95, standard error 0.95: 2.05 of them
        ([1, 3], UNRESOLVED),  # exactly 2 standard errors is not more than 2
    ],
)
def test_rule_and_its_mirror_image(differences, expected):
    mirror = {REPRODUCED: CONTRADICTED, CONTRADICTED: REPRODUCED, UNRESOLVED: UNRESOLVED}
    assert outcome(differences) == expected
    assert outcome([-d for d in differences]) == mirror[expected]


def test_numbers_and_their_sentence():
    found = judge([100, 120, 140], [50, 60, 100], unit="steps")
    # Differences 50, 60, 40: mean 50, deviation 10, error 10/sqrt(3).
    assert found.differences == (50, 60, 40)
    assert found.mean == 50
    assert found.standard_error == pytest.approx(10 / math.sqrt(3))
    assert (found.right, found.wrong, found.tied, found.needed, found.pairs) == (3, 0, 0, 3, 3)
    # Student's t has 95% within 4.303 standard errors, of 2 degrees of freedom (from a table).
    reach = 4.303 * 10 / math.sqrt(3)
    assert found.interval == pytest.approx((50 - reach, 50 + reach), rel=1e-3)
    assert judge([1], [0], unit="").interval is None
    assert "3 of 3 paired seeds" in found.sentence
    assert "+50 steps with a standard error of 5.8: 8.7 standard errors" in found.sentence


def test_higher_can_be_better():
    assert judge([0.1, 0.2], [0.8, 0.9], unit="", higher_is_better=True).mean == pytest.approx(0.7)
    assert judge([0.1, 0.2], [0.8, 0.9], unit="").outcome == CONTRADICTED


def test_a_limit_is_told_with_the_mean_of_what_was_measured():
    found = judge_within(0.05, [0.01, 0.02, 0.03], unit="relative error")
    # Mean 0.02, standard error 0.01/sqrt(3) = 0.00577; 4.303 of those on either side.
    assert found.outcome == REPRODUCED
    assert found.differences == pytest.approx((0.04, 0.03, 0.02))
    assert (found.estimate, found.span) == ("0.02", "-0.00484 to 0.0448")
    assert found.sentence.endswith(
        "The mean is 0.02 relative error, below the limit of 0.05, with a standard error of "
        "0.0058: 5.2 standard errors, and more than 2 are needed."
    )
    _, margin, interval, _ = found.would_change()
    assert margin == (
        "A mean within ±0.0115 relative error of the limit of 0.05 would be unresolved; here it is "
        "0.02."
    )
    assert interval.startswith("95% confidence interval of the mean (Student's t): -0.00484 to")
    tiny = judge_within(0.05, [1e-17, 2e-17, 3e-17], unit="s")  # below what 0.05 is rounded by
    assert tiny.estimate == "2e-17"
    above = judge_within(0.05, [0.07, 0.08, 0.09], unit="s")
    assert above.outcome == CONTRADICTED
    assert "The mean is 0.08 s, above the limit of 0.05" in above.sentence
    assert "at the limit of 2, with" in judge_within(2, [1, 2, 3], unit="s").sentence
    assert judge_within(2, [1], unit="s").span == ""


def test_shares_are_judged_in_points_and_of_errors_fewer_are_better():
    better = judge_shares([0.5] * 3, [0.75, 0.625, 1.0])
    assert better.differences == (25.0, 12.5, 50.0)
    assert (better.outcome, better.unit) == (REPRODUCED, "points of accuracy")
    fewer = judge_shares([0.5] * 3, [0.75, 0.625, 1.0], errors=True, names=("a", "b"))
    assert fewer.differences == (-25.0, -12.5, -50.0)
    assert (fewer.outcome, fewer.unit) == (CONTRADICTED, "points fewer errors")


def test_censored_runs_count_as_the_horizon():
    found = judge([None, 300, None], [100, None, None], unit="steps", horizon=500)
    assert found.differences == (400, -200, 0)
    assert (found.right, found.wrong, found.tied) == (1, 1, 1)
    assert (found.censored_control, found.censored_treated) == (2, 2)
    with pytest.raises(ArgumentError, match="horizon"):
        judge([None, 3], [1, 2], unit="steps")


def test_an_arm_with_every_run_censored_has_a_bound_and_no_strength():
    names = ("plain", "BatchNorm")
    some = [100, 120, 110]
    never = [None] * 3
    bound = judge(never, some, unit="steps", horizon=500, names=names)
    assert bound.outcome == REPRODUCED
    assert "None of the plain runs got there within 500 steps" in bound.sentence
    assert "+390 steps" in bound.sentence
    assert "lower bound" in bound.sentence
    assert "says nothing about how much seeds differ" in bound.sentence
    against = judge(some, never, unit="steps", horizon=500, names=names)
    assert "None of the BatchNorm runs" in against.sentence
    unclear = judge(never, [100, None, 110], unit="steps", horizon=500, names=names)
    assert "lower bound" not in unclear.sentence
    assert "hangs on where they were stopped" in unclear.sentence
    nothing = judge(never, never, unit="steps", horizon=500, names=names)
    assert nothing.outcome == UNRESOLVED
    assert "no difference to measure" in nothing.sentence
    for found in (bound, against, unclear, nothing):
        assert "standard errors" not in found.sentence
    partly = judge([None, 300, 400], some, unit="steps", horizon=500)
    assert "standard errors" in partly.sentence


def test_few_seeds_come_with_the_rate_of_chance():
    assert judge([1] * 8, [0] * 8, unit="").caveats() == ()
    assert judge([1], [0], unit="").caveats() == ()
    (caveat,) = judge([1] * 3, [0] * 3, unit="").caveats()
    assert caveat.startswith("3 seeds are few")
    assert f"{verdict.false_rate(3):.1%}" in caveat
    assert f"with 8 seeds, in {verdict.false_rate(8):.1%}" in caveat


@pytest.mark.parametrize("control", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_values_that_cannot_be_paired_or_compared(control):
    with pytest.raises(ArgumentError):
        judge(control, [1.0, 2.0], unit="steps")


def test_false_rate_of_two_seeds_is_known_in_closed_form():
    # For two normal draws mean/error is Cauchy, and above 2 both are positive.
    assert verdict.false_rate(2) == pytest.approx(0.5 - math.atan(2) / math.pi, abs=0.002)


def test_a_null_effect_is_unresolved_at_the_rate_that_theory_gives():
    """Derive the rate for 8 seeds another way: enumerate signs, as Student's t for each pattern.

    The signs of null differences are fair coins, independent of their sizes. At most one of the
    eight may be negative, so the rate is the chance of t > 2 in those 9 of 256 patterns.
    """
    sizes = np.abs(np.random.default_rng(1).standard_normal((200_000, 8)))
    rate = 0.0
    for flipped in [None, *range(8)]:
        signs = np.ones(8)
        if flipped is not None:
            signs[flipped] = -1
        values = sizes * signs
        t = values.mean(1) / (values.std(1, ddof=1) / math.sqrt(8))
        rate += (t > 2).mean() / 256
    assert verdict.false_rate(8) == pytest.approx(rate, abs=0.001)
    assert rate < 9 / 256

    draws = np.random.default_rng(2).standard_normal((4000, 8))
    counts = [outcome(list(row)) for row in draws]
    for side in (REPRODUCED, CONTRADICTED):
        # Four standard errors of a binomial share of 4000.
        slack = 4 * math.sqrt(rate * (1 - rate) / len(draws))
        assert counts.count(side) / len(draws) == pytest.approx(rate, abs=slack)


def test_would_change_names_the_margins():
    first, second, interval, third = judge([10] * 7 + [-1], [0] * 8, unit="steps").would_change()
    # Mean 8.625, standard error 1.375, 2.365 of which are on either side.
    assert interval.endswith("(Student's t): +5.37 to +11.9 steps.")
    assert "at most 1 may disagree or tie; here 1 did" in first
    assert "±2.75 steps" in second  # 2 × 11 × sqrt(1/8 × 7/8 × 8/7) / sqrt(8)
    assert f"{verdict.false_rate(8):.1%}" in third


def test_equal_differences_have_no_standard_error_though_their_mean_is_rounded():
    verdict = judge([0.1] * 3, [0.0] * 3, unit="steps")
    assert np.std(verdict.differences) > 0
    assert verdict.standard_error == 0
    assert "every seed gave the same" in verdict.sentence


def test_differences_that_cancel_out_have_a_mean_of_zero():
    found = judge([0.1, 0.2, 0.3, 0.3], [0.2, 0.4, 0.2, 0.1], unit="steps")
    assert np.mean(found.differences) != 0
    assert (found.mean, found.estimate) == (0.0, "+0")


def test_a_distance_of_billions_of_standard_errors_is_not_spelt_out():
    def distance(spread):
        return judge([1.0, 1.0], [0.0, spread], unit="steps").sentence

    assert "more than 1,000 standard errors" in distance(1e-9)
    assert "more than 1,000 standard errors" in distance(1.9e-3)
    assert "665.7 standard errors" in distance(3e-3)  # 0.9985 / 0.0015
