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
        printed: what the reader's code printed meanwhile.
    """

    name: Text
    wrong: Wrong | None
    line: int | None
    printed: str


def grade(exercise: Exercise, path: Path, seed: int) -> list[Outcome]:
    """The outcome of every check; of the reading alone, if the file cannot be read.

    Args:
        exercise: which it is an answer to.
        path: the reader's file.
        seed: what the checks' data are made from.

    Raises:
        ArgumentError: there is no such file.
    """
    if not path.is_file():
        what = "a directory" if path.is_dir() else "there is no such file"
        raise ArgumentError(
            f"expected a Python file to check, got {path}: {what}; "
            f"`batchnorm exercise {exercise.number} --start my.py` writes one to start from"
        )
    with _watched() as printed:
        try:
            answer = Answer(path, exercise.names)
        except Wrong as refused:
            return [Outcome(_READ, refused, refused.line, printed.getvalue())]
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
        outcomes.append(Outcome(check.name, wrong, line, text))
    return outcomes


@contextmanager
def _watched() -> Iterator[io.StringIO]:
    """Keep what is printed; neither warnings nor what a file switched off reach the checks."""
    printed = io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield printed
