"""From a name to a report: load the data, do the runs, judge, write everything down."""

from __future__ import annotations

import dataclasses
import operator
import shlex
from collections.abc import Callable
from pathlib import Path

from batchnorm.errors import ArgumentError, InputError
from batchnorm.lab import data as datasets
from batchnorm.lab import results, runner
from batchnorm.lab.experiments import find
from batchnorm.lab.store import Store
from batchnorm.lab.tensorboard import Log
from batchnorm.lab.words import counted

RUNS = "runs"
LOGS = "tensorboard"


def run(
    name: str,
    out: str | Path,
    *,
    profile: str = "quick",
    seeds: int | None = None,
    data: str | Path = "digits",
    jobs: int | None = None,
    progress: runner.Progress | None = None,
    tensorboard: bool = False,
) -> results.Results:
    """Run an experiment, judge it, and write `out`/results.json, report.html, figures/ and runs/.

    Runs that are in `out`/runs already, of the same recipe, data and versions, are not repeated;
    so more seeds cost no more than what they add. Results of another question are not replaced.

    Args:
        name: The experiment, one of `discover()`.
        out: A directory; made if need be.
        profile: "quick" or "full".
        seeds: How many paired evaluation seeds, at least 1; None for the profile's own number.
        data: "digits", or the path of an .npz file with arrays x and y.
        jobs: How many local processes; -1 for one a core; None for what the surrounding
            `joblib.parallel_config` says, so that backend="dask" or "ray" takes it to a cluster.
        progress: Who is told of every finished run.
        tensorboard: Whether every run's measurements also go into `out`/tensorboard, as they come.

    Raises:
        ArgumentError: There is no such experiment or profile, `seeds`, `data`, `jobs` or `out` is
            impossible, or `out` has other results: of another experiment, profile or data set,
            or of more seeds.
        InputError: The data file cannot be used.
        TrialError: Some training runs raised; the others are kept.
        MissingDependencyError: TensorBoard is wanted, and is not installed.
    """
    experiment = find(name)
    if profile not in experiment.profiles:
        known = ", ".join(experiment.profiles)
        raise ArgumentError(f"{name} has no profile {profile!r}. Expected one of: {known}.")
    settings = experiment.profiles[profile]
    if seeds is not None:
        if _whole("seeds", seeds) < 1:
            raise ArgumentError(f"seeds must be at least 1 (2 for any verdict); got {seeds}.")
        settings = dataclasses.replace(settings, seeds=int(seeds))
    if jobs is not None and (_whole("jobs", jobs) < -1 or jobs == 0):
        raise ArgumentError(f"jobs must be at least 1, or -1 for one a core; got {jobs}.")
    if not isinstance(out, (str, Path)) or not str(out):
        raise ArgumentError(
            f"out: expected a directory for the results; got {out!r}. Name one, such as {name!r}, "
            "or '.' for the one you are in."
        )
    progress = progress or runner.Progress()

    directory = Path(out)
    dataset = datasets.load(data)
    results.check_place(directory, experiment, profile, settings, dataset, progress.note)
    log = Log(directory / LOGS, settings, progress.note) if tensorboard else None
    store = Store(directory / RUNS, experiment, dataset.fingerprint)
    if log:
        log.clear()
    runs = runner.execute(
        experiment,
        settings,
        dataset,
        store,
        jobs=jobs,
        progress=progress,
        each=log.add if log else None,
    )
    command = ["batchnorm", "lab", "run", name, "--profile", profile, "--data", str(data)]
    found = results.write(
        directory,
        experiment,
        profile,
        settings,
        dataset,
        runs,
        experiment.analyse(settings, runs),
        shlex.join([*command, "--seeds", str(settings.seeds)]),
    )
    write_report(directory)
    return found


def write_report(directory: str | Path, note: Callable[[str], None] = lambda _: None) -> Path:
    """Make report.html and figures/ from `directory`/results.json; return the report's path.

    The path of results.json itself will do as well; and a directory of such directories, which gets
    a page of all claims. Results in it that cannot be read are left out, and `note` is told.

    Raises:
        InputError: there are no results, or none that can be read.
    """
    # Plotting takes a second to import; workers and `lab list` have no use for it.
    from batchnorm.lab import report

    path = Path(directory)
    if not path.exists():
        raise InputError(
            f"{path}: expected a directory that `batchnorm lab run` has filled, or the "
            f"{results.FILE} in it; there is no such thing. Name one that exists, or make it with "
            f"`batchnorm lab run NAME --out {path}`."
        )
    if path.is_dir():
        return report.build(path, note)
    if path.name != results.FILE:
        raise InputError(
            f"{path}: expected a directory that `batchnorm lab run` has filled, or the "
            f"{results.FILE} in it; got a file of another name. Name its directory: {path.parent}."
        )
    return report.build(path.parent, note)


def _whole(what: str, value: int) -> int:
    try:
        # True is a whole number to Python, and a slip to everybody else.
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ArgumentError(f"{what}: expected a whole number; got {value!r}.")


def default_directory(name: str, *, profile: str, seeds: int | None, data: str | Path) -> str:
    """Return a directory name for a run that says how it differs from the plain one.

    Another data set, profile or number of seeds is other evidence, and must not overwrite the
    first.

    >>> default_directory("convergence", profile="quick", seeds=8, data="digits")
    'convergence'
    >>> default_directory("convergence", profile="full", seeds=3, data="my/wine.npz")
    'convergence-full-wine-3-seeds'
    """
    profiles = find(name).profiles
    parts = [name]
    if profile != "quick":
        parts.append(profile)
    if data != "digits":
        parts.append(Path(data).stem)
    if seeds is not None and profile in profiles and seeds != profiles[profile].seeds:
        parts.append(counted(seeds, "seed").replace(" ", "-"))
    return "-".join(parts)
