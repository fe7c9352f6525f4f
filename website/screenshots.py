"""Take the README's pictures of what moves, from the built site and from the playground.

    make site && python website/screenshots.py

Needs Chromium (`make browser`), and a Chinese font. In `docs/images`, in each language:
`figure-*.png`, chapter 4's figure after ten updates, in evaluation; `playground-*.png`, its first
example when it has trained.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SITE = ROOT / "src" / "batchnorm" / "site"
CHAPTERS = {
    "en": SITE / "article" / "04-train-and-eval.html",
    "zh": SITE / "zh" / "article" / "04-train-and-eval.html",
}

#: A README is shown about 850 pixels wide; twice that is sharp where a pixel is two.
WIDTH, SCALE = 1100, 1.5

#: Seconds; a run of the playground takes some 20 where nothing else does.
PATIENCE = 120


def figure(browser: Browser, language: str) -> None:
    """Chapter 4's figure: what running statistics that have not settled do."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE)
    page.goto(CHAPTERS[language].as_uri())
    shown = page.locator(".bn-figure").first
    shown.locator("input[value=eval]").check()
    shown.screenshot(path=IMAGES / f"figure-{language}.png")


def playground(browser: Browser, language: str) -> None:
    """The playground's first example, from start to end."""
    command = [sys.executable, "-m", "batchnorm", "playground", "--no-browser", "--port", "0"]
    command += ["--lang", language]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            address = process.stdout.readline().split()[0]
            page = browser.new_page(
                viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE
            )
            page.goto(address)
            page.click("#start")
            page.wait_for_selector(".status.done", timeout=1000 * PATIENCE)
            page.screenshot(path=IMAGES / f"playground-{language}.png", full_page=True)
        finally:
            process.terminate()


def main() -> None:
    """Take them all."""
    if missing := [chapter for chapter in CHAPTERS.values() if not chapter.exists()]:
        sys.exit(f"{missing[0]}: expected the built site; make it by: make site")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        sys.exit("expected Chromium; install it by: make browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        for language in CHAPTERS:
            figure(browser, language)
            playground(browser, language)
        browser.close()


if __name__ == "__main__":
    main()
