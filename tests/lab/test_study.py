"""Where results go: what is there already is kept, or refused before anything runs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import lab_tiny
from batchnorm import lab
from batchnorm.errors import ArgumentError, InputError
from batchnorm.lab import runner, study
from batchnorm.lab.experiments import convergence, explosion
from batchnorm.lab.results import FILE, SCHEMA, check_parent

SETTINGS = dataclasses.replace(lab_tiny.SETTINGS, steps=20)
PROFILES = {"quick": SETTINGS, "other": SETTINGS}


class Log(runner.Progress):
    def __init__(self):
        self.ran, self.notes = 0, []

    def advance(self, name):
        self.ran += 1

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        experiment = dataclasses.replace(lab_tiny.EXPERIMENT, profiles=PROFILES)
        patch.setattr(convergence, "EXPERIMENT", experiment)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    lab.run("convergence", directory, jobs=1)
    return directory


@pytest.fixture
def done(finished, tmp_path):
    """Return a directory with the two seeds' runs and results."""
    return shutil.copytree(finished, tmp_path / "done")


def again(directory, name="convergence", **options):
    log = Log()
    return lab.run(name, directory, jobs=1, progress=log, **options), log


def edit(directory, change):
    path = directory / FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def wine(path, seed=0):
    """Made-up data that another seed makes otherwise."""
    rng = np.random.default_rng(seed)
    np.savez(path, x=rng.normal(size=(400, 9)), y=np.arange(400) % 10)
    return path


def refused(directory, message, name="convergence", **options):
    """Ask for what must not be done, and check that nothing was."""
    files = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    log = Log()
    with pytest.raises(ArgumentError, match=message) as error:
        lab.run(name, directory, jobs=1, progress=log, **options)
    assert (log.ran, log.notes) == (0, [])
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == files
    return str(error.value)


def test_the_same_question_and_more_seeds_go_on_from_the_kept_runs(done):
    first = lab.run("convergence", done, jobs=1)
    found, log = again(done)
    assert (log.ran, log.notes) == (0, [])
    assert found.content["findings"] == first.content["findings"]
    found, log = again(done, seeds=3)
    assert log.ran == 2  # the third seed's, of two arms
    assert found.settings.seeds == 3


def test_results_of_another_question_are_not_replaced(done, tmp_path):
    text = refused(done, "has other results", "explosion")
    assert f"{done / FILE} has other results, and they would be lost." in text
    assert "There: convergence, profile quick, 2 seeds, data digits (" in text
    assert "Asked for: explosion, profile quick, 8 seeds, data digits (" in text
    assert explosion.PROFILES["quick"].seeds == 8
    assert text.endswith(
        f"Choose another directory (--out), or delete {done / FILE} if you do not need it."
    )
    refused(done, "Asked for: convergence, profile other, 2 seeds", profile="other")
    refused(done, "There: .* 2 seeds.*Asked for: .* 1 seed, ", seeds=1)
    data = wine(tmp_path / "wine.npz")
    refused(done, r"There: .*data digits.*Asked for: .*data wine\.npz", data=data)


@pytest.mark.slow
def test_data_of_the_same_name_are_other_data_and_of_another_name_the_same(tmp_path):
    one, other = wine(tmp_path / "wine.npz"), tmp_path / "sub" / "wine.npz"
    other.parent.mkdir()
    wine(other, seed=1)
    lab.run("convergence", tmp_path / "out", jobs=1, data=one)
    refused(tmp_path / "out", r"wine\.npz \(.*wine\.npz \(", data=str(other))
    same = shutil.copy(one, tmp_path / "vin.npz")
    found, log = again(tmp_path / "out", data=same)
    assert log.ran == 0
    assert found.content["data"]["name"] == "vin.npz"
    assert f"--data {same} --seeds 2" in found.content["command"]


def test_the_same_question_is_answered_anew_by_other_versions(done):
    edit(done, lambda content: content["environment"].update(batchnorm="0.0.9", torch="1.2"))
    edit(done, lambda content: content.update(schema=SCHEMA - 1))
    found, log = again(done)
    assert log.notes == []
    assert found.content["environment"]["torch"] == torch.__version__
    assert found.content["schema"] == SCHEMA


