"""The interactive figure in a page of its own, read from the disk by a real browser."""

import pytest

from browser import chromium
from figure_page import written


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page with a figure for each language; at the end nothing has been wrong in any."""
    contexts, wrong = [], []

    def request(asked):
        if not asked.url.startswith(("file:", "data:")):
            wrong.append(f"asked for {asked.url}")

    def open_page(*languages, scheme=None, width=1200, **options):
        viewport = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", request)
        page.goto(written(tmp_path / f"{len(contexts)}.html", languages or ("en",), scheme))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """One English figure, for tests that leave it as they found it or reset it."""
    shown = browser.new_page(viewport={"width": 1200, "height": 900})
    shown.goto(written(tmp_path_factory.mktemp("figure") / "page.html", ("en",), None))
    yield shown
    shown.close()
