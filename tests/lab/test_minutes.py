"""benchmarks/lab_minutes.py: which results it adds up, and how."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import lab_tiny
from batchnorm import lab
from batchnorm.lab import minutes
from batchnorm.lab.experiments import convergence
from batchnorm.lab.results import FILE
from batchnorm.lab.runner import CPU_S, RUN_S, core_seconds

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lab_minutes.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("lab_minutes_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("timing", "seconds"),
    [
        ({RUN_S: 5.0, CPU_S: 2.0}, 2.0),
        ({RUN_S: 1.0, CPU_S: 3.0}, 3.0),  # two processes at once
        ({RUN_S: 0.25}, 0.25),  # filed before processor time was kept
        ({}, 0.0),
    ],
)
def test_processor_time_counts_and_the_clock_where_there_is_none(timing, seconds):
    assert core_seconds(timing) == seconds


@pytest.mark.slow
def test_only_the_profiles_own_settings_are_its_minutes(script, tmp_path, monkeypatch, capsys):
    settings = dataclasses.replace(lab_tiny.SETTINGS, steps=20)
    experiment = dataclasses.replace(lab_tiny.EXPERIMENT, profiles={"quick": settings})
    monkeypatch.setattr(convergence, "EXPERIMENT", experiment)
    found = lab.run("convergence", tmp_path / "results" / "convergence", jobs=1)
    # Alphabetically after the plain one, which it must not replace.
    lab.run("convergence", tmp_path / "results" / "convergence-3-seeds", seeds=3, jobs=1)
    target = tmp_path / "src" / "batchnorm" / "lab" / minutes.FILE
    target.parent.mkdir(parents=True)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["lab_minutes.py", str(tmp_path / "results")])
    script.main()
    seconds = sum(run["timing"][CPU_S] for run in found.content["runs"])
    written = json.loads(target.read_text())
    assert written["core_minutes"] == {"convergence": {"quick": round(seconds / 60, 2)}}
    environment = json.loads((tmp_path / "results" / "convergence" / FILE).read_text())[
        "environment"
    ]
    assert written["timed_on"] == [f"{environment['platform']}, {environment['cores']} cores"]
    assert capsys.readouterr().err.startswith("convergence-3-seeds: not as its profile has it")