@pytest.mark.slow
def test_damaged_results_are_written_anew(done):
    path = done / FILE
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-2] + b"\xff"):
        path.write_bytes(content)
        found, log = again(done)
        assert log.notes == [f"{path} is damaged; it is written anew."]
        assert log.ran == 0
        assert json.loads(path.read_text())["findings"] == found.content["findings"]


def test_incomplete_results_and_those_of_an_older_recipe_are_written_anew(done):
    edit(done, lambda content: content["runs"].pop())
    edit(done, lambda content: content["experiment"].update(recipe=0))
    with pytest.raises(InputError, match="1 of 10 are missing"):
        lab.write_report(done)
    again(done)
    assert lab.write_report(done).is_file()


@pytest.mark.parametrize(
    "text",
    ["{}", "[1, 2]", "3", '{"experiment": "mine", "profile": 1}', '{"loss": 1}\n{"loss": 2}\n', ""],
)
def test_what_others_wrote_is_not_replaced(done, text):
    (done / FILE).write_text(text)
    refused(done, "something else, and would be lost")


def test_one_experiment_does_not_go_where_several_are(done, tmp_path):
    several = tmp_path / "several"
    shutil.copytree(done, several / "one")
    text = refused(several, r"results of several experiments \(one\)")
    assert text.endswith(f"with --out, such as {several / 'convergence'}.")
    (several / "one" / FILE).write_text("[]")  # somebody else's
    assert again(several)[0].content["profile"] == "quick"


@pytest.mark.parametrize("name", ["report.html", "claims.md", "figures/mine.png"])
def test_files_of_others_are_not_replaced(done, tmp_path, name):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("thesis")
    refused(tmp_path / "mine", "is in the way")
    if not name.startswith("figures"):
        with pytest.raises(ArgumentError, match="not the lab's"):
            check_parent(tmp_path / "mine")
        (done / name).write_text("thesis")
        with pytest.raises(ArgumentError, match=f"{name} is in the way"):
            lab.write_report(done)
        assert (done / name).read_text() == "thesis"


def test_a_run_that_was_stopped_goes_on_beside_its_page(done):
    (done / FILE).unlink()
    assert again(done)[1].ran == 0


def test_several_names_at_once_are_told(tmp_path):
    with pytest.raises(ArgumentError, match=r"one experiment; got \['lag'\]"):
        lab.run(["lag"], tmp_path)


def test_what_cannot_be_read_is_not_replaced(done):
    (done / FILE).unlink()
    (done / FILE).mkdir()
    refused(done, "cannot be read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": ""}, "out: expected a directory.*got ''"),
        ({"out": None}, "out: expected a directory.*got None"),
        ({"seeds": "2"}, "seeds: expected a whole number; got '2'"),
        ({"seeds": 2.0}, r"seeds: expected a whole number; got 2\.0"),
        ({"seeds": True}, "seeds: expected a whole number; got True"),
        ({"jobs": "1"}, "jobs: expected a whole number; got '1'"),
        ({"data": np.zeros((3, 4))}, "data: expected 'digits' or the path .*; got a ndarray"),
        ({"data": None}, "got a NoneType"),
    ],
)
def test_what_is_of_the_wrong_type_is_told_before_anything_runs(
    tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        lab.run(**{"name": "convergence", "out": "out", **options})
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_paths_of_other_kinds_are_as_good(finished, tmp_path):
    done = shutil.copytree(finished, tmp_path / "done")
    found, log = again(done, seeds=np.int64(2))
    assert log.ran == 0
    assert json.loads((done / FILE).read_text())["settings"]["seeds"] == 2
    data = tmp_path / "wine.npz"
    assert study.default_directory("lag", profile="quick", seeds=None, data=data) == "lag-wine"
    assert found.settings == SETTINGS


def test_a_report_of_nothing_says_what_it_takes(done, tmp_path):
    nowhere, other = tmp_path / "nowhere", done / "report.txt"
    other.touch()
    with pytest.raises(InputError, match=f"{nowhere}: expected .* there is no such thing"):
        lab.write_report(nowhere)
    with pytest.raises(InputError, match=f"{nowhere / FILE}: expected .* there is no such thing"):
        lab.write_report(nowhere / FILE)
    with pytest.raises(InputError, match=f"got a file of another name.*directory: {done}"):
        lab.write_report(other)
    with pytest.raises(InputError, match=r"that `batchnorm lab run` has filled; there is no"):
        lab.write_report(done / "runs")
    assert lab.write_report(done / FILE) == done / "report.html"
