"""Numbers that pages quote from committed results: check them, or write them anew.

    python website/quoted.py [--write] PAGE...

A quoted number is followed by a comment that says where it comes from, and which no reader sees:

    27.5<!-- convergence-full @ table/BatchNorm/steps to 90% -->

A folder of docs/evidence, then a path through its findings: `table/ROW/COLUMN`, where ROW is how
the row begins (cells joined by ", "); or keys and places, as in `also/0/verdict/mean`; then, for
what is no text, a format. They are kept apart by @, as a bar would end a table's cell. Of a cell
"27.5 (20–35)" the first word is quoted. An outcome is quoted in the page's language.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence"

OUTCOMES = {"reproduced": "已复现", "contradicted": "被否定", "unresolved": "未定"}

SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"

#: A space that a line is not broken at.
THIN = "\N{NARROW NO-BREAK SPACE}"

#: What stands before the comment: a number as pages write it, or an outcome.
QUOTED = re.compile(
    rf"(?P<text>[+−-]?\d[\d.,×e+−-]*(?:{THIN}×{THIN}10[{SUPERSCRIPTS}]+|\d%?)|[+−-]?\d%?"
    rf"|{'|'.join([*OUTCOMES, *OUTCOMES.values()])})"
    r"<!-- (?P<source>[^<>]*@[^<>]*) -->"
)


@dataclass(frozen=True)
class Quote:
    """A number in a page, and what the results say."""

    page: Path
    line: int
    source: str
    text: str
    expected: str


def quotes(page: Path) -> Iterator[Quote]:
    """All of a page."""
    content = page.read_text(encoding="utf-8")
    for found in QUOTED.finditer(content):
        line = content.count("\n", 0, found.start()) + 1
        expected = said(found["source"], chinese="zh" in page.parts)
        yield Quote(page, line, found["source"], found["text"], expected)


def said(source: str, *, chinese: bool = False) -> str:
    """What the results say at a source."""
    folder, path, *form = (part.strip() for part in source.split("@"))
    node: Any = _findings(folder)
    head, _, rest = path.partition("/")
    if head == "table":
        value: Any = _cell(node["table"], *rest.split("/", 1))
    else:
        value = functools.reduce(
            lambda at, key: at[int(key)] if isinstance(at, list) else at[key],
            path.split("/"),
            node,
        )
    if form:
        return for_readers(format(value, form[0]))
    if value in OUTCOMES:
        return OUTCOMES[value] if chinese else value
    return for_readers(str(value).split(" ")[0])


def for_readers(number: str) -> str:
    """A number as it is printed, not as a program writes it."""
    if found := re.fullmatch(r"([+-]?[\d.]+)e([+-]\d+)", number):
        power = int(found[2])
        raised = str(power).translate(str.maketrans("0123456789-", SUPERSCRIPTS))
        return found[1].replace("-", "−") + (f"{THIN}×{THIN}10{raised}" if power else "")
    return number.replace("-", "−")


def _cell(table: dict[str, Any], row: str, column: str) -> str:
    rows = [line for line in table["rows"] if line[0] == row]
    if len(rows) != 1:
        rows = [line for line in table["rows"] if f"{', '.join(line)}, ".startswith(f"{row}, ")]
    if len(rows) != 1:
        raise LookupError(f"expected one row that begins {row!r}, got {len(rows)}")
    cell: str = rows[0][table["columns"].index(column)]
    return cell


@functools.cache
def _findings(folder: str) -> dict[str, Any]:
    text = (EVIDENCE / folder / "results.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["findings"]
    return found


def write(page: Path) -> int:
    """Write what the results say into a page; how many numbers changed."""
    changed = 0

    def anew(found: re.Match[str]) -> str:
        nonlocal changed
        expected = said(found["source"], chinese="zh" in page.parts)
        changed += expected != found["text"]
        return f"{expected}<!-- {found['source']} -->"

    page.write_text(QUOTED.sub(anew, page.read_text(encoding="utf-8")), encoding="utf-8")
    return changed


def main() -> int:
    """The number of stale numbers, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    pages = options.pages or sorted((ROOT / "docs" / "article").glob("*/*.md"))
    if options.write:
        for page in pages:
            if changed := write(page):
                sys.stdout.write(f"{page}: {changed} written\n")
        return 0
    stale = [quote for page in pages for quote in quotes(page) if quote.text != quote.expected]
    for quote in stale:
        sys.stdout.write(
            f"{quote.page}:{quote.line}: {quote.text}, and the results say {quote.expected} "
            f"({quote.source})\n"
        )
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
