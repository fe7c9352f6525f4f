"""`batchnorm exercise`."""

# No `from __future__ import annotations`: the commands are defined inside a function, and typer
# could not look up the names in their annotations afterwards.

import secrets
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text as Styled

from batchnorm import exercises
from batchnorm.cli.language import choose_language
from batchnorm.cli.printing import print_table, print_text, wrapped
from batchnorm.cli.status import REFUSED
from batchnorm.errors import ArgumentError
from batchnorm.exercises import Exercise, Outcome
from batchnorm.exercises.exercise import Language, Text

HELP = (
    "Exercises on batch normalization, with checks of your answers.\n\n"
    "Without a number: the list. With one: the task. An answer is a Python file; --start writes "
    "one to begin with, and --check runs it on fresh data and names the mistakes that it knows.\n\n"
    "Exit status of --check: 0, the answer is right; 1, it is not; 2, there was nothing to check. "
    "The file is run as it is: check only what you would run yourself."
)

#: Enough to look at a number or two; the rest of a tensor would push the verdict off the screen.
LONGEST_PRINT = 12

#: Seeds that are short enough to be typed again.
SEEDS = 10000

_COLUMNS = (Text("题", "no."), Text("题目", "exercise"), Text("章", "chapter"))
_HOW = Text(
    "看题目：batchnorm exercise 1\n写起始文件：batchnorm exercise 1 --start my.py\n"
    "检查答案：batchnorm exercise 1 --check my.py",
    "Its task:        batchnorm exercise 1\nA file to start: batchnorm exercise 1 --start my.py\n"
    "Check an answer: batchnorm exercise 1 --check my.py",
)
_NEXT = Text(
    "先读第 {chapter} 章。开始：`{command} --start my.py`",
    "It rests on chapter {chapter}. To start: `{command} --start my.py`",
)
_WRITTEN = Text("已写入 {path}。检查：{command}", "Written: {path}. To check it: {command}")
_RIGHT = Text("对了：{count} 项检查全部通过。", "Right: all {count} checks passed.")
_WRONG = Text("还不对：{count} 项检查没有通过。", "Not yet: {count} of the checks failed.")
_REPEAT = Text("用同样的数据再查一次：--seed {seed}", "The same data once more: --seed {seed}")
_SAME = Text("同上", "as above")
_LABELS = {
    "where": Text("位置", "where"),
    "expected": Text("应为", "expected"),
    "came": Text("得到", "got"),
    "hint": Text("提示", "hint"),
    "printed": Text("打印", "printed"),
}


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("exercise", help=HELP)
    def exercise(
        number: Annotated[
            int | None, typer.Argument(metavar="NUMBER", help="Which; the list if not given.")
        ] = None,
        start: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Write a file to start from. None is overwritten."),
        ] = None,
        check: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Check the answer in this file.")
        ] = None,
        solution: Annotated[
            bool, typer.Option("--solution", metavar=" ", help="Print a solution. Try first.")
        ] = False,
        seed: Annotated[
            int | None,
            typer.Option(
                min=0, metavar="N", help="Seed of --check's data; another each time if not given."
            ),
        ] = None,
        lang: Annotated[
            str | None,
            typer.Option(metavar="zh|en", help="Its language; the environment's if not given."),
        ] = None,
    ) -> None:
        language = choose_language(lang)
        _check_options(number, start, check, solution, seed)
        if number is None:
            _list(exercises.discover(), language)
            return
        chosen = exercises.find(number)
        if start:
            _start(chosen, start, language)
        elif check:
            seed = secrets.randbelow(SEEDS) if seed is None else seed
            _report(exercises.grade(chosen, check, seed), check, seed, language)
        elif solution:
            print_text(Console(), chosen.solution.rstrip())
        else:
            _show(chosen, language)


def _check_options(
    number: int | None, start: Path | None, check: Path | None, solution: bool, seed: int | None
) -> None:
    given = {"--start": start, "--check": check, "--solution": solution}
    wanted = [option for option, value in given.items() if value]
    if len(wanted) > 1:
        raise ArgumentError(f"expected one of {', '.join(given)}, got {' and '.join(wanted)}")
    if wanted and number is None:
        raise ArgumentError(
            f"expected the number of an exercise with {wanted[0]}, such as "
            f"`batchnorm exercise 1 {wanted[0]}{'' if solution else ' my.py'}`; "
            "`batchnorm exercise` lists them"
        )
    if seed is not None and not check:
        raise ArgumentError("expected --seed together with --check, whose data are made from it")


