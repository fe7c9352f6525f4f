"""The `batchnorm` command: parse, call, print."""

# No `from __future__ import annotations`: the commands are defined inside a function, and typer
# could not look up the names in their annotations afterwards.

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from batchnorm._version import __version__
from batchnorm.errors import BatchNormError

if TYPE_CHECKING:
    from typer import Typer

# What a shell expects of a program that Ctrl-C has stopped: 128 + SIGINT.
INTERRUPTED = 130

# What a shell expects of a program that was given something it cannot use.
MISUSED = 2

# `bench` has found a result of ours that is wrong.
WRONG_RESULT = 1

# In paragraphs of one line each: rich would keep the breaks of a docstring, and add its own.
BENCH_HELP = (
    "Measure how fast the layer is, beside torch eager and torch.compile.\n\n"
    "All take turns in each round; a ratio is the median over rounds of their time over ours, and "
    "the median of those over several processes. On the CPU everything is measured twice: with the "
    "allocator as it is, and set up to keep its memory, so that page faults are not counted as "
    "kernels.\n\n"
    "Every result is first compared with float64: where ours is wrong there is no ratio, and the "
    "exit status is 1. Ctrl-C keeps what has been measured, if a file was asked for."
)

# The experiment of `lab run` without a name.
MAIN_EXPERIMENT = "convergence"

OUT = Path("batchnorm-lab")


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
    import typer
    from rich.console import Console

    plain: dict[str, Any] = {
        "no_args_is_help": True,
        "pretty_exceptions_enable": False,
        "context_settings": {"help_option_names": ["-h", "--help"]},
    }
    app = typer.Typer(
        help="Batch normalization for PyTorch, and the evidence for it.",
        add_completion=False,
        **plain,
    )
    lab_app = typer.Typer(
        help="Put the claims made for batch normalization to the test, on your own machine.",
        **plain,
    )
    app.add_typer(lab_app, name="lab")

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

    @lab_app.command("list")
    def list_experiments() -> None:
        """List the experiments: the claim that each one tests, and who made it."""
        from batchnorm import lab

        rows = [(e.name, e.claim, e.source) for e in lab.discover().values()]
        _print_table(Console(), ("name", "claim", "paper"), rows)

    @lab_app.command("run")
    def run(
        names: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="NAME",
                help=f"Experiments to run, as `batchnorm lab list` names them; {MAIN_EXPERIMENT} "
                "if none is named.",
            ),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help=f"Where the results go; {OUT}/NAME if not given, with the profile, the data "
                "file and the seeds added where they are not the plain ones (such as "
                f"{OUT}/NAME-full-wine-3-seeds). Several experiments get a directory each below "
                "DIR.",
            ),
        ] = None,
        seeds: Annotated[
            int | None,
            typer.Option(
                min=1,
                metavar="N",
                help="Paired seeds to base the verdict on; the profile's own number if not given.",
            ),
        ] = None,
        profile: Annotated[
            str,
            typer.Option(
                metavar="quick|full",
                help="quick takes a minute; full, a finer and longer sweep, about seven on 2 cores "
                "(an estimate from single runs).",
            ),
        ] = "quick",
        data: Annotated[
            str,
            typer.Option(
                metavar="digits|PATH",
                help="scikit-learn's handwritten digits, or an .npz file with arrays x (rows "
                "first) and y (whole-number classes). The columns of a 2-D x are scaled one by "
                "one, an x of more dimensions as a whole.",
            ),
        ] = "digits",
        jobs: Annotated[
            int | None,
            typer.Option(
                min=1, metavar="N", help="Processes to train in; one a core if not given."
            ),
        ] = None,
    ) -> None:
        """Run experiments: train, judge each claim, write a report.

        Ctrl-C loses no finished training run. The same command goes on where it stopped.
        """
        from batchnorm import lab
        from batchnorm.lab.progress import watch
        from batchnorm.lab.words import counted

        names = names or [MAIN_EXPERIMENT]
        for name in names:
            lab.find(name)
        for name in names:
            if out:
                directory = out if len(names) == 1 else out / name
            else:
                directory = OUT / lab.default_directory(
                    name, profile=profile, seeds=seeds, data=data
                )
            try:
                with watch(Console(stderr=True)) as progress:
                    found = lab.run(
                        name,
                        directory,
                        profile=profile,
                        seeds=seeds,
                        data=data,
                        jobs=jobs or -1,
                        progress=progress,
                    )
            except KeyboardInterrupt:
                kept = len(list((directory / lab.RUNS).glob("*.json")))
                _print_text(
                    Console(stderr=True),
                    f"Stopped. {counted(kept, 'finished run')} kept in {directory / lab.RUNS}. "
                    f"To go on from there:\n  {shlex.join(['batchnorm', *sys.argv[1:]])}",
                )
                raise typer.Exit(INTERRUPTED) from None
            _print_findings(Console(), found.content)
            _print_text(Console(), f"Report: {directory / 'report.html'}")

    @lab_app.command("report")
    def report(
        directory: Annotated[
            Path,
            typer.Argument(metavar="DIR", help="What `lab run` has filled, or its results.json."),
        ],
    ) -> None:
        """Make report.html and the figures again, from results.json alone."""
        from batchnorm import lab

        _print_text(Console(), f"Report: {lab.write_report(directory)}")

    _add_bench(app)
    return app


