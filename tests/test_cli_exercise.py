"""`batchnorm exercise`: what it prints in both languages, writes and ends in."""

import io
import locale
import os
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.markdown import Markdown
from typer.testing import CliRunner

from batchnorm import cli, exercises
from batchnorm.cli.exercise import _fitted
from batchnorm.cli.language import VARIABLES, choose_language
from batchnorm.cli.printing import wrapped
from batchnorm.errors import ArgumentError

ALL = exercises.discover()
SOLUTION = ALL[1].solution


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(locale, "setlocale", lambda category: "C")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(*arguments):
    done = CliRunner().invoke(cli._command(), ["exercise", *map(str, arguments)])
    return done.exit_code, done.stdout, done.exception


def process(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", "exercise", *map(str, arguments)],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def widest(text):
    return max(map(cell_len, text.splitlines()))


@pytest.mark.parametrize(
    ("environment", "option", "language"),
    [
        ({}, None, "en"),
        ({"LANG": "zh_CN.UTF-8"}, None, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, None, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "zh_TW"}, None, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, None, "zh"),
        ({"LANG": "zh_CN.UTF-8"}, "en", "en"),
        ({}, "zh", "zh"),
    ],
)
def test_the_language(environment, option, language, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_language(option) == language


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("Chinese (Simplified)_China.936", "zh"),
        ("Chinese (Traditional)_Taiwan.950", "zh"),
        ("zh-CN", "zh"),
        ("English_United States.1252", "en"),
    ],
)
def test_the_language_of_windows_which_sets_no_variable(name, language, monkeypatch):
    monkeypatch.setattr(locale, "setlocale", lambda category: name)
    assert choose_language(None) == language
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    assert choose_language(None) == "en"


