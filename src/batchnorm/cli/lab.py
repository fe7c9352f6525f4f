"""`batchnorm lab`: list, run, report."""

# No `from __future__ import annotations`: the commands are defined inside a function, and typer
# could not look up the names in their annotations afterwards.

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from batchnorm.cli.printing import print_table, print_text
from batchnorm.cli.status import INTERRUPTED
from batchnorm.errors import ArgumentError, BatchNormError

# The experiment of `lab run` without a name.
MAIN_EXPERIMENT = "convergence"

OUT = Path("batchnorm-lab")

# In the place of minutes that nobody has measured.
UNTIMED = "–"


def add(lab_app: typer.Typer) -> None:
    """Add the commands."""

    @lab_app.command("list")
    def list_experiments() -> None:
        """List the experiments: the claim that each one tests, who made it, and how long it takes.

        Minutes are estimates for this machine with all its cores, from runs timed elsewhere.
        """
        from batchnorm import lab

        minutes = lab.minutes.expected()
        rows = [
            (
                e.name,
                f"{e.claim}\n{e.source}\n",
                *(_minutes(minutes, e.name, profile) for profile in ("quick", "full")),
            )
            for e in lab.discover().values()
        ]
        console = Console()
        print_table(console, ("name", "claim and paper", "quick min", "full min"), rows)
        if any(UNTIMED in row for row in rows):
            print_text(console, f"{UNTIMED} not timed yet")

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
        everything: Annotated[
            bool, typer.Option("--all", help="Run every experiment, and write a page of all.")
        ] = False,
        out: Annotated[
            # Not a Path: an empty one is the current directory.
            str | None,
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
                help="quick takes seconds to a minute; full, a finer and longer sweep with 8 "
                "seeds, minutes. `batchnorm lab list` tells how many.",
            ),
        ] = "quick",
        data: Annotated[
            str,
            typer.Option(
                metavar="digits|PATH",
                help="scikit-learn's handwritten digits, or an .npz file with arrays x (rows "
                "first) and y (whole-number classes). The columns of a 2-D x are scaled one by "
                "one, an x of more dimensions as a whole. Or a folder with the files of MNIST or "
                "CIFAR.",
            ),
        ] = "digits",
        jobs: Annotated[
            int | None,
            typer.Option(
                min=1, metavar="N", help="Processes to train in; one a core if not given."
            ),
        ] = None,
        tensorboard: Annotated[
            bool,
            typer.Option(
                "--tensorboard",
                help="Also log every run, as it is finished, for `tensorboard --logdir DIR`.",
            ),
        ] = False,
    ) -> None:
        """Run experiments: train, judge each claim, write a report.

        Ctrl-C loses no finished training run. The same command goes on where it stopped.
        """
        if everything and names:
            raise ArgumentError("expected names or --all, got both; give one of them")
        if out == "":
            raise ArgumentError(
                "--out: expected a directory, got an empty name; name one, leave --out away for "
                f"one below {OUT}, or give '.' for the one you are in"
            )
        # What follows imports for seconds.
        print_text(Console(stderr=True), "Starting.")
        from batchnorm import lab

        names = list(lab.discover()) if everything else names or [MAIN_EXPERIMENT]
        options = {
            "profile": profile,
            "seeds": seeds,
            "data": data,
            "jobs": jobs or -1,
            "tensorboard": tensorboard,
        }
        own = {
            name: lab.default_directory(name, profile=profile, seeds=seeds, data=data)
            for name in names
        }
        _warn_of_few_seeds(names, profile, seeds)
        if len(own) == 1:
            (name,) = own
            _run(name, Path(out) if out else OUT / own[name], options)
        else:
            _run_several(Path(out) if out else OUT, own, options)

    @lab_app.command("report")
    def report(
        directory: Annotated[
            Path,
            typer.Argument(
                metavar="DIR",
                help="What `lab run` has filled, or its results.json; or a directory of such, for "
                "a page with all claims.",
            ),
        ],
    ) -> None:
        """Make report.html and the figures again, from results.json alone."""
        from batchnorm import lab

        page = lab.write_report(
            directory, lambda message: print_text(Console(stderr=True), message)
        )
        print_text(Console(), f"Report: {page}")


