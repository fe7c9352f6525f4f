"""Run an answer through an exercise's checks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch

from batchnorm.errors import ArgumentError
from batchnorm.exercises.answer import Answer
from batchnorm.exercises.exercise import Exercise, Text, Wrong

_READ = Text("读入文件", "the file is read")


class Outcome(NamedTuple):
    """What came of a check.

    Attributes:
        name: the check's.
        wrong: what it refuses; None where it is content.
        line: the reader's line that is meant.
        source: what stands in that line.
        printed: what the reader's code printed meanwhile.
    """

    name: Text
    wrong: Wrong | None
    line: int | None
    source: str
    printed: str


def grade(exercise: Exercise, path: Path, seed: int) -> list[Outcome]:
    """The outcome of every check; of the reading alone, if the file cannot be run.

    Args:
        exercise: which it is an answer to.
        path: the reader's file.
        seed: what the checks' data are made from.

    Raises:
        ArgumentError: the file cannot be read.
    """
    try:
        # A device may have no end.
        source = path.read_bytes() if path.is_file() or not path.exists() else None
        reason = "is no file"
    except OSError as error:
        source, reason = None, f"cannot be read: {error.strerror}"
    if source is None:
        raise ArgumentError(
            f"expected a Python file to check, got {path}, which {reason}; "
            f"`batchnorm exercise {exercise.number} --start my.py` writes one to start from"
        )
    with _watched() as printed:
        try:
            answer = Answer(path, source, exercise.names)
        except Wrong as refused:
            line = refused.line
            return [Outcome(_READ, refused, line, _line(source, line), printed.getvalue())]
    # What the file printed on its way in goes with the first check.
    outcomes: list[Outcome] = []
    for number, check in enumerate(exercise.checks):
        random = torch.Generator().manual_seed(seed + number)
        wrong: Wrong | None = None
        with _watched() as more:
            try:
                check.run(answer, random)
            except Wrong as refused:
                wrong = refused
            except Exception as error:  # an odd result, such as a sparse tensor
                wrong = answer.crash(error)
        text = more.getvalue() if outcomes else printed.getvalue() + more.getvalue()
        line = (wrong.line or answer.line) if wrong else None
        outcomes.append(Outcome(check.name, wrong, line, _line(source, line), text))
    return outcomes


def _line(source: bytes, number: int | None) -> str:
    """That line of what was read at first: by now the file may be another, or gone."""
    # Not splitlines: Python counts neither form feeds nor U+2028.
    lines = source.decode("utf-8", errors="replace").split("\n")
    return lines[number - 1].strip() if number and number <= len(lines) else ""


@contextmanager
def _watched() -> Iterator[io.StringIO]:
    """Keep what is printed; neither warnings nor what a file switched off reach the checks."""
    printed, dtype = io.StringIO(), torch.get_default_dtype()
    with redirect_stdout(printed), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            yield printed
        finally:
            torch.set_default_dtype(dtype)
