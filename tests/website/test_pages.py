"""The site in a real browser: pages load and draw, in any width, without a word to anybody else."""

import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

import sources
from browser import chromium

pytestmark = pytest.mark.slow

WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 400, "height": 800}

#: Resolved when every formula is drawn; at once in a page without any.
DRAWN = "() => window.MathJax?.startup ? MathJax.startup.promise.then(() => true) : true"
FITS = "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@contextmanager
def watched(browser, home, **options):
    """A page, and what it did that it must not: errors, and requests for what is not below home."""
    context = browser.new_context(viewport=WIDE, **options)
    context.set_default_timeout(10_000)
    page, wrong = context.new_page(), []
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: failed(request, wrong))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((home, "data:", "blob:")) else wrong.append(request.url)
        ),
    )
    try:
        yield page, wrong
    finally:
        context.close()


def failed(request, wrong):
    if request.failure != "net::ERR_ABORTED":  # by leaving the page
        wrong.append(f"{request.failure}: {request.url}")


def fits(page, name):
    """Nothing of the page is beyond its right edge, once what moves after a new width has moved."""
    try:
        page.wait_for_function(FITS, timeout=3000)
    except Exception as error:
        raise AssertionError(f"{name} is wider than {page.viewport_size}") from error


def addresses(site, language):
    folder = site / "zh" if language == "zh" else site
    found = [path.relative_to(site).as_posix() for path in sorted(folder.rglob("*.html"))]
    if language == "en":
        return [name for name in found if not name.startswith("zh/")]
    # Of the pages that are in English there, the English site has shown the same text.
    english = sources.files("en").values()
    shared = {place for place, path in sources.files("zh").items() if path in english}
    first = min(shared)
    return [
        name
        for name in found
        if (place := name.removeprefix("zh/").replace(".html", ".md")) not in shared - {first}
        and place.replace("index", "README") not in shared
    ]


@pytest.mark.parametrize("language", sources.LANGUAGES)
def test_every_page_opens_from_a_file(site, browser, language):
    home = site.as_uri()
    drawn = 0
    with watched(browser, home) as (page, wrong):
        for name in addresses(site, language):
            page.goto(f"{home}/{name}")
            assert page.evaluate(DRAWN), name
            formulas = page.locator(".arithmatex").count()
            assert page.locator("mjx-container").count() == formulas, name
            assert page.locator("mjx-container [data-mml-node='merror']").count() == 0, name
            for size in (WIDE, NARROW):
                page.set_viewport_size(size)
                fits(page, name)
            assert not wrong, (name, wrong)
            drawn += formulas
    assert drawn > 100


@pytest.mark.parametrize("language", sources.LANGUAGES)
def test_every_formula_of_the_article_is_drawn(site, browser, language):
    folder = f"{site.as_uri()}{'/zh' if language == 'zh' else ''}/article"
    with watched(browser, site.as_uri()) as (page, _):
        for source in sorted((sources.ROOT / "docs" / "article" / language).glob("*.md")):
            text = re.sub(r"```.*?```|`[^`\n]*`", "", source.read_text(), flags=re.DOTALL)
            display = re.findall(r"\$\$.*?\$\$", text, flags=re.DOTALL)
            inline = re.findall(r"\$[^$\n]+\$", re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL))
            page.goto(f"{folder}/{source.with_suffix('.html').name}")
            page.evaluate(DRAWN)
            shown = page.locator("mjx-container[display='true']").count()
            assert shown == len(display), source.name
            assert page.locator("mjx-container").count() == len(display) + len(inline), source.name
            page.set_viewport_size(NARROW)  # where they are drawn in another way
            boxes = page.evaluate(
                "() => [...document.querySelectorAll('mjx-container > svg')]"
                ".map(svg => svg.getBoundingClientRect()).map(box => [box.width, box.height])"
            )
            assert all(width > 3 and height > 3 for width, height in boxes), source.name