def _list(known: dict[int, Exercise], language: Language) -> None:
    rows = [
        (str(number), exercise.title.said(language), str(int(exercise.chapter[:2])))
        for number, exercise in known.items()
    ]
    console = Console()
    print_table(console, [column.said(language) for column in _COLUMNS], rows)
    print_text(console, _HOW.said(language))


def _command(exercise: Exercise) -> str:
    return f"batchnorm exercise {exercise.number}"


def _show(exercise: Exercise, language: Language) -> None:
    after = _NEXT.said(language).format(
        chapter=int(exercise.chapter[:2]), command=_command(exercise)
    )
    task = f"{exercise.heading(language)}\n\n{exercise.task.said(language).strip()}\n\n{after}"
    console = Console()
    if console.is_terminal:
        console.print(Markdown(_fitted(task, console.width) if language == "zh" else task))
    else:  # for a file or a pager: Markdown as it is
        print_text(console, task)


def _fitted(task: str, width: int) -> str:
    """Markdown whose lines are broken for rich, which would do it between words only."""
    # Two spaces end a line for good; a list's mark takes three columns; indented lines are code.
    return "\n".join(
        line if line.startswith("    ") else "  \n".join(wrapped(line, width - 3))
        for line in task.splitlines()
    )


def _start(exercise: Exercise, path: Path, language: Language) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(exercise.starting_file(language))
    except FileExistsError:
        raise ArgumentError(
            f"expected a new file, got {path}, which is there already; choose another name, or "
            "remove it if you want to start again"
        ) from None
    except OSError as error:
        raise ArgumentError(
            f"expected to write {path}, got: {error.strerror}; choose another file"
        ) from error
    command = shlex.join([*_command(exercise).split(), "--check", str(path)])
    print_text(Console(), _WRITTEN.said(language).format(path=path, command=command))


def _report(outcomes: list[Outcome], path: Path, seed: int, language: Language) -> None:
    console = Console()
    before: dict[str, str] = {}
    for outcome in outcomes:
        mark = Styled("✗ ", "red") if outcome.wrong else Styled("✓ ", "green")
        console.print(mark + Styled(outcome.name.said(language)))
        said = _reasons(outcome, path, language)
        if said and said == before:
            console.print(f"  {_SAME.said(language)}")
        else:
            _print_reasons(console, said, before, language)
        before = said
    failed = sum(outcome.wrong is not None for outcome in outcomes)
    if failed:
        print_text(console, _WRONG.said(language).format(count=failed))
        if len(outcomes) > 1:  # one alone is that of reading the file, which takes no data
            print_text(console, _REPEAT.said(language).format(seed=seed))
        raise typer.Exit(REFUSED)
    print_text(console, _RIGHT.said(language).format(count=len(outcomes)))


def _reasons(outcome: Outcome, path: Path, language: Language) -> dict[str, str]:
    said: dict[str, str] = {}
    if wrong := outcome.wrong:
        said["expected"] = wrong.expected.said(language)
        said["came"] = wrong.came.said(language)
        if wrong.hint:
            said["hint"] = wrong.hint.said(language)
        place = str(path) if outcome.line is None else f"{path}:{outcome.line}"
        # And the line itself, so that it need not be looked up.
        said["where"] = f"{place}  {outcome.source}".rstrip()
    if outcome.printed.strip():
        said["printed"] = outcome.printed.rstrip()
    return said


def _print_reasons(
    console: Console, said: dict[str, str], before: dict[str, str], language: Language
) -> None:
    # As wide as they are on a terminal, where a Chinese character takes two columns.
    width = max(cell_len(label.said(language)) for label in _LABELS.values())
    for key, text in said.items():
        label = set_cell_size(_LABELS[key].said(language), width)
        again = key in ("hint", "where") and before.get(key) == text
        shown = _SAME.said(language) if again else text
        # A path must survive being copied: it is not broken.
        lines = [shown] if key == "where" else wrapped(shown, console.width - width - 4)
        if key == "printed" and len(lines) > LONGEST_PRINT:
            lines = [*lines[:LONGEST_PRINT], "…"]
        for line in lines:
            print_text(console, f"  {label}  {line}".rstrip())
            label = " " * width
