"""Every code has its page, with the same parts, and every page its code."""

import re
from pathlib import Path

import pytest

from batchnorm.tools.findings import CODES, SEVERITIES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "findings"
SECTIONS = ["How it is measured", "Why it hurts", "What to do", "To silence it"]
TOOLS = ("diagnose", "inspect_checkpoint")


def test_pages_are_those_of_the_codes():
    assert {page.stem for page in FOLDER.glob("*.md")} == {*CODES, "index"}


@pytest.mark.parametrize("code", CODES)
def test_page_has_all_its_parts(code):
    text = (FOLDER / f"{code}.md").read_text()
    title, _, found_by, _, *_ = text.splitlines()
    assert title == f"# {code}: {CODES[code]}"
    said = found_by.lower()
    assert any(severity in said for severity in SEVERITIES)
    assert any(f"`{tool}`" in said for tool in TOOLS)
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    assert parts[1::2] == SECTIONS
    assert all(len(part.split()) >= 6 for part in parts[2:-1:2])
    assert "```python" in dict(zip(parts[1::2], parts[2::2], strict=True))["What to do"]
    silence = parts[-1]
    assert f"`--ignore {code}`" in silence
    for tool in TOOLS:
        assert (f"`{tool}`" in found_by) == (f"`{tool}(" in silence)
    assert f'ignore=("{code}",)' in silence


def found_by(code):
    """The tools that its page names."""
    line = (FOLDER / f"{code}.md").read_text().splitlines()[2]
    return [tool for tool in TOOLS if f"`{tool}`" in line]


def test_index_names_every_page_with_its_title_and_tools():
    row = re.compile(r"^\| \[(BN\d+)\]\((.+)\) \| (.+) \| (.+) \|$", re.MULTILINE)
    rows = row.findall((FOLDER / "index.md").read_text())
    assert [(code, title) for code, _, title, _ in rows] == list(CODES.items())
    for code, target, _, tools in rows:
        assert target == f"{code}.md"
        assert tools == ", ".join(f"`{tool}`" for tool in found_by(code))


def test_inspection_gives_the_codes_that_the_pages_say_it_does():
    sources = (ROOT / "src" / "batchnorm" / "tools" / "checkpoint").glob("*.py")
    given = {code for file in sources for code in re.findall(r'"(BN\d{3})"', file.read_text())}
    assert given == {code for code in CODES if "inspect_checkpoint" in found_by(code)}