@pytest.mark.parametrize("option", ["fr", "", "zh_CN", "EN"])
def test_another_language_is_an_error(option):
    with pytest.raises(ArgumentError, match="zh or en, got"):
        choose_language(option)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_list_fits_and_lines_up(language, monkeypatch):
    monkeypatch.setenv("LC_ALL", f"{language}_XX.UTF-8")
    code, out, _ = run()
    assert code == 0
    assert "\x1b" not in out
    assert widest(out) <= 80
    rows = [line for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == len(ALL)
    chapters = []
    for row, (number, exercise) in zip(rows, ALL.items(), strict=True):
        assert row.split()[0] == str(number)
        assert exercise.title.said(language) in row
        chapters.append(cell_len(row.rstrip()[: -len(row.split()[-1])]))
    # The chapters stand below each other, whatever the titles' characters are wide.
    assert len(set(chapters)) == 1


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("number", ALL)
def test_a_task_in_a_pipe_is_markdown(number, language):
    code, out, _ = run(number, "--lang", language)
    assert code == 0
    assert ALL[number].task.said(language).strip() in out
    assert f"batchnorm exercise {number} --start my.py" in out


@pytest.mark.parametrize("number", ALL)
def test_broken_lines_change_nothing_else(number):
    """Neither a line that begins like a list's item nor code that becomes prose."""
    task = ALL[number].task.zh.strip()
    for width in range(40, 121, 4):
        broken, whole = (drawn(text, width) for text in (_fitted(task, width), task))
        assert "".join(broken.split()) == "".join(whole.split())


def drawn(text, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(Markdown(text))
    return console.file.getvalue()


def test_a_task_on_a_terminal_is_drawn():
    """With a real terminal: no marks of Markdown, and no line too long."""
    ours, theirs = pytest.importorskip("pty").openpty()
    command = [sys.executable, "-m", "batchnorm", "exercise", "3", "--lang", "zh"]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(command, stdout=theirs, env=environment) as running:
        os.close(theirs)
        out = b""
        try:
            while piece := os.read(ours, 4096):
                out += piece
        except OSError:  # the terminal is closed
            pass
    os.close(ours)
    assert running.returncode == 0
    text = out.decode()
    assert "练习 3：教学代码的五处错误" in text
    assert "`" not in text
    assert "# " not in text


@pytest.mark.parametrize("number", ALL)
def test_the_solution_passes_its_own_check(number, here):
    code, out, _ = run(number, "--solution")
    assert code == 0
    (here / "my.py").write_text(out)
    code, out, _ = run(number, "--check", "my.py", "--lang", "en")
    assert code == 0, out
    count = len(ALL[number].checks)
    assert out.splitlines()[-1] == f"Right: all {count} checks passed."
    assert out.count("✓") == count


def test_start_check_mend_check(here):
    code, out, _ = run(1, "--start", "my answer.py", "--lang", "zh")
    assert (code, out) == (
        0, "已写入 my answer.py。检查：batchnorm exercise 1 --check 'my answer.py'\n"
    )  # fmt: skip
    text = (here / "my answer.py").read_text(encoding="utf-8")
    assert text == ALL[1].starting_file("zh")
    code, out, _ = run(1, "--check", "my answer.py", "--lang", "zh", "--seed", 5)
    assert code == 1
    assert out.splitlines() == [
        "✗ 普通的一批",
        "  应为  代码运行到底",
        "  得到  还没有写：raise NotImplementedError",
        "  位置  my answer.py:7  raise NotImplementedError",
        f"✗ {ALL[1].checks[1].name.zh}",
        "  同上",
        f"✗ {ALL[1].checks[2].name.zh}",
        "  同上",
        "还不对：3 项检查没有通过。",
        "用同样的数据再查一次：--seed 5",
    ]
    (here / "my answer.py").write_text(SOLUTION)
    assert run(1, "--check", "my answer.py")[0] == 0


def test_a_seed_repeats_and_none_does_not(here):
    (here / "my.py").write_text(SOLUTION.replace("correction=0", "correction=1"))
    first, again = run(1, "--check", "my.py", "--seed", 3), run(1, "--check", "my.py", "--seed", 3)
    assert first[:2] == again[:2]
    assert first[0] == 1
    fresh = {run(1, "--check", "my.py")[1] for _ in range(3)}
    assert len(fresh) > 1  # of so many seeds, two may be the same by chance


def test_what_went_wrong_fits_and_lines_up(here):
    body = SOLUTION.replace("var(0, correction=0)", "var(0)  # " + "long " * 30)
    (here / "my.py").write_text(body.replace("    mean =", "    print('[red]x[/red]')\n    mean ="))
    for language in ("zh", "en"):
        code, out, _ = run(1, "--check", "my.py", "--lang", language, "--seed", 0)
        assert code == 1
        assert "[red]x[/red]" in out
        assert widest(out) <= 80
        # What is said begins in one column, also where it goes on in another line.
        lines = [line for line in out.splitlines() if line.startswith("  ") and "  " in line[3:]]
        begins = {cell_len(line) - cell_len(line[2:].partition("  ")[2].lstrip()) for line in lines}
        assert len(begins) == 1


@pytest.mark.parametrize("width", [-3, 0, 1])
def test_the_narrowest_terminal(width):
    assert wrapped("减均值 x", width) == ["减", "均", "值", "x"]


@pytest.mark.parametrize("width", [20, 33, 70])
@pytest.mark.parametrize("number", ALL)
def test_lines_are_broken_where_they_may_be(number, width):
    """Nothing is lost but spaces, nothing too long, no line begins with a closing mark."""
    for task in ALL[number].task:
        lines = wrapped(task, width)
        assert "".join("".join(lines).split()) == "".join(task.split())
        assert max(map(cell_len, lines)) <= width
        assert not [line for line in lines if line[:1] in "，。；：、！？）" and line]
        # Full, but for the word that did not fit.
        prose = wrapped(max(task.splitlines(), key=len), width)[:-1]
        assert all(cell_len(line) > width / 2 for line in prose)


def test_long_prints_are_cut(here):
    """Many lines, and one that becomes many."""
    for prints in ("for i in range(50):\n    print('line', i)", "print(list(range(3000)))"):
        (here / "my.py").write_text(f"{SOLUTION}{prints}\n")
        code, out, _ = run(1, "--check", "my.py", "--lang", "en")
        assert code == 0
        lines = out.splitlines()
        assert lines[13].split() == ["…"]
        assert lines[12].endswith("line 11" if "line" in prints else ",")
        assert lines[14].startswith("✓")


def test_misuse_is_one_message_and_status_2(here):
    (here / "my.py").write_text("mine")
    for arguments, message in (
        (("11",), "1 to 10, got 11"),
        (("0",), "1 to 10, got 0"),
        (("one",), ""),  # typer says it
        (("--check", "my.py"), "the number of an exercise with --check"),
        (("1", "--check", "no.py"), "cannot be read: No such file"),
        (("1", "--check", "."), "is no file"),
        (("1", "--check", "my.py", "--start", "b.py"), "got --start and --check"),
        (("1", "--seed", "3"), "--seed together with --check"),
        (("1", "--start", "my.py"), "which is there already"),
        (("1", "--start", "no/my.py"), "No such file or directory"),
        (("1", "--lang", "fr"), "zh or en, got 'fr'"),
    ):
        code, out, error = run(*arguments)
        assert out == "", arguments
        assert code == 2 or message in str(error), (arguments, error)
        assert isinstance(error, (ArgumentError, SystemExit)), arguments
    assert (here / "my.py").read_text() == "mine"
    assert [entry.name for entry in here.iterdir()] == ["my.py"]
    code, out, err = process("1", "--start", "my.py")
    assert (code, out) == (2, "")
    assert err.startswith("Error: expected a new file, got my.py")
    assert "Traceback" not in err


def test_an_answer_that_misbehaves_never_shows_our_traceback(here):
    for body in ("import sys\nsys.exit(3)\n", "def forward(:\n", "1 / 0\n", "", "raise OSError\n"):
        (here / "my.py").write_text(body)
        code, out, error = run(1, "--check", "my.py")
        assert code == 1, body
        assert isinstance(error, SystemExit)
        assert out.startswith("✗ the file is read\n")
        assert "--seed" not in out
        assert "Traceback" not in out
    code, out, err = process("1", "--check", "my.py")
    assert (code, err) == (1, "")
    assert "OSError" in out
    # The path leads nowhere afterwards.
    (here / "my.py").write_text("import os\nos.chdir('/')\n1 / 0\n")
    code, out, err = process("1", "--check", "my.py", "--lang", "en")
    assert (code, err) == (1, "")
    assert "  where     my.py:3  1 / 0\n" in out


def test_help_explains_every_option_and_status():
    code, out, _ = run("--help")
    assert code == 0
    words = " ".join(out.split())
    for part in ("--start", "--check", "--solution", "--seed", "--lang", "zh|en", "Exit status"):
        assert part in words
