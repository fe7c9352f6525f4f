"""The article's chapter on the exercises: its table and its session are the command's."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batchnorm import cli, exercises

ARTICLE = Path(__file__).resolve().parents[2] / "docs" / "article"
ALL = exercises.discover()

each_language = pytest.mark.parametrize("language", ["zh", "en"])


def page(language):
    return (ARTICLE / language / "12-exercises.md").read_text(encoding="utf-8")


@each_language
def test_the_table_lists_the_exercises(language):
    rows = re.findall(
        r"^\| (\d+) \| (.+?) \| .+ \| \[(\d+)\]\((.+?)\) \|$", page(language), re.MULTILINE
    )
    assert rows == [
        (
            str(number),
            exercise.title.said(language),
            str(int(exercise.chapter[:2])),
            exercise.chapter,
        )
        for number, exercise in ALL.items()
    ]


@each_language
def test_each_rests_on_a_chapter_that_is_there(language):
    for exercise in ALL.values():
        assert (ARTICLE / language / exercise.chapter).exists()


@each_language
def test_the_session_is_what_the_command_prints(language, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = re.findall(
        r"```python\n(.*?)```.*?```console\n\$ batchnorm (.*?)\n(.*?)```", page(language), re.DOTALL
    )
    assert len(session) == 2
    for (code, command, printed), status in zip(session, (1, 0), strict=True):
        Path("my.py").write_text(code if "import torch" in code else f"import torch\n\n\n{code}")
        done = CliRunner().invoke(
            cli._command(), command.split(), env={"COLUMNS": "80", "LC_ALL": f"{language}_XX.UTF-8"}
        )
        assert done.stdout == printed
        assert done.exit_code == status


@each_language
def test_it_is_linked(language):
    for name in ("index.md", "11-conclusion.md"):
        assert "](12-exercises.md)" in (ARTICLE / language / name).read_text(encoding="utf-8")
