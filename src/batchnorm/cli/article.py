"""`batchnorm article`: open the article that was installed."""

# No `from __future__ import annotations`: the command is defined inside a function, and typer could
# not look up the names in its annotations afterwards.

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import batchnorm
from batchnorm.cli.language import choose_language
from batchnorm.cli.printing import print_text
from batchnorm.errors import BatchNormError

#: Where `make site` builds the site, and an installation from there has it.
SITE = Path(batchnorm.__file__).parent / "site"


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("article")
    def article(
        lang: Annotated[
            str | None,
            typer.Option(metavar="zh|en", help="Its language; the environment's if not given."),
        ] = None,
        only_print: Annotated[
            bool, typer.Option("--print", metavar=" ", help="Print its address, and open nothing.")
        ] = False,
    ) -> None:
        """Open the article on batch normalization, with the whole documentation, offline."""
        address = find(choose_language(lang)).as_uri()
        # Printed in any case: not every browser may open every file, and none says so.
        print_text(Console(), address)
        if not only_print:
            webbrowser.open(address)


def find(language: str) -> Path:
    """Return the article's first page.

    Raises:
        BatchNormError: the site has not been built.
    """
    page = (SITE / "zh" if language == "zh" else SITE) / "article" / "index.html"
    if not page.exists():
        raise BatchNormError(
            f"expected the article in {SITE}, got nothing there: it was not built when batchnorm "
            "was installed. In a clone: make site, then install batchnorm again; or make docs, "
            "which shows it at once. The same text is in docs/article"
        )
    return page