def _add_bench(app: "Typer") -> None:
    import typer
    from rich.console import Console

    @app.command("bench", help=BENCH_HELP)
    def bench(
        suite: Annotated[
            str,
            typer.Option(
                metavar="quick|full",
                help="quick takes about a minute; full, every case and torch.compile for each, "
                "about half an hour on 2 cores (an estimate).",
            ),
        ] = "quick",
        device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to compute.")] = "cpu",
        json: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="Write all that was measured there, and a page and figures beside it.",
            ),
        ] = None,
        threads: Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Threads; as many as torch takes if not given."),
        ] = None,
        text: Annotated[
            str,
            typer.Option(
                "--filter",
                metavar="TEXT",
                help="Only cases with TEXT in their names, such as 8x64x56x56 or bfloat16.",
            ),
        ] = "",
    ) -> None:
        from batchnorm import bench
        from batchnorm.bench import report
        from batchnorm.bench.progress import Bar

        if json:
            bench.prepare(json)
        try:
            with Bar(Console(stderr=True)) as progress:
                content = bench.run(
                    suite, device=device, threads=threads, text=text, progress=progress
                )
        except bench.Interrupted as stopped:
            kept = bench.save(stopped.content, json) if json and stopped.content else ()
            nothing = "nothing had been measured" if json else "without --json nothing is kept"
            words = "what was measured is kept" if kept else nothing
            _print_text(Console(stderr=True), f"Interrupted: {words}.")
            for path in kept:
                _print_text(Console(stderr=True), f"Written: {path}")
            raise typer.Exit(INTERRUPTED) from None
        report.show(content, Console())
        for path in bench.save(content, json) if json else ():
            _print_text(Console(), f"Written: {path}")
        if bench.refused(content):
            raise typer.Exit(WRONG_RESULT)


def _print_findings(console: Any, content: dict[str, Any]) -> None:
    from rich.text import Text

    findings = content["findings"]
    table, verdict = findings["table"], findings["verdict"]
    colour = {"reproduced": "green", "contradicted": "red"}.get(verdict["outcome"], "yellow")
    console.print()
    console.print(Text(content["experiment"]["claim"], style="bold"))
    _print_table(console, table["columns"], table["rows"])
    console.print(Text(verdict["outcome"].upper(), style=f"bold {colour}"))
    for line in (findings["summary"], verdict["sentence"], *findings["caveats"]):
        console.print(line, highlight=False, markup=False)
    console.print()


def _print_table(console: Any, columns: Any, rows: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # Eight columns with their numbers just fit into 80 characters, with gaps as narrow as these.
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def _print_text(console: Any, text: str) -> None:
    """Print without breaking lines: a path or a command must survive being copied."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
