"""`batchnorm playground`."""

# No `from __future__ import annotations`: the commands are defined inside a function, and typer
# could not look up the names in their annotations afterwards.

import threading
import webbrowser
from typing import Annotated

import typer
from rich.console import Console

from batchnorm.cli.language import choose_language
from batchnorm.cli.printing import print_text

PLAYGROUND_HELP = (
    "Train two small networks side by side in the browser, one with batch normalization.\n\n"
    "Depth, activation, learning rate, batch size and initial weights are yours to choose. The "
    "page is served by this machine, and to nobody else unless --host says so. Ctrl-C ends it."
)


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("playground", help=PLAYGROUND_HELP)
    def playground(
        port: Annotated[
            int | None,
            typer.Option(
                min=0, max=65535, metavar="N", help="7860, or the next free one, if not given."
            ),
        ] = None,
        host: Annotated[
            str,
            typer.Option(
                metavar="ADDRESS",
                help="Where to listen. With 0.0.0.0 others on your network reach the page, too.",
            ),
        ] = "127.0.0.1",
        lang: Annotated[
            str | None,
            typer.Option(
                metavar="zh|en", help="Of the page at first; the environment's if not given."
            ),
        ] = None,
        browser: Annotated[
            bool,
            typer.Option(
                "--browser/--no-browser", metavar=" ", help="Open the page in a browser, or not."
            ),
        ] = True,
    ) -> None:
        language = choose_language(lang)
        from batchnorm.playground import server

        with server.listen(host, port) as found:
            console = Console(stderr=True)
            # What follows imports for seconds.
            print_text(console, "Starting.")
            if not server.is_loopback(found):
                print_text(
                    console,
                    f"Note: {host} is no loopback address. Others on the network can reach the "
                    "page and make this machine train.",
                )

            def ready() -> None:
                print_text(Console(), f"{server.address(found)} (Ctrl-C ends it)")
                if browser:
                    # Some browsers are waited for until they end; the page is served after this.
                    threading.Thread(
                        target=webbrowser.open, args=[server.address(found)], daemon=True
                    ).start()

            server.serve(found, language, ready)
