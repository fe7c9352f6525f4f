"""The results as a page of Markdown, beside the file they are in and the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from batchnorm.bench import report
from batchnorm.bench.results import HEADING, behind

KB, MB = 1 << 10, 1 << 20


def page(content: dict[str, Any], figures: Sequence[str]) -> str:
    """Return the page: where it was measured and in short, figures, what was lost, every row."""
    place = content["environment"]
    only = f", only {content['filter'].strip()}" if content["filter"] else ""
    caches = ", ".join(f"{name} {_bytes(size)}" for name, size in place["cache_bytes"].items())
    huge = ", ".join(f"{key} {word}" for key, word in place["transparent_hugepage"].items())
    parts = [
        f"{HEADING}: the {content['suite']} suite on {place['device']}{only}",
        f"Written by `{content['command']} --json FILE`.",
        *(f"> **{note}**" for note in _warnings(content)),
        f"""\
| | |
|---|---|
| processor | {place["cpu"]}, {_counted(place["cores"], "core")}, \
{_counted(place["threads"], "thread")}; {caches} |
| software | batchnorm {place["batchnorm"]} at {place["commit"]}, torch {place["torch"]}, \
Python {place["python"]}, {place["platform"]}, {place["libc"]} |
| kernels used | {_kernels(content)} |
| huge pages | {huge or "unknown"} |
| other processes | {_load(content["load"])} |
| date, seed | {place["date"]}, {place["seed"]} |""",
        _block(report.summary(content)),
        *(f"![{_words(name)}]({name})" for name in figures),
        "## Where a peer is ahead",
        _behind(content),
        "## Every case",
        _block(report.details(content)),
    ]
    return "\n\n".join(parts) + "\n"


def _warnings(content: dict[str, Any]) -> list[str]:
    """What a reader must know before any number."""
    stopped = "Interrupted: not all that the command measures is here."
    return [*([] if content["complete"] else [stopped]), *content["notes"]]


def _block(lines: Iterable[Text]) -> str:
    printed = "\n".join(text.plain for text in lines)
    return f"```text\n{printed}\n```"


def _kernels(content: dict[str, Any]) -> str:
    """Say who did the work in this run, and why where it was not our kernels."""
    native, others = content["kernels"]["native"], content["kernels"]["others"]
    reason = content["environment"]["backends"][0]
    if not others:
        return f"the C++ kernels, in every case ({reason})" if native else "unknown"
    share = f"in {others} of {native + others} cases and fusions " if native else ""
    return f"torch's operations, {share}not the C++ kernels ({reason})"


def _load(load: dict[str, Any]) -> str:
    known = [share for share in load["during"] if share is not None]
    if not known:
        return "unknown"
    before = "".join(f"{share:.0%} before, " for share in load["before"] if share is not None)
    return f"used {before}at most {max(known):.0%} of the processors' time while measuring"


def _behind(content: dict[str, Any]) -> str:
    """Return a table of the rows that leave no doubt that we are slower."""
    lost, known = behind(content["rows"]), [row for row in content["rows"] if row["ratio"]]
    said = (
        f"Rows whose interval of 95 % lies wholly below 1: {len(lost)} of {len(known)}. At that "
        "confidence, up to one in 40 of equals may be here by chance."
    )
    if not lost:
        return said
    lines = [
        f"| {report.title(row)} | {row['pass']} | {row['fusion']} | {row['allocator']} | "
        f"{row['peer']} | {row['ratio']:.2f} {report.reach(row)} |"
        for row in lost
    ]
    head = ["| case | pass | fusion | allocator | peer | ratio |", "|---|---|---|---|---|---|"]
    return "\n".join([said, "", *head, *lines])


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(size: int) -> str:
    return f"{size / MB:g} MB" if size >= MB else f"{size / KB:g} KB"


def _words(name: str) -> str:
    """What a figure shows, from the name of its file: cpu-ratios-default.svg."""
    words = name.removesuffix(".svg").replace("-", " ")
    if "ratios" in words:
        return f"Ratios by case, allocator: {words.partition('ratios ')[2]}"
    return "Cost of a KB by the size of the tensor"
