"""Debian's Chromium, driven by Playwright: the tests that need a real browser share it."""

import importlib
import os
import shutil
from contextlib import contextmanager

import pytest

#: As root and on a machine without a network, Chromium needs these to start and to stay silent.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def needed(module):
    """Import what pages are tested with; skip without it, or fail where CI says it is there."""
    if os.environ.get("BATCHNORM_BROWSER") == "required":
        return importlib.import_module(module)
    return pytest.importorskip(module)


def executable():
    """Where Chromium is. Without it a test is skipped, or fails where CI says it must be there."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        reason = "no Chromium: `make browser` installs Debian's"
        if os.environ.get("BATCHNORM_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def chromium():
    """A running browser."""
    api = needed("playwright.sync_api")
    path = executable()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
