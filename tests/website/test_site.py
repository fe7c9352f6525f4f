"""The built site: it is whole, its links lead somewhere, and it needs nothing from elsewhere."""

import posixpath
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import batchnorm
import sources
from web_page import Page

pytestmark = pytest.mark.slow  # to build the site takes seconds

#: What the lab offers besides what `batchnorm` does.
LAB = ("discover", "find", "run", "write_report", "default_directory")

#: The experiments with committed results.
RESULTS = [path.parent.name for path in (sources.ROOT / "docs/evidence").glob("*/results.json")]


@cache
def read(path):
    return Page(path.read_text(encoding="utf-8"))


def pages(site, language):
    """Every page of a language, by its address."""
    folder = site / "zh" if language == "zh" else site
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.html")}
    return {name: path for name, path in found.items() if not name.startswith("zh/")}


def test_both_languages_have_every_page(site):
    for language in sources.LANGUAGES:
        expected = {
            re.sub("README", "index", place).replace(".md", ".html")
            for place in sources.files(language)
            if place.endswith(".md")
        }
        built = pages(site, language)
        reports = {name for name in built if name.endswith("report.html")}
        assert set(built) - reports == expected
        assert len(reports) == (0 if language == "zh" else 1 + len(RESULTS))  # which both share


def test_every_link_leads_somewhere(site):
    dead = []
    for path in site.rglob("*.html"):
        here = path.relative_to(site).as_posix()
        for target in read(path).targets:
            split = urlsplit(target)
            if split.scheme in ("http", "https", "data", "mailto"):
                continue
            name = posixpath.normpath(posixpath.join(posixpath.dirname(here), unquote(split.path)))
            found = path if not split.path else site / name
            if not found.is_file() or (
                split.fragment and unquote(split.fragment) not in [*read(found).ids, "__skip"]
            ):
                dead.append((here, target))
    assert not dead, dead[:10]


def test_nothing_comes_from_elsewhere(site):
    """Addresses elsewhere may be links for readers; nothing else."""
    loads = re.compile(
        r"<(?:script|link|img|iframe|source|object|embed)\b[^>]*\b(?:src|href|data)="
        r"[\"']?(?:https?:)?//[^\s\"'>]*"
    )
    for path in site.rglob("*.html"):
        assert not loads.findall(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text), path


def test_every_public_name_is_documented_once(site):
    public = {
        f"batchnorm.{name}"
        for name, thing in vars(batchnorm).items()
        if not name.startswith("_") and not isinstance(thing, ModuleType)
    }
    public |= {f"batchnorm.lab.{name}" for name in LAB}
    ids = [name for path in (site / "api").glob("*.html") for name in read(path).ids]
    assert len(public) > 40
    for name in public:
        assert ids.count(name) == 1, name
    integrations = read(site / "api" / "integrations.html").text
    assert "batchnorm.integrations.lightning.RecalibrateCallback" in integrations


def test_docstrings_are_rendered(site):
    """Examples are code, formulas keep their lines, arguments are items, names are links."""
    text = (site / "api" / "layer.html").read_text()
    assert "Example:" not in read(site / "api" / "layer.html").text
    assert "&gt;&gt;&gt; " in text
    assert "<blockquote>" not in text  # what >>> would be without
    assert "y = activation(γ · (x − mean) / √(var + eps) + β + residual)" in re.sub(
        "<.*?>", "", text
    )
    assert re.search(
        r'<a[^>]*href="function.html#batchnorm.batch_norm"><code>batch_norm</code>', text
    )
    assert re.search(r"<li>x: any rank from 2 up", text)


@pytest.mark.parametrize("language", sources.LANGUAGES)
def test_every_outcome_leads_to_its_experiment(site, language):
    folder = site / "zh" if language == "zh" else site
    seen = 0
    for source in (sources.ROOT / "docs" / "article" / language).glob("*.md"):
        quoted = re.findall(
            r"(\w+)<!-- ([\w-]+) @ [^<>]*outcome -->", source.read_text(encoding="utf-8")
        )
        html = (folder / "article" / source.with_suffix(".html").name).read_text(encoding="utf-8")
        links = re.findall(
            r'<a class="outcome \w+" href="[./]*/evidence/([\w-]+)/report.html">(\w+)</a>', html
        )
        assert [(folder, said) for said, folder in quoted] == links, source
        assert not re.findall(r"<!-- [\w-]+ @ ", html), source
        seen += len(links)
    assert seen > 30


def test_the_claims_lead_to_their_experiments(site):
    text = (site / "evidence" / "claims.html").read_text()
    linked = set(re.findall(r'href="([\w-]+-full)/report.html"', text))
    assert linked == {name for name in RESULTS if name.endswith("-full")}
    assert '<a href="report.html"><code>report.html</code></a>' in text


def test_navigation_has_every_page_in_order(site):
    html = (site / "index.html").read_text()
    links = re.findall(r'<a href="([^"#]+)" class="md-nav__link', html)
    order = list(dict.fromkeys(links))
    shown = {name for name in pages(site, "en") if not name.startswith("source/")}
    assert set(order) == {name for name in shown if not name.endswith("report.html")}

    def first(folder, number):
        return [Path(name).stem for name in order if name.startswith(folder)][:number]

    assert first("article/", 3) == ["index", "01-introduction", "02-principles"]
    assert first("how-to/", 3) == ["index", "diagnosis", "recalibration"]  # not by the alphabet
    assert first("findings/", 3) == ["index", "BN101", "BN102"]
    assert first("api/", 3) == ["index", "layer", "function"]
    assert first("benchmarks/", 2) == ["index", "cpu"]
    assert order[:2] == ["index.html", "overview.html"]


def test_punctuation_stays_with_its_formula(site):
    html = (site / "zh" / "article" / "03-mathematics.html").read_text()
    loose = re.findall(r'<span class="arithmatex">[^<]*</span>[，。；：]', html)
    kept = re.findall(
        r'<span class="together"><span class="arithmatex">[^<]*</span>[，。；：]', html
    )
    assert len(loose) == len(kept) > 5


def test_what_is_only_in_english_says_so_in_the_chinese_site(site):
    for name, english in (("how-to/recalibration", True), ("article/index", False)):
        html = (site / "zh" / f"{name}.html").read_text()
        assert ("这一页只有英文。" in html) == english
        assert ('<div lang="en">' in html) == english
    assert "只有英文" not in (site / "how-to" / "recalibration.html").read_text()
