"""The article: its code runs, its numbers are the results', and both languages say the same."""

import ast
import re
from pathlib import Path

import pytest

import quoted

ROOT = Path(__file__).resolve().parents[2]
ARTICLE = ROOT / "docs" / "article"
PAGES = sorted(ARTICLE.glob("*/*.md"))
NAMES = sorted({page.name for page in PAGES})
PAIRS = [(ARTICLE / "zh" / name, ARTICLE / "en" / name) for name in NAMES]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
each_pair = pytest.mark.parametrize(("zh", "en"), PAIRS, ids=NAMES)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def without_blocks(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


@each_page
@pytest.mark.filterwarnings("ignore:var\\(\\). degrees of freedom")  # a fault of the sample
def test_code_runs_and_prints_what_the_page_says(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    pattern = r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?"
    for code, printed in re.findall(pattern, page.read_text(), flags=re.DOTALL):
        exec(code, namespace)
        assert capsys.readouterr().out == printed


@each_page
def test_numbers_are_those_of_the_results(page):
    found = list(quoted.quotes(page))
    stale = [quote for quote in found if quote.text != quote.expected]
    assert not stale
    # A comment that stands behind no number would be checked by nobody.
    assert len(found) == len(re.findall(r"<!-- [^<>]*@", page.read_text()))


@each_pair
def test_both_languages_have_every_page(zh, en):
    assert zh.exists()
    assert en.exists()


def shape(page):
    """What must be the same in both languages, in its order."""
    text = without_blocks(page)
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)],
        "code": [ast.dump(ast.parse(code)) for code in blocks(page, "python")],
        "printed": blocks(page, "text"),
        "commands": [re.sub(r" *#.*", "", code) for code in blocks(page, "sh")],
        "formulas": re.findall(r"\$\$(.*?)\$\$", text, flags=re.DOTALL),
        "numbers": sorted(re.findall(r"<!-- ([^<>]*@[^<>]*) -->", text)),
        "figures": re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text),
        "interactive": text.count('class="bn-figure"'),
        "links": sorted(set(re.findall(r"[^!]\[[^\]]*\]\(([^)]*)\)", text))),
        "tables": [line.count("|") for line in text.splitlines() if line.startswith("|")],
        "symbols": sorted(set(re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", text))),
    }


@each_pair
def test_both_languages_have_the_same_parts(zh, en):
    ours, theirs = shape(zh), shape(en)
    for part, found in ours.items():
        assert found == theirs[part], part


@each_page
def test_links_and_figures_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", without_blocks(page)):
        if not target.startswith("https://"):
            assert page.parent.joinpath(target).exists(), target


@each_page
def test_the_interactive_figure_speaks_the_language_of_its_page(page):
    for language in re.findall(r'class="bn-figure" data-lang="(\w+)"', page.read_text()):
        assert language == page.parent.name


def test_chinese_uses_its_own_punctuation():
    """Between Chinese characters a half-width comma or colon is a slip."""
    for page in (ARTICLE / "zh").glob("*.md"):
        slips = re.findall(r"[一-鿿][,;:?!][一-鿿]", without_blocks(page))
        assert not slips, (page.name, slips)


def test_chinese_paragraphs_are_lines():
    """A line break within one would show as a space between two characters."""
    for page in (ARTICLE / "zh").glob("*.md"):
        breaks = re.findall(r"[一-鿿，。；：、]\n[一-鿿]", without_blocks(page))
        assert not breaks, (page.name, breaks)


def test_a_stale_number_is_found_and_can_be_written_anew(tmp_path):
    page = tmp_path / "zh" / "page.md"
    page.parent.mkdir()
    source = "convergence-full @ table/BatchNorm/steps to 90%"
    page.write_text(
        f"只要 99<!-- {source} --> 步，**未定<!-- convergence-full @ verdict/outcome -->**。"
    )
    stale = [
        (quote.text, quote.line) for quote in quoted.quotes(page) if quote.text != quote.expected
    ]
    assert stale == [("99", 1), ("未定", 1)]
    assert quoted.write(page) == 2
    assert all(quote.text == quote.expected for quote in quoted.quotes(page))
    assert "**已复现<!--" in page.read_text()


@pytest.mark.parametrize(
    "source",
    ["convergence-full @ table/nobody/steps to 90%", "convergence-full @ verdict/nothing",
     "nowhere @ verdict/outcome", "explosion-full @ table/linear/theory"],
)  # fmt: skip
def test_a_source_that_is_not_there_is_an_error(source):
    with pytest.raises((LookupError, OSError, ValueError)):
        quoted.said(source)


@pytest.mark.parametrize(
    ("number", "expected"),
    [("3.0e-05", "3.0 × 10⁻⁵"), ("1e+30", "1 × 10³⁰"), ("1.0e+00", "1.0"), ("-0.5", "−0.5"),
     ("27.5", "27.5"), ("97.2%", "97.2%")],
)  # fmt: skip
def test_numbers_are_written_for_readers(number, expected):
    assert quoted.for_readers(number) == expected.replace(" ", quoted.THIN)
