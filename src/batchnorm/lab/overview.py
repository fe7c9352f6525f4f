"""What stands above the claims on a page of many: every outcome, what failed, quick beside full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED, Verdict
from batchnorm.lab.words import counted

QUICK, FULL = "quick", "full"

NUMBERS = (
    "mean paired difference, positive where it went the claim's way (where the claim is that "
    "something is below a limit: its mean, and the limit), its 95% confidence interval (Student's "
    "t), and how many seeds went that way."
)


@dataclass(frozen=True)
class Row:
    """One claim and what became of it; the first of an experiment's is its own.

    `ours` marks what the source does not claim; `data` is the name of a data set that is not the
    only one of the page, else empty.
    """

    anchor: str
    experiment: str
    source: str
    claim: str
    verdict: Verdict
    main: bool
    ours: bool
    data: str
    profile: str

    @property
    def numbers(self) -> str:
        """The mean difference, positive for the claim, its interval, and the seeds that agree.

        The interval says nothing where an arm never got there; the claim's own page tells.
        """
        verdict = self.verdict
        limit = f", limit {verdict.limit:g}" if verdict.limit is not None else ""
        what = f"{verdict.unit}{limit}"
        agree = f"{verdict.right} of {counted(verdict.pairs, 'seed')}"
        # Where all seeds gave the same, or an arm never got there, an interval would mislead.
        if verdict.interval is None or not verdict.standard_error or verdict.bound:
            return f"{verdict.estimate} {what}; {agree}"
        return f"{verdict.estimate} ({verdict.span}) {what}; {agree}"

    @property
    def where(self) -> str:
        """Experiment, data if there are several, and profile."""
        return ", ".join(filter(None, (self.experiment, self.data, self.profile)))

    @property
    def weak(self) -> bool:
        """Whether the outcome is decided, and the interval includes zero all the same."""
        interval, decided = self.verdict.interval, self.verdict.outcome != UNRESOLVED
        return decided and interval is not None and interval[0] <= 0 <= interval[1]


@dataclass(frozen=True)
class Overview:
    """All claims; `both`: experiment, claim, verdicts of quick and full, where there are both.

    `alone` are the claims of those experiments that are judged in one of the two only: experiment,
    claim, profile. `data` names the data sets.
    """

    rows: tuple[Row, ...]
    both: tuple[tuple[str, str, Verdict, Verdict], ...]
    alone: tuple[tuple[str, str, str], ...]
    data: tuple[str, ...]

    @property
    def counts(self) -> str:
        """How many claims there are, and how they came out; beside them, questions of our own."""
        said = [_outcomes("claim of the sources", [r for r in self.rows if not r.ours])]
        if ours := [row for row in self.rows if row.ours]:
            said.append(_outcomes("question of our own", ours))
        return " ".join(said)

    @property
    def by_chance(self) -> str:
        """What the rule would decide if there were no effects at all."""
        wrong = sum(r.verdict.false_rate for r in self.rows if r.verdict.standard_error)
        return (
            f"If no effect were real, the rule would still call about {wrong:.1f} of them "
            "reproduced, and as many contradicted."
        )

    @property
    def weakness(self) -> str:
        """How many decided outcomes have an interval that includes zero; empty if none has."""
        weak = sum(row.weak for row in self.rows)
        if not weak:
            return ""
        return (
            f"{weak} decided {'outcome has an' if weak == 1 else 'outcomes have each an'} interval "
            "that includes zero (or the limit), marked (weak): with few seeds it is wider than the "
            "rule's two standard errors. Believe them only once they are decided with 8 seeds."
        )

    @property
    def failed(self) -> tuple[Row, ...]:
        """The sources' claims that were not reproduced."""
        return tuple(r for r in self.rows if r.verdict.outcome != REPRODUCED and not r.ours)

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

    @property
    def unasked(self) -> str:
        """Which claims are judged in one of the two profiles only; empty if there are none."""
        return " ".join(
            f"Judged in {profile} only ({name}): “{claim}”" for name, claim, profile in self.alone
        )

    @property
    def omitted(self) -> str:
        """That questions of our own are not among the failures, where one came out so."""
        ours = sum(row.ours and row.verdict.outcome != REPRODUCED for row in self.rows)
        if not ours:
            return ""
        return (
            f"{counted(ours, 'question')} of our own also came out otherwise than asked; nobody "
            "claimed them, so they are in the table above only."
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
    named = _data(shown)
    rows = [
        Row(
            anchor=section["anchor"],
            experiment=section["experiment"]["name"],
            source=section["experiment"]["source"],
            claim=claim,
            verdict=verdict,
            main=not place,
            ours=ours,
            data=named[section["anchor"]],
            profile=section["profile"],
        )
        for section in shown
        for place, (claim, (verdict, ours)) in enumerate(_claims(section).items())
    ]
    both, alone = [], []
    beside = {_subject(s): s for s in strongest([s for s in sections if s["profile"] == QUICK])}
    for section in shown:
        if section["profile"] != FULL or _subject(section) not in beside:
            continue
        name = ", ".join(filter(None, (section["experiment"]["name"], named[section["anchor"]])))
        quick, full = _claims(beside[_subject(section)]), _claims(section)
        both += [(name, claim, quick[claim][0], full[claim][0]) for claim in full if claim in quick]
        for profile, claims, others in ((QUICK, quick, full), (FULL, full, quick)):
            alone += [(name, claim, profile) for claim in claims if claim not in others]
    data = dict.fromkeys(named.values() if any(named.values()) else [shown[0]["data"]["name"]])
    return Overview(tuple(rows), tuple(both), tuple(alone), tuple(data))


def _data(sections: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By anchor what a section's data are called; empty where all have the same."""
    names = {s["data"]["fingerprint"]: s["data"]["name"] for s in sections}
    if len(names) < 2:
        return {section["anchor"]: "" for section in sections}
    alike = len(set(names.values())) < len(names)
    called = {key: f"{name} ({key[:8]})" if alike else name for key, name in names.items()}
    return {section["anchor"]: called[section["data"]["fingerprint"]] for section in sections}


def _claims(section: dict[str, Any]) -> dict[str, tuple[Verdict, bool]]:
    """By claim its verdict, and whether it is ours."""
    own = {section["experiment"]["claim"]: (section["verdict"], False)}
    return own | {o["claim"]: (o["verdict"], o["ours"]) for o in section["also"]}


def _outcomes(noun: str, rows: Sequence[Row]) -> str:
    number = {
        outcome: sum(row.verdict.outcome == outcome for row in rows)
        for outcome in (REPRODUCED, CONTRADICTED, UNRESOLVED)
    }
    said = ", ".join(f"{n} {outcome}" for outcome, n in number.items() if n)
    head, _, tail = noun.partition(" ")
    return f"{counted(len(rows), head)} {tail}: {said}."


def _subject(section: dict[str, Any]) -> tuple[str, str]:
    return section["experiment"]["name"], section["data"]["fingerprint"]


def _strength(section: dict[str, Any]) -> tuple[bool, int]:
    return section["profile"] == FULL, section["verdict"].pairs


def markdown(found: Overview) -> str:
    """Return the same as a page of Markdown, for a repository to show."""
    lines = [
        "# The claims, and what became of them",
        "",
        f"{found.counts} Data: {'; '.join(found.data)}. Made by `batchnorm lab report` from the "
        "results beside it; the rule, the recipes and the figures are in the `report.html` that "
        "the same command makes.",
        "",
        f"The numbers: {NUMBERS} {found.by_chance} {found.weakness}".rstrip(),
        "",
        *_table(
            ("experiment", "claim", "outcome", "numbers"),
            [
                (
                    f"[{row.where}]({quote(row.anchor)}/)" if row.main else "",
                    f"**{row.claim}** {row.source}"
                    if row.main
                    else f"{row.claim}{' *(ours)*' if row.ours else ''}",
                    (f"**{row.verdict.outcome}**" if row.main else row.verdict.outcome)
                    + (" (weak)" if row.weak else ""),
                    row.numbers,
                )
                for row in found.rows
            ],
        ),
    ]
    if found.failed:
        lines += ["", "## What did not reproduce", ""]
        lines += [
            f"- {row.where}: **{row.claim}** {row.verdict.outcome.capitalize()}. "
            f"{row.verdict.sentence}"
            for row in found.failed
        ]
    if found.omitted:
        lines += ["", found.omitted]
    if found.both:
        lines += ["", "## Quick and full", "", f"{found.agreement} {found.unasked}".rstrip(), ""]
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
