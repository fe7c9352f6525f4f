"""`batchnorm article`: the right page, opened or printed; and what to do where there is none."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from batchnorm import cli
from batchnorm.cli import article
from batchnorm.cli.language import choose_language
from batchnorm.errors import ArgumentError, BatchNormError

PAGES = {"en": "article/index.html", "zh": "zh/article/index.html"}


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A site of two pages."""
    folder = tmp_path / "the site"
    for name in PAGES.values():
        page = folder / name
        page.parent.mkdir(parents=True)
        page.touch()
    monkeypatch.setattr(article, "SITE", folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli._command(), ["article", *arguments])


@pytest.mark.parametrize("language", PAGES)
def test_its_address_is_printed(built, language):
    done = run("--lang", language, "--print")
    assert done.exit_code == 0
    assert done.stdout == (built / PAGES[language]).as_uri() + "\n"
    assert "the%20site" in done.stdout  # can be given to a browser as it is


def browser(folder, monkeypatch, *, works):
    """A program that notes what it was asked to open, as the user's browser."""
    script = folder / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > {folder}/opened\nexit {0 if works else 1}\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    monkeypatch.setattr("webbrowser._tryorder", None)


@pytest.mark.skipif(sys.platform == "win32", reason="browsers are found otherwise there")
def test_a_browser_opens_it(built, tmp_path, monkeypatch):
    browser(tmp_path, monkeypatch, works=True)
    done = run("--lang", "zh")
    opened = (tmp_path / "opened").read_text()
    assert opened == (built / PAGES["zh"]).as_uri() + "\n"
    assert (done.exit_code, done.stdout) == (0, opened)


@pytest.mark.skipif(sys.platform == "win32", reason="browsers are found otherwise there")
def test_without_a_browser_its_address_is_printed(built, tmp_path, monkeypatch):
    browser(tmp_path, monkeypatch, works=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # and there is no other
    done = run("--lang", "en")
    assert (done.exit_code, done.stdout) == (0, (built / PAGES["en"]).as_uri() + "\n")


def test_the_language_is_the_terminals(built, monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "C")
    assert choose_language(None) == "en"
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert choose_language(None) == "zh"
    assert run("--print").stdout.endswith("/zh/article/index.html\n")
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    assert choose_language(None) == "en"
    monkeypatch.setenv("LC_ALL", "zh_TW.UTF-8")
    assert choose_language(None) == "zh"
    assert choose_language("en") == "en"


def test_another_language_is_refused(built):
    with pytest.raises(ArgumentError, match="expected --lang zh or en, got 'fr'"):
        choose_language("fr")
    assert isinstance(run("--lang", "fr").exception, ArgumentError)


def test_without_a_site_it_says_how_to_build_one(tmp_path, monkeypatch):
    monkeypatch.setattr(article, "SITE", tmp_path / "none")
    with pytest.raises(BatchNormError, match="make site"):
        article.find("zh")


def test_the_command_says_so_without_a_traceback(tmp_path):
    program = (
        "import sys; from pathlib import Path; from batchnorm import cli\n"
        f"from batchnorm.cli import article; article.SITE = Path({str(tmp_path)!r})\n"
        "sys.argv = ['batchnorm', 'article']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: expected the article in ")
    assert "Traceback" not in done.stderr
