import dataclasses
import json
import os

import pytest
import torch

from batchnorm.errors import BatchNormError
from batchnorm.lab import store
from batchnorm.lab.experiments import Run
from lab_tiny import EXPERIMENT, SETTINGS


@pytest.fixture
def trial():
    return EXPERIMENT.plan(SETTINGS, [])[0]


@pytest.fixture
def files(tmp_path):
    return store.Store(tmp_path / "runs", EXPERIMENT, "data")


def test_what_is_saved_is_what_is_loaded(files, trial):
    saved = files.save(Run(trial, {"loss": (0.1, float("nan"), float("inf"))}, {"ms": 1 / 3}))
    assert saved == Run(trial, {"loss": [0.1, None, None]}, {"ms": 1 / 3})
    assert files.load(trial, pytest.fail) == saved
    assert [p.name for p in files.directory.iterdir()] == [files.path(trial).name]


def test_a_run_is_filed_under_everything_that_its_result_depends_on(files, trial, monkeypatch):
    def name(experiment=EXPERIMENT, data="data", t=trial):
        return store.Store(files.directory, experiment, data).path(t).name

    first = name()
    others = [
        name(dataclasses.replace(EXPERIMENT, recipe=EXPERIMENT.recipe + 1)),
        name(dataclasses.replace(EXPERIMENT, name="other")),
        name(data="other"),
        *(
            name(t=dataclasses.replace(trial, **{field: value}))
            for field, value in {"seed": 5, "arm": "other", "rate": 7.0, "steps": 1}.items()
        ),
    ]
    monkeypatch.setattr(torch, "__version__", "0.0")
    others.append(name())
    monkeypatch.undo()
    monkeypatch.setattr(store, "__version__", "0.0")
    others.append(name())
    monkeypatch.undo()
    assert name() == first
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.125", "0.126"),
        lambda text: "[]",
        lambda text: '{"run": 3}',
        lambda text: "\x00" * 40,
    ],
    ids=["empty", "cut", "edited", "list", "no checksum", "zeros"],
)
def test_a_damaged_file_is_noted_and_done_again(files, trial, damage):
    files.save(Run(trial, {"loss": 0.125}, {}))
    path = files.path(trial)
    path.write_text(damage(path.read_text()))
    notes = []
    assert files.load(trial, notes.append) is None
    assert notes == [f"{path} is damaged; that run is done again."]


def test_a_missing_run_is_no_news(files, trial):
    assert files.load(trial, pytest.fail) is None


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    store.write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(BatchNormError, match="No space left on device"):
        store.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_made_is_the_users_to_choose_again(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BatchNormError, match="--out"):
        store.Store(tmp_path / "file" / "runs", EXPERIMENT, "data")


def test_strict_makes_json_that_any_parser_reads():
    value = store.strict({"a": [1.5, float("nan"), (True, None, "x")], 2: -float("inf")})
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "a": [1.5, None, [True, None, "x"]],
        "2": None,
    }
