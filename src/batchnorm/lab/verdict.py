"""The verdict rule, the same for every claim.

*Reproduced*: at least 7/8 of the paired seeds (rounded up) go the claim's way, and the mean paired
difference is more than 2 standard errors above zero. *Contradicted*: the mirror image. Anything
else is *unresolved*, and published all the same.

The special cases, decided once:

- A tie (difference zero) counts for neither side, but still counts among the seeds.
- A run that never reached its threshold is censored: `None`, counted as the horizon. A pair with
  both sides censored is a tie. An arm with every run censored makes the mean difference a bound
  and its standard error no measure of seeds; the rule is applied all the same, and the sentence
  says so.
- Differences that are all equal have a standard error of zero; any mean but zero is then further
  than 2 of them away, and the sign rule decides.
- Fewer than two pairs have no standard error: unresolved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from batchnorm.errors import ArgumentError
from batchnorm.lab.words import counted

REPRODUCED = "reproduced"
CONTRADICTED = "contradicted"
UNRESOLVED = "unresolved"

STANDARD_ERRORS = 2.0

# 2 million normal draws estimate a rate of 2% from 8 seeds to ±0.03 points, in about 50 ms.
NULL_DRAWS = 2_000_000

# Differences that cancel out leave a mean of their own rounding, 1e-16 of them; no seeds are so
# exact that a mean of this part of the largest one is anything else.
ROUNDING = 1e-12

# With fewer, the rule is so easily met by chance that the reader must be told how easily.
ENOUGH_SEEDS = 8


@dataclass(frozen=True)
class Verdict:
    """The outcome, the numbers that it follows from, and both in one sentence.

    `false_rate` is how often the rule gives *reproduced* when there is no effect at all, with this
    many seeds and normally distributed differences. With a `limit` the differences are from what
    was measured up to it, and `measured` is the mean of that.
    """

    outcome: str
    sentence: str
    unit: str
    differences: tuple[float, ...]
    mean: float
    standard_error: float | None
    right: int
    wrong: int
    tied: int
    needed: int
    censored_control: int
    censored_treated: int
    false_rate: float
    limit: float | None = None
    measured: float | None = None

    @property
    def pairs(self) -> int:
        """The number of paired seeds."""
        return len(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95% confidence interval of the mean difference; None for fewer than two pairs.

        It is a little wider than the rule's 2 standard errors where there are few seeds: the rule
        asks seeds to agree, besides.
        """
        if self.standard_error is None:
            return None
        reach = float(stats.t.ppf(0.975, self.pairs - 1)) * self.standard_error
        return self.mean - reach, self.mean + reach

    @property
    def estimate(self) -> str:
        """The mean difference, signed; with a limit, the mean of what was measured."""
        return f"{self.mean:+.3g}" if self.measured is None else f"{self.measured:.3g}"

    @property
    def span(self) -> str:
        """The interval of the estimate, in words; empty if there is none."""
        if self.interval is None:
            return ""
        low, high = self.interval
        if self.measured is None:
            return f"{low:+.3g} to {high:+.3g}"
        reach = (high - low) / 2
        return f"{self.measured - reach:.3g} to {self.measured + reach:.3g}"

    @property
    def bound(self) -> bool:
        """Whether an arm never got there, so that the mean difference is no more than a bound."""
        return self.pairs in (self.censored_control, self.censored_treated) and self.pairs > 0

    def would_change(self) -> tuple[str, ...]:
        """Say what results, with these seeds, would have made the outcome another one."""
        if self.standard_error is None:
            return ("At least 2 seeds are needed for any verdict.",)
        what, origin = "mean difference", "zero"
        if self.limit is not None:
            what, origin = "mean", f"the limit of {self.limit:g}"
        return (
            f"With {self.pairs} seeds at most {self.pairs - self.needed} may disagree or tie; here "
            f"{self.pairs - max(self.right, self.wrong)} did.",
            f"A {what} within ±{STANDARD_ERRORS * self.standard_error:.3g} {self.unit} of {origin} "
            f"would be unresolved; here it is {self.estimate}.",
            f"95% confidence interval of the {what} (Student's t): {self.span} {self.unit}.",
            "If there were no effect at all, and seeds differed as normal draws do, the rule would "
            f"still say “reproduced” in {self.false_rate:.1%} of repetitions with {self.pairs} "
            "seeds.",
        )

    def caveats(self) -> tuple[str, ...]:
        """Return what must stand beside the outcome: how easily so few seeds agree by chance."""
        if not 2 <= self.pairs < ENOUGH_SEEDS:
            return ()
        return (
            f"{self.pairs} seeds are few: with no effect at all the rule would still say "
            f"“reproduced” in {self.false_rate:.1%} of repetitions; with {ENOUGH_SEEDS} seeds, in "
            f"{false_rate(ENOUGH_SEEDS):.1%}.",
        )


