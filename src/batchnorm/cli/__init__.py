"""The `batchnorm` command: parse, call, print."""

# No `from __future__ import annotations`: the commands are defined inside a function, and typer
# could not look up the names in their annotations afterwards.

import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

from batchnorm._version import __version__
from batchnorm.cli.status import INTERRUPTED, MISUSED
from batchnorm.errors import BatchNormError


def main() -> None:
    """Run the command; an error that the user can mend is one message, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no "–" shows "?" instead, and the run goes on.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        command = _command()
    except ImportError as error:
        _fail(
            f"the batchnorm command needs {error.name}, which is not installed. Install it with: "
            "pip install --no-build-isolation '.[lab]' (in the clone)"
        )
    try:
        command()
    except BatchNormError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(MISUSED)


def _command() -> Callable[[], Any]:
    """Return the whole command; typer and rich are imported here, where their absence is caught."""
    import rich  # noqa: F401
    import typer

    from batchnorm.cli import article, bench, exercise, lab, playground, tools

    plain: dict[str, Any] = {
        "no_args_is_help": True,
        "pretty_exceptions_enable": False,
        "context_settings": {"help_option_names": ["-h", "--help"]},
    }
    app = typer.Typer(
        help="Batch normalization for PyTorch: what is wrong with it, and the evidence for it.",
        add_completion=False,
        **plain,
    )
    lab_app = typer.Typer(
        help="Put the claims made for batch normalization to the test, on your own machine.",
        **plain,
    )
    tools.add(app)
    app.add_typer(lab_app, name="lab")
    lab.add(lab_app)
    bench.add(app)
    article.add(app)
    exercise.add(app)
    playground.add(app)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"batchnorm {__version__}")
            raise typer.Exit

    @app.callback()
    def batchnorm(
        version: Annotated[
            bool,
            typer.Option(
                "--version",
                metavar=" ",
                help="Print the version.",
                callback=show_version,
                is_eager=True,
            ),
        ] = False,
    ) -> None:
        pass

    return app
