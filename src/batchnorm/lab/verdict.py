"""The verdict rule, the same for every claim.

*Reproduced*: at least 7/8 of the paired seeds (rounded up) go the claim's way, and the mean paired
difference is more than 2 standard errors above zero. *Contradicted*: the mirror image. Anything
else is *unresolved*, and published all the same.

The special cases, decided once:

- A tie (difference zero) counts for neither side, but still counts among the seeds.
- A run that never reached its threshold is censored: `None`, counted as the horizon. A pair with
  both sides censored is a tie.
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

from batchnorm.errors import ArgumentError

REPRODUCED = "reproduced"
CONTRADICTED = "contradicted"
UNRESOLVED = "unresolved"

STANDARD_ERRORS = 2.0

# 2 million normal draws estimate a rate of 2 % from 8 seeds to ±0.03 points, in about 50 ms.
NULL_DRAWS = 2_000_000


@dataclass(frozen=True)
class Verdict:
    """The outcome, the numbers that it follows from, and both in one sentence.

    `false_rate` is how often the rule gives *reproduced* when there is no effect at all, with this
    many seeds and normally distributed differences.
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

    @property
    def pairs(self) -> int:
        """The number of paired seeds."""
        return len(self.differences)

    def would_change(self) -> tuple[str, ...]:
        """Say what results, with these seeds, would have made the outcome another one."""
        may_disagree = self.pairs - self.needed
        lines = [
            f"With {self.pairs} seeds at most {may_disagree} may disagree or tie; here "
            f"{self.pairs - max(self.right, self.wrong)} did."
        ]
        if self.standard_error is not None:
            lines.append(
                f"A mean difference within ±{STANDARD_ERRORS * self.standard_error:.3g} "
                f"{self.unit} of zero would be unresolved; here it is {self.mean:+.3g}."
            )
            lines.append(
                "If there were no effect at all, and seeds differed as normal draws do, the rule "
                f"would still say “reproduced” in {self.false_rate:.1%} of repetitions with "
                f"{self.pairs} seeds."
            )
        else:
            lines.append("At least 2 seeds are needed for any verdict.")
        return tuple(lines)


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
) -> Verdict:
    """Judge the claim that `treated` is better than `control`, paired by position.

    Args:
        control: One value a seed, without the treatment; None where the run was censored.
        treated: The same seeds in the same order, with the treatment.
        unit: What the values count, for the sentence ("steps").
        horizon: The value that stands for a censored run.
        higher_is_better: Whether a larger value is the better one.

    Raises:
        ArgumentError: The two differ in length, a value is not finite, or a run is censored and
            there is no horizon.
    """
    if len(control) != len(treated):
        raise ArgumentError(
            f"Paired seeds need one control for each treated run; got {len(control)} and "
            f"{len(treated)}."
        )
    gain = np.subtract(_filled(control, horizon), _filled(treated, horizon))
    differences = -gain if higher_is_better else gain
    pairs = len(differences)
    mean = float(differences.mean()) if pairs else 0.0
    error = float(differences.std(ddof=1) / math.sqrt(pairs)) if pairs > 1 else None
    counts = {
        "right": int((differences > 0).sum()),
        "wrong": int((differences < 0).sum()),
        "tied": int((differences == 0).sum()),
    }
    outcome = {1: REPRODUCED, -1: CONTRADICTED, 0: UNRESOLVED}[int(_direction(differences))]
    return Verdict(
        outcome=outcome,
        sentence=_sentence(unit, pairs, mean, error, counts),
        unit=unit,
        differences=tuple(float(d) for d in differences),
        mean=mean,
        standard_error=error,
        needed=needed(pairs),
        censored_control=sum(value is None for value in control),
        censored_treated=sum(value is None for value in treated),
        false_rate=false_rate(pairs),
        **counts,
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
) -> str:
    if error is None:
        return (
            f"{pairs} paired seed{'' if pairs == 1 else 's'} cannot show how much seeds differ; "
            "the rule needs at least 2."
        )
    distance = (
        f"{abs(mean) / error:.1f} standard errors, and more than {STANDARD_ERRORS:g} are needed"
        if error
        else "every seed gave the same"
    )
    ties = f", {counts['tied']} tied" if counts["tied"] else ""
    return (
        f"{counts['right']} of {pairs} paired seeds went the claim's way and {counts['wrong']} "
        f"against it{ties}; {needed(pairs)} must agree. The mean difference, positive for the "
        f"claim, is {mean:+.3g} {unit} with a standard error of {error:.2g}: {distance}."
    )
