"""What stands above the claims on a page of many: every outcome, what failed, quick beside full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED, Verdict
from batchnorm.lab.words import counted

QUICK, FULL = "quick", "full"


@dataclass(frozen=True)
class Row:
    """One claim and what became of it; the first of an experiment's is its own."""

    anchor: str
    experiment: str
    source: str
    claim: str
    verdict: Verdict
    main: bool

    @property
    def numbers(self) -> str:
        """The mean difference, positive for the claim, its interval, and the seeds that agree.

        The interval says nothing where an arm never got there; the claim's own page tells.
        """
        verdict = self.verdict
        agree = f"{verdict.right} of {counted(verdict.pairs, 'seed')}"
        if verdict.interval is None:
            return f"{verdict.mean:+.3g} {verdict.unit}; {agree}"
        low, high = verdict.interval
        return f"{verdict.mean:+.3g} ({low:+.3g} to {high:+.3g}) {verdict.unit}; {agree}"


@dataclass(frozen=True)
class Overview:
    """All claims; `both`: experiment, claim, verdicts of quick and full, where there are both."""

    rows: tuple[Row, ...]
    both: tuple[tuple[str, str, Verdict, Verdict], ...]

    @property
    def counts(self) -> str:
        """How many claims there are, and how they came out."""
        number = {
            outcome: sum(row.verdict.outcome == outcome for row in self.rows)
            for outcome in (REPRODUCED, CONTRADICTED, UNRESOLVED)
        }
        said = ", ".join(f"{n} {outcome}" for outcome, n in number.items() if n)
        return f"{counted(len(self.rows), 'claim')}: {said}."

    @property
    def by_chance(self) -> str:
        """How many claims the rule would call reproduced if there were no effects at all."""
        return f"{sum(row.verdict.false_rate for row in self.rows):.1f}"

    @property
    def failed(self) -> tuple[Row, ...]:
        """What was not reproduced."""
        return tuple(row for row in self.rows if row.verdict.outcome != REPRODUCED)

    @property
    def agreement(self) -> str:
        """How many claims came out the same in both profiles."""
        same = sum(quick.outcome == full.outcome for *_, quick, full in self.both)
        turned = sum(
            {quick.outcome, full.outcome} == {REPRODUCED, CONTRADICTED}
            for *_, quick, full in self.both
        )
        return (
            f"{same} of {counted(len(self.both), 'claim')} came out the same in both; "
            f"{turned or 'none'} turned from reproduced to contradicted, or back."
        )


def strongest(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a section for each experiment and data set: the full one, else that of most seeds."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for section in sections:
        key = _subject(section)
        if key not in best or _strength(section) > _strength(best[key]):
            best[key] = section
    return list(best.values())


def overview(sections: Sequence[dict[str, Any]]) -> Overview:
    """Gather what all sections say; each experiment and data set counts once."""
    shown = strongest(sections)
    rows = [
        Row(
            anchor=section["anchor"],
            experiment=section["experiment"]["name"],
            source=section["experiment"]["source"],
            claim=claim,
            verdict=verdict,
            main=not place,
        )
        for section in shown
        for place, (claim, verdict) in enumerate(_claims(section).items())
    ]
    both = []
    for section in shown:
        if section["profile"] != FULL:
            continue
        for other in sections:
            if other["profile"] == QUICK and _subject(other) == _subject(section):
                quick = _claims(other)
                both += [
                    (section["experiment"]["name"], claim, quick[claim], verdict)
                    for claim, verdict in _claims(section).items()
                    if claim in quick
                ]
                break
    return Overview(tuple(rows), tuple(both))


def _claims(section: dict[str, Any]) -> dict[str, Verdict]:
    own = {section["experiment"]["claim"]: section["verdict"]}
    return own | {other["claim"]: other["verdict"] for other in section["also"]}


def _subject(section: dict[str, Any]) -> tuple[str, str]:
    return section["experiment"]["name"], section["data"]["fingerprint"]


def _strength(section: dict[str, Any]) -> tuple[bool, int]:
    return section["profile"] == FULL, section["verdict"].pairs


def markdown(found: Overview) -> str:
    """Return the same as a page of Markdown, for a repository to show."""
    lines = [
        "# The claims, and what became of them",
        "",
        f"{found.counts} Made by `batchnorm lab report` from the results beside it; the rule, the "
        "recipes and the figures are in the `report.html` that the same command makes.",
        "",
        "The numbers: mean paired difference, positive where it went the claim's way, its 95% "
        "confidence interval, and how many seeds went that way. If no effect were real, the rule "
        f"would still call about {found.by_chance} of these claims reproduced.",
        "",
        *_table(
            ("experiment", "claim", "outcome", "numbers"),
            [
                (
                    row.experiment if row.main else "",
                    f"**{row.claim}** {row.source}" if row.main else row.claim,
                    f"**{row.verdict.outcome}**" if row.main else row.verdict.outcome,
                    row.numbers,
                )
                for row in found.rows
            ],
        ),
    ]
    if found.failed:
        lines += ["", "## What did not reproduce", ""]
        lines += [
            f"- {row.experiment}: **{row.claim}** {row.verdict.outcome.capitalize()}. "
            f"{row.verdict.sentence}"
            for row in found.failed
        ]
    if found.both:
        lines += ["", "## Quick and full", "", found.agreement, ""]
        lines += _table(
            ("experiment", "claim", "quick", "full"),
            [
                (name, claim, quick.outcome, f"**{full.outcome}**" if quick.outcome != full.outcome
                 else "the same")
                for name, claim, quick, full in found.both
            ],
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    # A bar would end the cell.
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]