def needed(pairs: int) -> int:
    """Return how many of `pairs` seeds must agree: 7/8 of them, rounded up.

    >>> [needed(n) for n in (2, 7, 8, 9, 16)]
    [2, 7, 7, 8, 14]
    """
    return -(-7 * pairs // 8)


def judge(
    control: Sequence[float | None],
    treated: Sequence[float | None],
    *,
    unit: str,
    horizon: float | None = None,
    higher_is_better: bool = False,
    names: tuple[str, str] = ("control", "treated"),
) -> Verdict:
    """Judge the claim that `treated` is better than `control`, paired by position.

    Args:
        control: One value a seed, without the treatment; None where the run was censored.
        treated: The same seeds in the same order, with the treatment.
        unit: What the values count, for the sentence ("steps").
        horizon: The value that stands for a censored run.
        higher_is_better: Whether a larger value is the better one.
        names: What the sentence calls the two.

    Raises:
        ArgumentError: The two differ in length, a value is not finite, or a run is censored and
            there is no horizon.
    """
    return _judge(control, treated, unit, names, horizon, higher_is_better)


def judge_within(limit: float, values: Sequence[float], *, unit: str) -> Verdict:
    """Judge the claim that something is below a limit that was chosen beforehand.

    As `judge` does: the mean must be below it by more than 2 standard errors, and so must 7/8 of
    the seeds be.

    >>> found = judge_within(0.05, [0.01, 0.02, 0.03], unit="relative error")
    >>> found.outcome, found.estimate, found.span
    ('reproduced', '0.02', '-0.00484 to 0.0448')
    """
    return _judge([limit] * len(values), values, unit, ("limit", "measured"), limit=limit)


def _judge(
    control: Sequence[float | None],
    treated: Sequence[float | None],
    unit: str,
    names: tuple[str, str],
    horizon: float | None = None,
    higher_is_better: bool = False,
    limit: float | None = None,
) -> Verdict:
    if len(control) != len(treated):
        raise ArgumentError(
            f"Paired seeds need one control for each treated run; got {len(control)} and "
            f"{len(treated)}."
        )
    gain = np.subtract(_filled(control, horizon), _filled(treated, horizon))
    differences = -gain if higher_is_better else gain
    pairs = len(differences)
    mean = float(differences.mean()) if pairs else 0.0
    if pairs and abs(mean) < ROUNDING * float(np.abs(differences).max()):
        mean = 0.0
    error = float(differences.std(ddof=1) / math.sqrt(pairs)) if pairs > 1 else None
    if error and not np.ptp(differences):
        error = 0.0  # but for the rounding of their mean
    counts = {
        "right": int((differences > 0).sum()),
        "wrong": int((differences < 0).sum()),
        "tied": int((differences == 0).sum()),
    }
    censored = [sum(value is None for value in values) for values in (control, treated)]
    arms = dict(zip(names, censored, strict=True))
    measured = None if limit is None else float(np.mean(_filled(treated, horizon)))
    outcome = {1: REPRODUCED, -1: CONTRADICTED, 0: UNRESOLVED}[int(_direction(differences))]
    return Verdict(
        outcome=outcome,
        sentence=_sentence(unit, pairs, mean, error, counts, horizon, arms, limit, measured),
        unit=unit,
        differences=tuple(float(d) for d in differences),
        mean=mean,
        standard_error=error,
        needed=needed(pairs),
        censored_control=censored[0],
        censored_treated=censored[1],
        false_rate=false_rate(pairs),
        limit=limit,
        measured=measured,
        **counts,
    )


def judge_shares(
    control: Sequence[float],
    treated: Sequence[float],
    *,
    errors: bool = False,
    names: tuple[str, str] = ("control", "treated"),
) -> Verdict:
    """Judge shares of the test rows, in percentage points; the fewer errors the better.

    >>> judge_shares([0.75, 0.75], [0.5, 0.25], errors=True).differences
    (25.0, 50.0)
    """
    return judge(
        *([100 * share for share in shares] for shares in (control, treated)),
        unit="points fewer errors" if errors else "points of accuracy",
        higher_is_better=not errors,
        names=names,
    )


@functools.cache
def false_rate(pairs: int) -> float:
    """Return how often no effect at all would be called reproduced (as often, contradicted).

    Estimated with a fixed seed for differences that are normal around zero, through the very rule
    that `judge` applies.

    >>> round(false_rate(8), 2)  # the sign rule alone allows 9/256 = 0.035
    0.02
    """
    if pairs < 2:
        return 0.0
    draws = np.random.default_rng(0).standard_normal((NULL_DRAWS // pairs, pairs))
    return float((_direction(draws) == 1).mean())


def _direction(differences: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Apply the rule along the last axis: 1 the claim's way, -1 against it, 0 neither."""
    pairs = differences.shape[-1]
    if pairs < 2:
        return np.zeros(differences.shape[:-1], dtype=int)
    mean = differences.mean(-1)
    far = STANDARD_ERRORS * differences.std(-1, ddof=1) / math.sqrt(pairs)
    up = ((differences > 0).sum(-1) >= needed(pairs)) & (mean > far)
    down = ((differences < 0).sum(-1) >= needed(pairs)) & (mean < -far)
    direction: npt.NDArray[Any] = up.astype(int) - down.astype(int)
    return direction


def _filled(values: Sequence[float | None], horizon: float | None) -> npt.NDArray[np.float64]:
    if horizon is None and None in values:
        raise ArgumentError(
            "A run is censored (None), so a horizon is needed to stand for its value; got "
            "horizon=None."
        )
    filled = np.array([horizon if value is None else value for value in values], dtype=np.float64)
    if not np.isfinite(filled).all():
        raise ArgumentError(
            "Every value must be a finite number, or None for a run that never got there; "
            f"got {list(values)}."
        )
    return filled


def _sentence(
    unit: str,
    pairs: int,
    mean: float,
    error: float | None,
    counts: dict[str, int],
    horizon: float | None,
    censored: dict[str, int],
    limit: float | None,
    measured: float | None,
) -> str:
    if error is None:
        return (
            f"{counted(pairs, 'paired seed')} cannot show how much seeds differ; the rule needs at "
            "least 2."
        )
    strength = _strength(unit, pairs, mean, error, horizon, censored, limit, measured)
    ties = f", {counts['tied']} tied" if counts["tied"] else ""
    return (
        f"{counts['right']} of {pairs} paired seeds went the claim's way and {counts['wrong']} "
        f"against it{ties}; {needed(pairs)} must agree. {strength}"
    )


def _strength(
    unit: str,
    pairs: int,
    mean: float,
    error: float,
    horizon: float | None,
    censored: dict[str, int],
    limit: float | None,
    measured: float | None,
) -> str:
    """Say how far the mean is from zero, or why its standard error cannot tell."""
    never = [name for name, count in censored.items() if count == pairs]
    within = f"within {horizon:g} {unit}" if horizon is not None else ""
    if len(never) == 2:
        return f"No run of either got there {within}, so there is no difference to measure."
    if never:
        sometimes = any(0 < count < pairs for count in censored.values())
        return (
            f"None of the {never[0]} runs got there {within}, so the mean difference of "
            f"{mean:+.3g} {unit}, positive for the claim, "
            f"{'hangs on where they were stopped' if sometimes else 'is a lower bound in size'}, "
            "and its standard error says nothing about how much seeds differ."
        )
    # Of an identity that holds to rounding there would be billions.
    many = error and abs(mean) / error > 1000
    distance = (
        f"{'more than 1,000' if many else f'{abs(mean) / error:.1f}'} standard errors, and more "
        f"than {STANDARD_ERRORS:g} are needed"
        if error
        else "every seed gave the same"
    )
    if limit is not None:
        side = "below" if mean > 0 else "above" if mean < 0 else "at"
        return (
            f"The mean is {measured:.3g} {unit}, {side} the limit of {limit:g}, with a "
            f"standard error of {error:.2g}: {distance}."
        )
    return (
        f"The mean difference, positive for the claim, is {mean:+.3g} {unit} with a standard error "
        f"of {error:.2g}: {distance}."
    )
