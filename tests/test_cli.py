import json
import os
import re
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
from typer.testing import CliRunner

import lab_tiny
from batchnorm import __version__, cli, lab

TESTS = Path(__file__).parent
ENTRY = "import sys; sys.argv[0] = 'batchnorm'; from batchnorm.cli import main; main()"


def start(*arguments, code=ENTRY, **environment):
    """Start the command in a process of its own, its output in pipes, 80 columns wide."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": lab_tiny.PATH, "COLUMNS": "80", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_version_and_list():
    version, listing = start("--version"), start("lab", "list")
    assert finish(version) == (0, f"batchnorm {__version__}\n", "")
    code, out, err = finish(listing)
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "\x1b" not in out
    words = " ".join(out.split())
    for word in ("convergence", "fewer steps", "Ioffe & Szegedy 2015", "arXiv:1502.03167"):
        assert word in words
    # Every experiment was timed, and the minutes stand beside the claim.
    cores = joblib.cpu_count()
    for name, expected in lab.minutes.expected().items():
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} ")]
        assert line.split()[-2:] == [f"{expected[p]:.1f}" for p in ("quick", "full")]
    assert "not timed" not in out
    timed = json.loads((Path(lab.minutes.__file__).with_name(lab.minutes.FILE)).read_text())
    assert timed["core_minutes"].keys() == lab.discover().keys()
    assert all(by.keys() == {"quick", "full"} for by in timed["core_minutes"].values())
    assert timed["core_minutes"]["explosion"]["full"] == pytest.approx(
        lab.minutes.expected()["explosion"]["full"] * cores
    )


def test_what_was_not_timed_is_said(monkeypatch):
    monkeypatch.setattr(lab.minutes, "expected", lambda: {"cost": {"quick": 1.25}})
    out = CliRunner().invoke(cli._command(), ["lab", "list"]).stdout
    (line,) = [line for line in out.splitlines() if line.strip().startswith("cost ")]
    assert line.split()[-2:] == ["1.2", "–"]
    assert out.splitlines()[-1].strip() == "– not timed yet"


WRONG = {
    ("lab", "run", "nope"): "Expected one of: affine-only, convergence, ",
    ("lab", "run", "convergance"): "Did you mean 'convergence'?",
    ("lab", "run", "--profile", "nope"): "Expected one of: quick, full",
    ("lab", "run", "--data", "nope.npz"): "there is no such file",
    ("lab", "run", "--seeds", "0"): "--seeds",
    ("lab", "report", "nope"): "there is no such thing",
    ("lab", "report", __file__): "a file of another name",
}


@pytest.mark.slow
def test_wrong_input_is_one_message_and_exit_code_2(tmp_path):
    for arguments, message in WRONG.items():
        code, out, err = finish(start(*arguments, "--out", str(tmp_path / "out"))
                                if "run" in arguments else start(*arguments))  # fmt: skip
        assert code == 2, arguments
        assert out == ""
        assert message in err
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 5
    assert not (tmp_path / "out").exists()


def test_an_empty_out_is_refused_before_anything_runs(tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r})\n{ENTRY}"
    code, out, err = finish(start("lab", "run", "lag", "--out", "", code=code))
    assert (code, out) == (2, "")
    assert err.startswith("Error: --out: expected a directory, got an empty name")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_experiment_are_not_replaced(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"mine": 1}')
    code, out, err = finish(start("lab", "run", "lag", "--out", str(tmp_path)))
    assert (code, out) == (2, "")
    assert f"Choose another directory (--out), or delete {file}" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (("--seeds", "1"), "Note: 1 seed decides nothing. Better: --seeds 8."),
        (("--seeds", "7"), "Note: 7 seeds are few: they easily agree by chance. Better:"),
        (("--seeds", "8"), None),
        (("--profile", "full"), None),
        # The quick profile's own are few by design, and its report says so.
        (("--profile", "quick"), None),
    ],
)
def test_few_seeds_are_told_before_the_time_is_spent(tmp_path, arguments, note):
    (tmp_path / "results.json").write_text("{}")  # in the way: nothing is run
    code, out, err = finish(start("lab", "run", "ghost", *arguments, "--out", str(tmp_path)))
    assert (code, out) == (2, "")
    first, second, *_ = err.splitlines()
    assert first == "Starting."
    assert second.startswith(note or "Error: ")


def test_a_run_in_a_pipe_is_plain_text_with_the_verdict_and_the_report(tmp_path):
    out = tmp_path / "out"
    arguments = ["lab", "run", "--profile", "tiny", "--jobs", "2", "--out", str(out)]
    # An ASCII terminal cannot show everything that is printed; the run must not die of it.
    process = start(*arguments, code=lab_tiny.COMMAND, PYTHONIOENCODING="ascii")
    code, printed, err = finish(process)
    assert code == 0, err
    assert "\x1b" not in printed + err
    said = ["Starting.", "Note: 2 seeds are few: they easily agree by chance. Better: --seeds 8."]
    assert err.splitlines()[:3] == [*said, "learning-rate sweep: 6 runs"]
    assert "evaluation: 4/4" in err
    *text, last = printed.splitlines()
    assert last == f"Report: {out / 'report.html'}"
    assert (out / "report.html").is_file()
    assert max(len(line) for line in text) <= 80
    words = " ".join(printed.split())
    assert "REPRODUCED" in words or "UNRESOLVED" in words
    assert "2 of 2 paired seeds" in words
    (header,) = [line for line in text if "steps to 90%" in line]
    cells = re.split(r"[|\s]{2,}", header.strip("| "))
    columns = ["network", "rate", "steps to 90%", "reached", "accuracy", "ms/step", "s to 90%"]
    assert cells == columns


@pytest.mark.slow
def test_several_experiments_end_in_one_page_and_one_that_fails_costs_no_other(tmp_path):
    arguments = ["--profile", "tiny", "--jobs", "1", "--seeds", "1", "--out", str(tmp_path)]
    process = start("lab", "run", "explosion", "convergence", *arguments, code=lab_tiny.COMMAND)
    code, printed, err = finish(process)
    assert code == 2
    assert "explosion could not be done. explosion has no profile 'tiny'" in err
    assert "convergence (2 of 2)" in err
    assert "1 of 2 experiments could not be done, for the reasons given above: explosion." in err
    assert "Traceback" not in err
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80
    *_, page, last = printed.splitlines()
    assert (page, last) != ("", "")
    assert last == f"All claims in {tmp_path} on one page: {tmp_path / 'report.html'}"
    outcomes = printed[printed.rindex(" experiment ") :]
    assert "unresolved" in outcomes  # one seed decides nothing
    assert (tmp_path / "convergence-tiny-1-seed" / "report.html").is_file()
    assert (tmp_path / "report.html").is_file()


def test_several_experiments_do_not_go_where_one_is(tmp_path):
    (tmp_path / "results.json").touch()
    code, out, err = finish(start("lab", "run", "lag", "rates", "--out", str(tmp_path)))
    assert (code, out) == (2, "")
    assert "holds the results of one experiment" in err


def test_all_and_names_exclude_each_other():
    code, out, err = finish(start("lab", "run", "--all", "convergence"))
    assert (code, out) == (2, "")
    assert "expected names or --all" in err


def test_without_out_other_evidence_is_not_overwritten(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-c", lab_tiny.COMMAND, "lab", "run", "--profile", "tiny"]
        return subprocess.run(
            [*command, "--jobs", "1", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": lab_tiny.PATH},
            capture_output=True,
            text=True,
            timeout=120,
        )

    result = run("--seeds", "1")
    assert result.returncode == 0, result.stderr
    (made,) = (tmp_path / "batchnorm-lab").iterdir()
    assert made.name == "convergence-tiny-1-seed"
    assert result.stdout.splitlines()[-1].endswith("convergence-tiny-1-seed/report.html")
    assert "1 seeds" not in result.stdout + (made / "report.html").read_text()


def test_python_m_batchnorm_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "batchnorm", "--version"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"batchnorm {__version__}\n")


def test_help_explains_every_option():
    code, out, _ = finish(start("lab", "run", "--help"))
    assert code == 0
    for word in (
        "NAME",
        "--out",
        "--seeds",
        "--profile",
        "--data",
        "--jobs",
        "Ctrl-C",
        ".npz",
        "--all",
        "--tensorboard",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("module", "arguments", "remedy"),
    [
        ("typer", ("--version",), "pip install --no-build-isolation '.[lab]'"),
        ("rich", ("--version",), "pip install --no-build-isolation '.[lab]'"),
        ("sklearn", ("lab", "list"), "pip install --no-build-isolation '.[lab]'"),
    ],
)
def test_a_missing_extra_is_named_with_the_remedy(module, arguments, remedy):
    # None in sys.modules makes an import fail just as for a package that is not installed.
    code, out, err = finish(
        start(*arguments, code=f"import sys; sys.modules[{module!r}] = None\n" + ENTRY)
    )
    assert (code, out) == (2, "")
    assert remedy in err
    assert err.count("pip install") == 1
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_importing_batchnorm_imports_no_extra():
    extras = ("typer", "rich", "joblib", "matplotlib", "sklearn", "jinja2", "safetensors")
    code = f"import sys, batchnorm; print([m for m in {extras} if m in sys.modules])"
    assert finish(start(code=code)) == (0, "[]\n", "")