def _warn_of_few_seeds(names: Sequence[str], profile: str, seeds: int | None) -> None:
    """Say it before the time is spent. Not of the quick profile's own: they are few by design."""
    from batchnorm import lab
    from batchnorm.lab.verdict import ENOUGH_SEEDS
    from batchnorm.lab.words import counted

    if seeds is None:
        profiles = [] if profile == "quick" else [lab.find(name).profiles for name in names]
        # A profile that is not there is told by the run.
        own = [known[profile].seeds for known in profiles if profile in known]
        seeds = min(own, default=ENOUGH_SEEDS)
    if seeds < ENOUGH_SEEDS:
        few = "decides nothing" if seeds == 1 else "are few: they easily agree by chance"
        print_text(
            Console(stderr=True),
            f"Note: {counted(seeds, 'seed')} {few}. Better: --seeds {ENOUGH_SEEDS}.",
        )


def _colour(judged: dict[str, Any]) -> str:
    outcome = judged["verdict"]["outcome"]
    return {"reproduced": "green", "contradicted": "red"}.get(outcome, "yellow")


def _run(name: str, directory: Path, options: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Run one experiment, print what it found, and return its results."""
    from batchnorm import lab
    from batchnorm.lab.progress import watch
    from batchnorm.lab.words import counted

    try:
        with watch(Console(stderr=True)) as progress:
            if place:
                progress.note(f"{name} ({place})")
            results = lab.run(name, directory, progress=progress, **options)
    except KeyboardInterrupt:
        kept = len(list((directory / lab.RUNS).glob("*.json")))
        print_text(
            Console(stderr=True),
            f"Stopped. {counted(kept, 'finished run')} kept in {directory / lab.RUNS}. "
            f"To go on from there:\n  {shlex.join(['batchnorm', *sys.argv[1:]])}",
        )
        raise typer.Exit(INTERRUPTED) from None
    _print_findings(Console(), results.content)
    print_text(Console(), f"Report: {directory / 'report.html'}")
    return results.content


def _run_several(parent: Path, folders: dict[str, str], options: dict[str, Any]) -> None:
    """Run one after the other; those that cannot be done are named at the end."""
    from batchnorm import lab
    from batchnorm.lab.results import check_parent

    check_parent(parent)
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for number, (name, folder) in enumerate(folders.items(), start=1):
        try:
            found.append(_run(name, parent / folder, options, f"{number} of {len(folders)}"))
        except BatchNormError as error:
            # One experiment that these data do not suit must not cost the others.
            if str(error) not in failed.values():
                print_text(Console(stderr=True), f"{name} could not be done. {error}")
            failed[name] = str(error)
    if found:
        _print_outcomes(Console(), found)
        page = lab.write_report(parent, lambda message: print_text(Console(stderr=True), message))
        print_text(Console(), f"All claims in {parent} on one page: {page}")
    if failed:
        raise BatchNormError(
            f"{len(failed)} of {len(folders)} experiments could not be done, for the reasons "
            f"given above: {', '.join(failed)}. The others are finished and reported."
        )


def _minutes(expected: dict[str, dict[str, float]], name: str, profile: str) -> str:
    minutes = expected.get(name, {}).get(profile)
    return UNTIMED if minutes is None else f"{minutes:.1f}"


def _print_outcomes(console: Any, contents: list[dict[str, Any]]) -> None:
    """Print a line a claim."""
    rows = []
    for content in contents:
        findings = content["findings"]
        judged = [(content["experiment"]["claim"], findings["verdict"])]
        judged += [(other["claim"], other["verdict"]) for other in findings["also"]]
        for place, (claim, verdict) in enumerate(judged):
            name = "" if place else content["experiment"]["name"]
            rows.append((name, claim, verdict["outcome"]))
    print_table(console, ("experiment", "claim", "outcome"), rows)


def _print_findings(console: Any, content: dict[str, Any]) -> None:
    from rich.text import Text

    findings = content["findings"]
    table, verdict = findings["table"], findings["verdict"]
    colour = _colour(findings)
    console.print()
    console.print(Text(content["experiment"]["claim"], style="bold"))
    print_table(console, table["columns"], table["rows"])
    console.print(Text(verdict["outcome"].upper(), style=f"bold {colour}"))
    for line in (findings["summary"], verdict["sentence"], *findings["caveats"]):
        console.print(line, highlight=False, markup=False)
    for other in findings.get("also", ()):
        outcome = Text(other["verdict"]["outcome"].upper(), style=f"bold {_colour(other)}")
        console.print(outcome.append(f" {other['claim']}", style="default not bold"))
        console.print(other["verdict"]["sentence"], highlight=False, markup=False)
    console.print()