@contextmanager
def served(site):
    """The address at which `make docs` serves it."""
    program = (
        "import sys; sys.path.insert(0, 'website'); import build; "
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv[1:] = ['--out', {str(site)!r}, '--serve', '--port', '0']; "
        "build.make = lambda out: None; build.main()"
    )
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=sources.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0  # Ctrl-C is how it ends
        finally:
            server.kill()


@pytest.fixture(params=["file", "http"])
def home(request, site):
    """Where the site is: in a folder, or behind a server."""
    if request.param == "file":
        yield site.as_uri()
    else:
        with served(site) as address:
            yield address


def test_it_works_from_a_file_and_behind_a_server(home, browser):
    with watched(browser, home) as (page, wrong):
        page.goto(f"{home}/zh/article/03-mathematics.html")
        assert page.evaluate(DRAWN)
        assert page.locator("mjx-container").count() > 20

        # The same page in the other language, and back.
        page.locator("[data-md-component=header] .md-select").hover()
        page.locator(".md-select__link[hreflang=en]").click()
        page.wait_for_url(f"{home}/article/03-mathematics.html")
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.locator("h1").inner_text().startswith("Mathematics")
        page.locator("[data-md-component=header] .md-select").hover()
        page.locator(".md-select__link[hreflang=zh]").click()
        page.wait_for_url(f"{home}/zh/article/03-mathematics.html")

        # An outcome leads to its experiment.
        page.locator("a.outcome").first.click()
        page.wait_for_url(f"{home}/evidence/invariance-full/report.html")
        assert "scale of the weights" in page.title()
        assert not wrong


@pytest.mark.parametrize(
    ("language", "words", "expected"),
    [
        ("zh", "协变量偏移", "zh/article/02-principles.html"),
        ("zh", "recalibrate", "zh/how-to/recalibration.html"),
        ("en", "covariate shift", "article/02-principles.html"),
        ("en", "BN302", "findings/BN302.html"),
    ],
)
def test_search_finds_it(home, browser, language, words, expected):
    with watched(browser, home) as (page, wrong):
        page.goto(f"{home}/{'zh/' if language == 'zh' else ''}index.html")
        page.locator("input.md-search__input").click()
        page.locator("input.md-search__input").fill(words)
        page.locator("input.md-search__input").press("End")  # it listens to keys
        page.wait_for_selector(".md-search-result__item")
        links = page.locator(".md-search-result__link")
        found = [links.nth(i).get_attribute("href") for i in range(links.count())]
        assert any(link.split("?")[0].split("#")[0].endswith(expected) for link in found), found
        assert not wrong


def lightness(page):
    """Of the page behind the text, 0 to 255."""
    colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("system", ["light", "dark"])
def test_it_is_dark_where_the_system_is_and_can_be_changed(site, browser, system):
    with watched(browser, site.as_uri(), color_scheme=system) as (page, wrong):
        page.goto(f"{site.as_uri()}/article/index.html")
        assert (lightness(page) < 60) == (system == "dark")
        seen = set()
        for _ in range(3):
            page.locator("label[for^=__palette]:not([hidden])").click()
            seen.add(lightness(page) < 60)
        assert seen == {True, False}
        assert (lightness(page) < 60) == (system == "dark")  # after a round, the system's again
        assert not wrong


def test_the_menu_of_a_narrow_page_leads_everywhere(site, browser):
    with watched(browser, site.as_uri()) as (page, wrong):
        page.set_viewport_size(NARROW)
        page.goto(f"{site.as_uri()}/zh/index.html")
        page.locator("label.md-header__button[for=__drawer]").click()
        # The menu shows the section that the page is in; back, and into another one.
        page.locator("label.md-nav__title[for=__nav_1]").click()
        page.locator("label.md-nav__link[for=__nav_2]").click()
        page.get_by_role("link", name="数学表达").click()
        page.wait_for_url("**/zh/article/03-mathematics.html")
        assert not wrong
