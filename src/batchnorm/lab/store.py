"""Finished runs on disk, one file each, so that nothing finished is ever lost or done twice.

A run's file is named after everything that its result depends on: the experiment and the version of
its recipe, the trial, the data, and the versions of torch and batchnorm. It is written beside its
final name and then renamed, so a file that has the name is whole. Its checksum guards against what
comes later: a full disk, a half-finished copy, an edit by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from batchnorm._version import __version__
from batchnorm.errors import BatchNormError
from batchnorm.lab.experiments import Experiment, Run, Trial


class Store:
    """The runs directory of one experiment on one data set."""

    def __init__(self, directory: Path, experiment: Experiment[Any, Any], fingerprint: str) -> None:
        self.directory = directory
        self._trial_type = experiment.trial
        self._context = {
            "experiment": experiment.name,
            "recipe": experiment.recipe,
            "data": fingerprint,
            "batchnorm": __version__,
            "torch": str(torch.__version__),
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BatchNormError(
                f"Cannot make the directory {directory} ({error.strerror}). Choose another one "
                "with --out."
            ) from error

    def path(self, trial: Trial) -> Path:
        """Return where the run of this trial is, or will be."""
        return (
            self.directory / f"{_digest({**self._context, **dataclasses.asdict(trial)})[:20]}.json"
        )

    def save(self, run: Run[Any]) -> Run[Any]:
        """Write a finished run, and return it just as `load` will for those who resume."""
        body = strict(
            {
                "context": self._context,
                "trial": dataclasses.asdict(run.trial),
                "measured": run.measured,
                "timing": run.timing,
            }
        )
        write_atomically(
            self.path(run.trial), json.dumps({"sha256": _digest(body), "run": body}) + "\n"
        )
        return dataclasses.replace(run, measured=body["measured"], timing=body["timing"])

    def load(self, trial: Trial, note: Callable[[str], None]) -> Run[Any] | None:
        """Return the finished run of this trial, or None; a damaged file gets a note."""
        path = self.path(trial)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            body = content["run"]
            if content["sha256"] != _digest(body):
                raise ValueError("checksum")
            return Run(trial, body["measured"], body["timing"])
        except (OSError, ValueError, KeyError, TypeError):
            note(f"{path} is damaged; that run is done again.")
            return None


def strict(value: Any) -> Any:
    """Return `value` as JSON will give it back: lists for tuples, None for NaN and infinity.

    >>> strict({"loss": (0.5, float("nan"))})
    {'loss': [0.5, None]}
    """
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write a file so that under its name there is all of the new content, or what was there."""
    # The process id keeps two runs into one directory from writing the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode() if isinstance(text, str) else text)
        temporary.replace(path)
    except OSError as error:
        raise BatchNormError(
            f"Cannot write {path} ({error.strerror}). Make room, or use another directory; "
            "the runs finished so far are kept."
        ) from error
    finally:
        # Where nothing can be written nothing can be removed either; the first error is the one.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
