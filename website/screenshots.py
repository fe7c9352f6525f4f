"""Take the README's pictures of what moves, from the built site and from the playground.

    make site && python website/screenshots.py

Needs Chromium (`make browser`). In `docs/images`: `figure.png`, chapter 4's figure after ten updates,
in evaluation; `playground.png`, its first example when it has trained.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
CHAPTER = ROOT / "src" / "batchnorm" / "site" / "article" / "04-train-and-eval.html"

#: A README is shown about 850 pixels wide; twice that is sharp where a pixel is two.
WIDTH, SCALE = 1100, 1.5

#: Seconds; a run of the playground takes some 20 where nothing else does.
PATIENCE = 120


def figure(browser: Browser) -> None:
    """Chapter 4's figure: what running statistics that have not settled do."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE)
    page.goto(CHAPTER.as_uri())
    shown = page.locator(".bn-figure").first
    shown.get_by_text("Evaluation", exact=True).click()
    shown.screenshot(path=IMAGES / "figure.png")


def playground(browser: Browser) -> None:
    """The playground's first example, from start to end."""
    command = [sys.executable, "-m", "batchnorm", "playground", "--no-browser", "--port", "0"]
    with subprocess.Popen([*command, "--lang", "en"], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            address = process.stdout.readline().split()[0]
            page = browser.new_page(
                viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE
            )
            page.goto(address)
            page.click("#start")
            page.wait_for_selector(".status.done", timeout=1000 * PATIENCE)
            page.screenshot(path=IMAGES / "playground.png", full_page=True)
        finally:
            process.terminate()


def main() -> None:
    """Take them all."""
    if not CHAPTER.exists():
        sys.exit(f"{CHAPTER}: expected the built site; make it by: make site")
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        for picture in (figure, playground):
            picture(browser)
        browser.close()


if __name__ == "__main__":
    main()
