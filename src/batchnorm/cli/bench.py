"""`batchnorm bench`."""

# No `from __future__ import annotations`: the commands are defined inside a function, and typer
# could not look up the names in their annotations afterwards.

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from batchnorm.cli.printing import print_text
from batchnorm.cli.status import INTERRUPTED, WRONG_RESULT

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


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("bench", help=BENCH_HELP)
    def bench(
        suite: Annotated[
            str,
            typer.Option(
                metavar="quick|full|gpu",
                help="quick takes about a minute; full, every case and torch.compile for each, "
                "about half an hour on 2 cores (an estimate); gpu needs a CUDA GPU.",
            ),
        ] = "quick",
        device: Annotated[
            str | None,
            typer.Option(
                metavar="cpu|cuda", help="Where to compute; where the suite belongs if not given."
            ),
        ] = None,
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
            print_text(Console(stderr=True), f"Interrupted: {words}.")
            for path in kept:
                print_text(Console(stderr=True), f"Written: {path}")
            raise typer.Exit(INTERRUPTED) from None
        report.show(content, Console())
        for path in bench.save(content, json) if json else ():
            print_text(Console(), f"Written: {path}")
        if bench.refused(content):
            raise typer.Exit(WRONG_RESULT)
