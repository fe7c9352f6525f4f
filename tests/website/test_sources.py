"""Which file is which page, where links lead then, and what stands on the first page."""

import re

import pytest

import sources
from sources import ROOT

FIRST = {language: f"docs/index{'.zh' if language == 'zh' else ''}.md" for language in ("en", "zh")}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("docs/article/en/03-mathematics.md", "article/03-mathematics.md"),
        ("docs/article/zh/03-mathematics.md", "article/03-mathematics.md"),
        ("docs/how-to/recalibration.md", "how-to/recalibration.md"),
        ("docs/index.zh.md", "index.md"),
        ("README.zh.md", "overview.md"),
        ("benchmarks/results/cpu.md", "benchmarks/results/cpu.md"),
        ("docs/evidence/sync-full", "evidence/sync-full/report.html"),
        ("docs/evidence/sync-full/results.json", "evidence/sync-full/results.json"),
        ("examples/padding.py", "source/examples/padding.py.md"),
        ("LICENSE", "source/LICENSE.md"),
    ],
)
def test_a_file_has_its_address(name, place):
    assert sources.address(name) == place


@pytest.mark.parametrize(
    ("language", "name", "link", "expected"),
    [
        ("en", "docs/article/en/05-advantages.md", "[a](02-principles.md#x)",
         "[a](02-principles.md#x)"),
        ("zh", "docs/article/zh/05-advantages.md", "![a](../../images/b.svg)",
         "![a](../images/b.svg)"),
        ("en", "docs/how-to/diagnosis.md", "[a](../../benchmarks/results/gap.md)",
         "[a](../benchmarks/results/gap.md)"),
        ("en", "README.md", "[a](docs/findings/index.md)", "[a](findings/index.md)"),
        ("en", "benchmarks/README.md", "[a](../src/batchnorm/bench/merge.py)",
         "[a](../source/src/batchnorm/bench/merge.py.md)"),
        ("en", "docs/evidence/claims.md", "[a](sync-full/)", "[a](sync-full/report.html)"),
        ("en", "README.md", "[中文](README.zh.md)", '<a href="zh/overview.html">中文</a>'),
        ("zh", "README.zh.md", "[a](docs/article/en/index.md)",
         '<a href="../article/index.html">a</a>'),
        ("en", "README.md", "[a](https://example.org/a.md)", "[a](https://example.org/a.md)"),
        ("en", "README.md", "```sh\n[a](docs/x.md)\n```", "```sh\n[a](docs/x.md)\n```"),
    ],
)  # fmt: skip
def test_links_lead_to_the_site(language, name, link, expected):
    assert sources.relinked(link, ROOT / name, language) == expected


def test_chinese_takes_the_place_of_english_where_it_is():
    english, chinese = sources.files("en"), sources.files("zh")
    assert english.keys() == chinese.keys()
    own = {place for place in english if english[place] != chinese[place]}
    assert {"index.md", "overview.md", "article/01-introduction.md"} < own
    assert all(sources.language_of(str(chinese[p].relative_to(ROOT))) == "zh" for p in own)
    assert english["overview.md"] == ROOT / "README.md"


def test_no_runs_and_figures_are_in_it():
    for path in sources.files("en").values():
        assert not {"runs", "figures"} & set(path.relative_to(ROOT).parts), path


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", FIRST.values())
def test_the_first_page_runs_and_prints_what_it_says(name, capsys):
    namespace = {}
    for code in blocks(name, "python"):
        exec(code, namespace)
    assert capsys.readouterr().out == "".join(blocks(name, "text"))


@pytest.mark.parametrize("language", ["python", "sh"])
def test_both_first_pages_have_the_same_code(language):
    english, chinese = (
        [re.sub(r" *#.*", "", code) for code in blocks(name, language)] for name in FIRST.values()
    )
    assert english == chinese


def test_the_folders_first_pages_list_all_of_it():
    """A page that none lists would be at the end of the navigation, and hard to find."""
    for folder in ("how-to", "api", "findings", "article"):
        for language in sources.LANGUAGES:
            found = sources.files(language)
            listed = {
                sources.address(name) for name in sources.targets(found[f"{folder}/index.md"])
            }
            pages = {place for place in found if place.startswith(f"{folder}/")}
            assert pages - listed == {f"{folder}/index.md"}
