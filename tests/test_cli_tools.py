"""`batchnorm inspect` and `batchnorm diagnose`: what they print, write and end in."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from batchnorm import BatchNorm, __version__, cli
from batchnorm.cli.load import load
from batchnorm.errors import ArgumentError

TRAIN = """
import torch
from torch import nn
from batchnorm import BatchNorm

def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8), nn.Linear(8, 2))
    for _ in range(60):
        model(torch.randn(32, 4))
    return model

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), BatchNorm(8))

def shifted():
    model = make_model()
    model[1].running_mean += 5
    return model

model = make_model()
here = [torch.randn(32, 4) for _ in range(4)]

def batches():
    for batch in here:
        yield batch, torch.zeros(32)

def images():
    return [torch.randn(2, 3, 8, 8)]

def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-4)

def broken():
    raise ValueError("no data\\nin /nowhere")

def deep():
    return nn.Linear(4, 4)(torch.randn(3, 5))

class Inside:
    value = 3
"""


@pytest.fixture
def checkpoint(tmp_path):
    """One with an error, two warnings and a remark."""
    model = nn.Sequential(*(BatchNorm(8) for _ in range(4)))
    for _ in range(40):
        model(torch.randn(16, 8))
    model[0].running_var[3] = float("nan")
    model[1].reset_running_stats()
    model[3].weight.data[2] = 0
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def healthy(tmp_path):
    model = nn.Sequential(BatchNorm(8))
    for _ in range(40):
        model(torch.randn(16, 8))
    torch.save(model.state_dict(), tmp_path / "healthy.pt")
    return tmp_path / "healthy.pt"


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "train_it.py").write_text(TRAIN)
    (tmp_path / "wrong_syntax.py").write_text("def x(:\n")
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('usage: leaves')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("train_it", "wrong_syntax", "needs_more", "leaves"):
        sys.modules.pop(name, None)


def run(*arguments):
    done = CliRunner().invoke(cli._command(), list(map(str, arguments)))
    return done.exit_code, done.stdout, done.exception


def process(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_inspect_in_a_pipe(checkpoint, tmp_path):
    target = tmp_path / "new" / "found.json"
    code, out, err = process("inspect", checkpoint, "--json", target)
    assert (code, err) == (1, "")
    assert "\x1b" not in out
    assert out.splitlines()[-1] == f"Written: {target}"
    assert max(map(len, (line for line in out.splitlines() if "/" not in line))) <= 80
    for part in ("ERROR BN103", "WARNING BN105", "INFO BN304", "4 batch norm layers: 1 error"):
        assert part in out
    content = json.loads(target.read_text(), parse_constant=pytest.fail)
    assert content["version"] == __version__
    assert content["file"] == str(checkpoint)
    assert [(f["code"], f["layer"]) for f in content["findings"]] == [
        ("BN103", "0"),
        ("BN105", "1"),
        ("BN304", "3"),
    ]
    assert [layer["updates"] for layer in content["layers"]] == [40, 0, 40, 40]
    assert content["gap"] is None


def test_exit_status_is_by_fail_on(checkpoint, healthy):
    for arguments, status in (
        ((checkpoint,), 1),
        ((checkpoint, "--ignore", "BN103"), 0),
        ((checkpoint, "--ignore", "BN103", "--fail-on", "warning"), 1),
        ((checkpoint, "--ignore", "BN103", "--ignore", "BN105", "--fail-on", "warning"), 0),
        ((checkpoint, "--ignore", "BN103,BN105", "--fail-on", "warning"), 0),
        ((checkpoint, "--ignore", "BN103,BN105", "--fail-on", "info"), 1),
        ((healthy, "--fail-on", "info"), 0),
    ):
        code, out, _ = run("inspect", *arguments)
        assert code == status, arguments
        assert "BN103" not in out or "--ignore" not in arguments
    assert "1 batch norm layer: nothing found" in out


def test_a_file_without_layers_says_so(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "none.pt")
    code, out, _ = run("inspect", tmp_path / "none.pt")
    assert code == 2  # not the file that was meant
    assert "0 batch norm layers" in out
    assert "nothing in the file is called running_mean" in " ".join(out.split())


def test_misuse_is_one_message_and_status_2(checkpoint, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    for arguments, message in (
        (("inspect", tmp_path / "nope.pt"), "there is no such file"),
        (("inspect", tmp_path / "text.pt"), "begins with b'hello'"),
        (("inspect", checkpoint, "--fail-on", "fatal"), "error, warning, info"),
        (("inspect", checkpoint, "--ignore", "BN999"), "got 'BN999'"),
        (("inspect", checkpoint, "--json", checkpoint), "ends in .json"),
        (("diagnose", "train_it", "--data", "x:y"), "such as train:make_model, got 'train_it'"),
    ):
        code, out, err = process(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
    assert torch.load(checkpoint, weights_only=True)  # as it was


def test_json_has_no_number_that_json_has_not(tmp_path, healthy, monkeypatch):
    from batchnorm.tools import checkpoint
    from batchnorm.tools.findings import Diagnosis, Finding, LayerReport

    odd = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": -float("inf")}, "e": (1, None)}
    given = Diagnosis(
        (Finding("BN101", "error", "0", "x", odd),),
        (LayerReport("0", "BatchNorm", 8, mean_drift=float("nan")),),
    )
    monkeypatch.setattr(checkpoint, "inspect_checkpoint", lambda file, ignore: given)
    run("inspect", healthy, "--json", tmp_path / "odd.json")
    content = json.loads((tmp_path / "odd.json").read_text(), parse_constant=pytest.fail)
    expected = {"a": None, "b": [1.5, None], "c": {"d": None}, "e": [1, None]}
    assert content["findings"][0]["evidence"] == expected
    assert content["layers"][0]["mean_drift"] is None


def test_help_explains_every_option_and_status():
    for command, options in (
        ("inspect", ("FILE", "--json", "--fail-on", "--ignore")),
        ("diagnose", ("MODEL", "--data", "--optimizer", "--max-batches", "--plot", "--json")),
    ):
        code, out, _ = process(command, "--help")
        assert code == 0
        words = " ".join(out.split())
        assert all(option in words for option in options)
        assert "Exit status: 0, nothing at or above --fail-on was found; 1" in words
        assert "error|warning|info" in words


def test_things_are_found_by_their_names(project):
    for reference, kind in (
        ("train_it:make_model", nn.Sequential),
        ("train_it:Small", nn.Sequential),
        ("train_it:model", nn.Sequential),  # a module can be called, but is meant as it is
        ("train_it:here", list),
        ("train_it:model.0", nn.Linear),
        ("train_it:Inside.value", int),
    ):
        assert isinstance(load(reference, "MODEL"), kind)
    assert load("train_it:model", "MODEL") is sys.modules["train_it"].model
    optimizer = load("train_it:sgd", "--optimizer", load("train_it:make_model", "MODEL"))
    assert optimizer.defaults["weight_decay"] == 1e-4


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("train_it", "such as train:make_model, got 'train_it'"),
        ("train_it.py:model", "write train_it:model"),
        ("src/train_it.py:model", r"write src\.train_it:model"),
        ("tran_it:model", "there is no 'tran_it' in"),
        ("train_it.sub:model", "there is no 'train_it.sub'|is not a package"),
        ("train_it:make_modle", "did you mean 'make_model'"),
        ("wrong_syntax:x", r"importing wrong_syntax .*: SyntaxError: .*wrong_syntax\.py, line 1"),
        ("needs_more:x", r"ModuleNotFoundError: No module named 'a_module.*needs_more\.py, line 1"),
        ("leaves:x", r"it ended the program \(usage: leaves\)"),
        ("train_it:broken", r"failed: ValueError: no data in /nowhere \(.*train_it\.py, line 36\)"),
        # Where their own code was last, not torch's.
        ("train_it:deep", r"failed: RuntimeError: mat1 and mat2.*train_it\.py, line 39\)"),
    ],
)  # fmt: skip
def test_what_is_not_found_or_fails_is_told_in_a_line(project, reference, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        load(reference, "MODEL")
    assert "\n" not in str(caught.value)


def test_diagnose_from_end_to_end(project):
    arguments = ("--data", "train_it:batches", "--max-batches", 3, "--json", "found.json")
    code, out, _ = run("diagnose", "train_it:make_model", *arguments, "--plot", "drift.svg")
    assert code == 0, out
    assert "1 batch norm layer" in out
    content = json.loads((project / "found.json").read_text())
    assert (content["model"], content["data"]) == ("train_it:make_model", "train_it:batches")
    assert content["gap"]["batches"] == 3
    assert (project / "drift.svg").read_text().startswith("<?xml")
    code, out, _ = run("diagnose", "train_it:shifted", "--data", "train_it:here")
    assert code == 1
    assert "BN101" in out
    assert (
        run("diagnose", "train_it:shifted", "--data", "train_it:here", "--ignore", "BN101")[0] == 0
    )
    arguments = ("--optimizer", "train_it:sgd", "--fail-on", "info", "--ignore", "BN101")
    code, out, _ = run("diagnose", "train_it:model", "--data", "train_it:here", *arguments)
    assert "BN204" in out
    assert code == 1


def test_what_cannot_be_diagnosed_is_status_2_not_that_of_findings(project):
    for arguments, message in (
        (("train_it:here", "--data", "train_it:here"), "to make a torch.nn.Module, got list"),
        (("train_it:model", "--data", "train_it:images"), "RuntimeError, see above"),
        (("train_it:model", "--data", "train_it:here", "--plot", "a.jpg"), ".svg, .png, .pdf"),
        (("train_it:broken", "--data", "train_it:here"), "ValueError: no data in /nowhere"),
    ):
        code, out, err = process("diagnose", *arguments, PYTHONPATH=os.pathsep.join(sys.path))
        assert code == 2
        assert out == ""
        assert message in err
