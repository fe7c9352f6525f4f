import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lab_tiny
from batchnorm.errors import MissingDependencyError
from batchnorm.lab import runner, study
from batchnorm.lab.experiments import Run, Settings, convergence
from batchnorm.lab.tensorboard import Log
from batchnorm.lab.tuning import ArmTrial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide(Settings):
    steps: int = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideTrial(ArmTrial):
    steps: int = 20


def read(directory):
    """Return {tag: [(step, value)…]} of a run's event files, by TensorBoard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_run_is_filed_under_what_tells_it_apart_and_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    log = Log(tmp_path, Wide(seeds=2))
    trial = WideTrial(stage="evaluation", seed=3, arm="with a/b", rate=0.1)
    run = Run(
        trial,
        {
            "step": [1, 10],
            "accuracy": [0.5, 0.75],
            "bands": [[1.0, 2.0], [3.0, None]],
            "layers": [4.0, 2.0, 1.0],
            "final": 0.25,
            "note": "text",
        },
        {"run_s": 1.0},
    )
    log.add(run)
    log.add(run)  # of two commands at once neither may draw it twice
    assert log.name(trial) == "evaluation/with a per b/rate=0.1,seed=3"
    assert log.name(dataclasses.replace(trial, steps=5)).endswith("rate=0.1,steps=5,seed=3")
    assert read(tmp_path / log.name(trial)) == {
        "accuracy": [(1, 0.5), (10, 0.75)],
        "bands/1": [(1, 1.0), (10, 3.0)],
        "bands/2": [(1, 2.0)],
        "layers": [(1, 4.0), (2, 2.0), (3, 1.0)],
        "final": [(0, 0.25)],
    }


def test_a_sweep_logs_every_run_whether_done_now_or_earlier(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    short = dataclasses.replace(lab_tiny.SETTINGS, steps=20)
    tiny = dataclasses.replace(lab_tiny.EXPERIMENT, profiles={"quick": short})
    monkeypatch.setattr(convergence, "EXPERIMENT", tiny)
    study.run("convergence", tmp_path, jobs=1)
    assert not (tmp_path / study.LOGS).exists()
    found = study.run("convergence", tmp_path, jobs=1, tensorboard=True)
    folders = {path.parent for path in (tmp_path / study.LOGS).rglob("events.*")}
    assert len(folders) == len(found.runs) == 10
    run = next(r for r in found.runs if r.trial.stage == "evaluation")
    log = Log(tmp_path / study.LOGS, short)
    written = read(tmp_path / study.LOGS / log.name(run.trial))
    curve = list(zip(run.measured["step"], run.measured["accuracy"], strict=True))
    assert written["accuracy"] == [(step, pytest.approx(value)) for step, value in curve]


def a_run(**measured):
    trial = WideTrial(stage="evaluation", seed=0, arm="a", rate=0.1)
    return Run(trial, measured, {})


def test_of_a_wide_list_the_first_sixteen_are_drawn(tmp_path):
    log = Log(tmp_path, Wide(seeds=1))
    run = a_run(wide=[list(range(20)), list(range(100, 117))], narrow=[[7.0] * 16])
    log.add(run)
    found = read(tmp_path / log.name(run.trial))
    assert found == {
        **{f"wide/{n}": [(1, n - 1), (2, n + 99)] for n in range(1, 17)},
        **{f"narrow/{n}": [(1, 7.0)] for n in range(1, 17)},
    }


def test_a_new_log_clears_the_event_files_of_the_old_one_and_nothing_else(tmp_path):
    pytest.importorskip("tensorboard")
    old, new = Log(tmp_path, Wide(seeds=1)), Log(tmp_path, Wide(seeds=1))
    stale, kept = a_run(loss=1.0), a_run(loss=2.0)
    stale = dataclasses.replace(stale, trial=dataclasses.replace(stale.trial, rate=0.3))
    for run in (stale, kept):
        old.add(run)
    notes = tmp_path / "evaluation" / "b" / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    # What TensorBoard's own writer would have left there, as an earlier version of ours did.
    (tmp_path / new.name(kept.trial) / "events.out.tfevents.17.host.3.0").touch()
    new.clear()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [notes]
    assert not (tmp_path / "evaluation" / "a").exists()
    new.add(kept)
    assert read(tmp_path / new.name(kept.trial)) == {"loss": [(0, 2.0)]}
    Log(tmp_path / "nowhere", Wide(seeds=1), pytest.fail).clear()


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    file, notes = tmp_path / "tensorboard", []
    file.touch()
    log = Log(file, Wide(seeds=1), notes.append)
    log.clear()
    log.add(a_run(loss=1.0))
    log.add(a_run(loss=2.0))
    (note,) = notes
    assert note.startswith(f"No more logs for TensorBoard: cannot write in {file} (Not a directory")
    assert "\n" not in note
    assert capfd.readouterr() == ("", "")


FULL = """
import resource, signal, sys
from pathlib import Path
from test_tensorboard import Log, Wide, a_run
# As a disk that is full: no file may be longer than this.
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
log = Log(Path(sys.argv[1]), Wide(seeds=1), print)
log.add(a_run(loss=[0.5] * 10))
log.add(a_run(loss=[0.5] * 1000))
log.add(a_run(loss=0.1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files")
def test_a_full_disk_is_told_in_one_line_and_keeps_what_was_whole(tmp_path):
    pytest.importorskip("tensorboard")
    paths = [str(Path(__file__).parent), lab_tiny.PATH]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"No more logs for TensorBoard: cannot write in {tmp_path} (File too")
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert read(file.parent) == {"loss": [(step, 0.5) for step in range(1, 11)]}


def test_a_log_that_cannot_be_written_costs_no_results(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    short = dataclasses.replace(lab_tiny.SETTINGS, steps=20)
    tiny = dataclasses.replace(lab_tiny.EXPERIMENT, profiles={"quick": short})
    monkeypatch.setattr(convergence, "EXPERIMENT", tiny)
    (tmp_path / study.LOGS).touch()
    progress, notes = runner.Progress(), []
    progress.note = notes.append
    found = study.run("convergence", tmp_path, jobs=1, tensorboard=True, progress=progress)
    assert len(found.runs) == 10
    assert (tmp_path / "report.html").is_file()
    assert len(notes) == 1


def test_without_tensorboard_the_error_comes_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"\.\[tensorboard\]"):
        study.run("convergence", tmp_path, jobs=1, tensorboard=True)
    assert list(tmp_path.iterdir()) == []
