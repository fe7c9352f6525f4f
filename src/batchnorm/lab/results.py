"""results.json: everything that an experiment found, and all that its report is made from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import torch

from batchnorm._version import __version__
from batchnorm.errors import ArgumentError, InputError
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Findings, Run, Settings, find
from batchnorm.lab.store import strict, write_atomically
from batchnorm.lab.words import counted

FILE = "results.json"
PAGE, CLAIMS, FIGURES = "report.html", "claims.md", "figures"
SCHEMA = 2

# What is in every page that the lab has made.
MARK = b"batchnorm lab"

# What every results.json begins with, as `write` makes it.
BEGINNING = b'{"schema":'


@dataclass(frozen=True)
class Results:
    """The content of a results.json, and the experiment that it belongs to."""

    experiment: Experiment[Any, Any]
    content: dict[str, Any]

    @property
    def runs(self) -> list[Run[Any]]:
        """Return the runs in the order of the plan."""
        return [
            Run(self.experiment.trial(**run["trial"]), run["measured"], run["timing"])
            for run in self.content["runs"]
        ]

    @property
    def settings(self) -> Settings:
        """Return the settings that the runs were planned with."""
        kind: type[Settings] = type(next(iter(self.experiment.profiles.values())))
        return kind(**{key: _tuples(value) for key, value in self.content["settings"].items()})


@dataclass(frozen=True)
class _Question:
    """What results answer; to answer another one in the same place would lose them."""

    experiment: str
    profile: str
    data: str
    fingerprint: str
    seeds: int

    def __str__(self) -> str:
        return (
            f"{self.experiment}, profile {self.profile}, {counted(self.seeds, 'seed')}, data "
            f"{self.data} ({self.fingerprint[:8]})"
        )


def check_place(
    directory: Path,
    experiment: Experiment[Any, Any],
    profile: str,
    settings: Settings,
    data: Dataset,
    note: Callable[[str], None],
) -> None:
    """Raise ArgumentError if new results would replace some that they do not contain.

    The same question may be asked again: after an interruption, with more seeds (the kept runs are
    part of them), with a newer recipe or version. Half a file of ours is worth nothing; `note` is
    told.
    """
    path = directory / FILE
    below = (other for other in directory.glob(f"*/{FILE}") if _begins_as_ours(other))
    if several := sorted(other.parent.name for other in below):
        raise ArgumentError(
            f"{directory} has the results of several experiments ({', '.join(several)}), and a "
            "page of all of them; one experiment needs a directory of its own. Choose another one "
            f"with --out, such as {directory / experiment.name}."
        )
    remedy = f"Choose another directory (--out), or delete {path} if you do not need it."
    check_pages(directory)
    if not path.exists():
        figures = directory / FIGURES
        if figures.exists() and not (directory / PAGE).exists():
            raise ArgumentError(
                f"{figures} is in the way: figures of these results go there, and it is not the "
                "lab's. Choose another directory (--out)."
            )
        return
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ArgumentError(
            f"{path} is in the way: expected results or none; it cannot be read "
            f"({error.strerror}). {remedy}"
        ) from error
    except ValueError as error:
        if _begins_as_ours(path):
            note(f"{path} is damaged; it is written anew.")
            return
        raise _not_ours(path, remedy) from error
    try:
        there = _Question(
            content["experiment"]["name"],
            content["profile"],
            content["data"]["name"],
            content["data"]["fingerprint"],
            content["settings"]["seeds"],
        )
        asked = _Question(
            experiment.name,
            profile,
            data.name,
            data.fingerprint,
            settings.seeds,
        )
        # A name is no more than a word for the data; the fingerprint is the data.
        same = replace(asked, seeds=there.seeds, data=there.data) == there
        lost = not same or there.seeds > asked.seeds
    except (KeyError, TypeError) as error:
        raise _not_ours(path, remedy) from error
    if lost:
        raise ArgumentError(
            f"{path} has other results, and they would be lost. There: {there}. Asked for: "
            f"{asked}. {remedy}"
        )


def _begins_as_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINNING)) == BEGINNING
    except OSError:
        return False


def _not_ours(path: Path, remedy: str) -> ArgumentError:
    return ArgumentError(
        f"{path} is in the way: expected results of an experiment; it is something else, and would "
        f"be lost. {remedy}"
    )


def check_parent(directory: Path) -> None:
    """Raise ArgumentError if there are results of one experiment where several are to go."""
    if (directory / FILE).exists():
        raise ArgumentError(
            f"{directory} holds the results of one experiment; several need a directory for their "
            "own. Choose another one with --out."
        )
    check_pages(directory)


def check_pages(directory: Path) -> None:
    """Raise ArgumentError if a page would replace a file that is not the lab's."""
    for name in (PAGE, CLAIMS):
        path = directory / name
        if path.is_file() and MARK not in path.read_bytes():
            raise ArgumentError(
                f"{path} is in the way: it is not the lab's, and would be replaced. Choose another "
                "directory, or move it."
            )


def write(
    directory: Path,
    experiment: Experiment[Any, Any],
    profile: str,
    settings: Settings,
    data: Dataset,
    runs: list[Run[Any]],
    findings: Findings,
    command: str,
) -> Results:
    """Write results.json, in strict JSON, and return its content."""
    content = {
        "schema": SCHEMA,
        "experiment": {
            key: getattr(experiment, key) for key in ("name", "claim", "source", "recipe")
        },
        "command": command,
        "profile": profile,
        "settings": asdict(settings),
        "seeds": _seeds(runs),
        "data": data.describe(),
        "environment": environment(),
        "findings": asdict(findings),
        "runs": [asdict(run) for run in runs],
    }
    # Without spaces: long curves are most of it.
    text = json.dumps(strict(content), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text += "\n"
    write_atomically(directory / FILE, text)
    return Results(experiment, json.loads(text))


def read(directory: Path) -> Results:
    """Read a results.json back; InputError if it is not one."""
    path = directory / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise InputError(
                f"{path}: expected schema {SCHEMA}; got {content['schema']}. Read it with the "
                f"batchnorm that wrote it ({content['environment']['batchnorm']}); this is "
                f"{__version__}."
            )
        results = Results(find(content["experiment"]["name"]), content)
        planned = results.experiment.plan(results.settings, results.runs)
        missing = len(set(planned) - {run.trial for run in results.runs})
        if missing:
            raise InputError(
                f"{path}: expected every planned run; {missing} of {len(planned)} are missing. "
                "Give the run command again: it rewrites the file from the finished runs."
            )
        for part in ("command", "profile", "seeds", "data", "environment", "findings"):
            _ = content[part]
    except FileNotFoundError as error:
        raise InputError(
            f"{directory}: expected a directory that `batchnorm lab run` has filled; there is no "
            f"{FILE} in it. An interrupted run has none: give the same run command again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: expected the results of an experiment; it does not read as such "
            f"({type(error).__name__}: {error}). Give the run command again: it rewrites the file "
            "from the finished runs."
        ) from error
    return results


def environment() -> dict[str, Any]:
    """Return the versions and the machine, as far as results can depend on them."""
    versions = {
        name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "matplotlib")
    }
    return {
        "batchnorm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **versions,
        # Not the kernel's build: it says nothing about results, and much about the machine.
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": joblib.cpu_count(),
        "device": "cpu",
        "threads_per_run": 1,
    }


def _seeds(runs: list[Run[Any]]) -> dict[str, list[int]]:
    seeds: dict[str, list[int]] = {}
    for run in runs:
        stage = seeds.setdefault(run.trial.stage, [])
        if run.trial.seed not in stage:
            stage.append(run.trial.seed)
    return seeds


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
