"""Figures in pages: several, in two languages, told to screen readers, made once."""

import functools
import http.server
import subprocess
import sys
import threading

import pytest

from browser import needed
from figure_page import DOCS, SCRIPTS, choose, slide

pytestmark = pytest.mark.slow  # a browser starts


def test_figures_of_a_page_are_apart_and_made_once(opened):
    page = opened("en", "zh")
    assert page.locator(".bn-figure .body").count() == 2
    slide(page, "offset", -6, figure=1)
    choose(page, "eval")
    bars = page.locator(".flow .input")
    assert bars.nth(0).inner_html() != bars.nth(1).inner_html()
    assert page.get_by_role("radio", name="Evaluation").is_checked()
    assert page.get_by_role("radio", name="训练").is_checked()
    before = bars.nth(1).inner_html()
    page.evaluate("() => BNFigure.widget.start()")
    assert page.locator(".bn-figure .body").count() == 2
    assert bars.nth(1).inner_html() == before


WORDS = {
    "en": {
        "slider": [
            "Batch size m", "Offset μ*", "Spread σ*", "Scale γ", "Shift β", "Momentum α",
            "Updates so far t",
        ],
        "radio": ["Training", "Evaluation"],
        "button": ["New sample", "Reset"],
        "group": ["Data", "Layer", "Training and evaluation"],
    },
    "zh": {
        "slider": [
            "批次大小 m", "偏移 μ*", "离散程度 σ*", "缩放 γ", "平移 β", "动量 α", "已更新次数 t",
        ],
        "radio": ["训练", "评估"],
        "button": ["换一批样本", "重置"],
        "group": ["数据", "层", "训练与评估"],
    },
}  # fmt: skip


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_control_and_drawing_has_a_name_in_the_pages_language(opened, language):
    page = opened(language)
    for role, names in WORDS[language].items():
        for name in names:
            assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    assert page.locator("input, button").count() == 11
    assert page.get_by_role("radiogroup").get_attribute("aria-label") in ("Mode", "模式")
    drawings = page.get_by_role("img")
    assert drawings.count() == 3
    for name in drawings.evaluate_all("all => all.map(svg => svg.getAttribute('aria-label'))"):
        assert "5.00" in name or "5.29" in name or "4.00" in name
    chinese = page.locator(".bn-figure").inner_text()
    letters = {letter for letter in chinese if "一" <= letter <= "鿿"}
    assert bool(letters) == (language == "zh")
    assert "undefined" not in page.locator(".bn-figure").inner_html()
    assert "NaN" not in page.locator(".bn-figure").inner_html()


def test_a_change_is_told_to_screen_readers(opened):
    page = opened()
    said = page.get_by_role("status")
    assert said.count() == 2
    assert "In training" in said.nth(0).inner_text()
    slide(page, "updates", 3)
    choose(page, "eval")
    assert "72.9% of it is left" in said.nth(0).inner_text()
    assert "72.9%" in said.nth(1).inner_text()
    assert page.locator(".numbers > [aria-atomic=true]").count() == 4


def test_an_unknown_language_is_english(opened):
    assert opened("fr").get_by_role("button", name="New sample").count() == 1


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An empty folder, and the address that it is served at."""
    root = tmp_path_factory.mktemp("material")
    handler = functools.partial(Quiet, directory=root / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield root, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def material(served):
    """A site by Material for MkDocs that loads pages into the one that is shown."""
    needed("material")
    root, address = served
    (root / "docs").mkdir()
    for folder in ("javascripts", "stylesheets"):
        (root / "docs" / folder).symlink_to(DOCS / folder)
    (root / "docs" / "index.md").write_text("# First\n\n[to the figure](figure.md)\n")
    (root / "docs" / "figure.md").write_text(
        '# Second\n\n<div class="bn-figure" data-lang="en"><em>(needs JavaScript)</em></div>\n'
    )
    scripts = [f"javascripts/bn-figure/{script.name}" for script in SCRIPTS]
    (root / "mkdocs.yml").write_text(
        f"""
site_name: a site
site_url: {address}/
use_directory_urls: false
theme: {{name: material, font: false, features: [navigation.instant]}}
plugins: []
extra_css: [stylesheets/bn-figure.css]
extra_javascript: {scripts}
"""
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet"]
    subprocess.run(command, check=True, cwd=root)
    return root / "site", address


@pytest.mark.slow
@pytest.mark.parametrize("source", ["disk", "server"])
def test_material_shows_a_figure_and_shows_it_again(browser, material, source):
    site, address = material
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(site.joinpath("index.html").as_uri() if source == "disk" else f"{address}/index.html")
    page.evaluate("() => { window.stayed = true; }")
    for _ in range(2):
        page.get_by_role("link", name="to the figure").click()
        page.locator(".bn-figure .flow").wait_for()
        assert page.locator(".bn-figure .body").count() == 1
        slide(page, "size", 2)
        assert "Only the sign is left" in page.locator(".reading").inner_text()
        assert "JavaScript" not in page.locator(".bn-figure").inner_text()
        page.go_back()
        page.get_by_role("link", name="to the figure").wait_for()
    # Pages of a server are put into the one that is shown; those of the disk are loaded anew.
    assert page.evaluate("() => window.stayed === true") == (source == "server")
    assert not errors
    page.close()
