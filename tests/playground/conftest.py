"""The playground as a visitor has it: served by the command, in a real browser."""

import pytest

import playground_command
from browser import chromium


@pytest.fixture(scope="module")
def served():
    """The process and its address. When all tabs are closed, nothing of them is kept."""
    pytest.importorskip("gradio")
    keeping = playground_command.KEEPING
    with playground_command.serving("--lang", "en", code=keeping) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser):
    """Opens a page in a new tab; fails at the end of errors, and of requests to elsewhere."""
    contexts, wrong = [], []

    def open_tab(address, *, width=1200):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)

        def note(request):
            if not request.url.startswith((f"{address}/", "data:", "blob:")):
                wrong.append(request.url)

        context.on("request", note)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("#start")
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert not wrong
