import dataclasses
import sys

import pytest

import lab_tiny
from batchnorm.errors import MissingDependencyError
from batchnorm.lab import study
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
    log.add(run)  # a second command over the same folder must not draw it twice
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
    written = read(tmp_path / study.LOGS / Log(tmp_path, short).name(run.trial))
    curve = list(zip(run.measured["step"], run.measured["accuracy"], strict=True))
    assert written["accuracy"] == [(step, pytest.approx(value)) for step, value in curve]


def test_without_tensorboard_the_error_comes_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"\.\[tensorboard\]"):
        study.run("convergence", tmp_path, jobs=1, tensorboard=True)
    assert not list((tmp_path / study.RUNS).iterdir())
