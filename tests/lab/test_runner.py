import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import joblib
import pytest
import torch
from joblib._parallel_backends import ThreadingBackend

import lab_tiny
from batchnorm.errors import InputError, NonFiniteWarning
from batchnorm.lab import runner
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.store import Store
from batchnorm.lab.words import counted
from lab_tiny import COMMAND, EXPERIMENT, SETTINGS

TESTS = Path(__file__).parents[1]


class Log(runner.Progress):
    def __init__(self):
        self.stages, self.advanced, self.notes = [], [], []

    def stage(self, name, total, done):
        self.stages.append((name, total, done))

    def advance(self, name):
        self.advanced.append(name)

    def note(self, message):
        self.notes.append(message)


def execute(directory, settings=SETTINGS, **options):
    data = load("digits")
    return runner.execute(
        EXPERIMENT, settings, data, Store(directory, EXPERIMENT, data.fingerprint), **options
    )


def essence(runs):
    return [(run.trial, run.measured) for run in runs]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Do an undisturbed sweep, one run after the other in this process; return its directory."""
    directory = tmp_path_factory.mktemp("finished")
    execute(directory, jobs=1)
    return directory


@pytest.fixture(scope="module")
def reference(finished):
    """The runs of that sweep."""
    return execute(finished, jobs=1)


def test_every_planned_run_comes_back_in_plan_order(reference):
    assert [run.trial for run in reference] == EXPERIMENT.plan(SETTINGS, reference)
    assert len(reference) == 10
    # The runs really differ, so that comparing them means something.
    assert len({str(run.measured) for run in reference}) == 10


def test_two_processes_give_the_same_bits_as_one(reference, tmp_path):
    threads = torch.get_num_threads()
    assert essence(execute(tmp_path, jobs=2)) == essence(reference)
    assert torch.get_num_threads() == threads


def test_a_second_call_does_nothing_and_more_seeds_add_only_their_own(
    finished, reference, tmp_path
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    log = Log()
    assert essence(execute(tmp_path, jobs=1, progress=log)) == essence(reference)
    assert log.stages == [("learning-rate sweep", 6, 6), ("evaluation", 4, 4)]
    assert log.advanced == []
    more = execute(tmp_path, dataclasses.replace(SETTINGS, seeds=3), jobs=1, progress=log)
    assert log.advanced == ["evaluation"] * 2
    # Whoever asks for each run gets those of earlier, too, and none twice.
    given: list[Run] = []
    again = execute(tmp_path, dataclasses.replace(SETTINGS, seeds=4), jobs=1, each=given.append)
    assert sorted(map(repr, given)) == sorted(map(repr, again))
    assert {r.trial.seed for r in more if r.trial.stage == "evaluation"} == {0, 1, 2}


def test_a_damaged_run_alone_is_done_again(finished, reference, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    files = sorted(tmp_path.iterdir())
    files[4].write_text(files[4].read_text()[:-30])
    before = {path: path.stat().st_mtime_ns for path in files}
    log = Log()
    assert essence(execute(tmp_path, jobs=1, progress=log)) == essence(reference)
    assert len(log.advanced) == 1
    assert log.notes == [f"{files[4]} is damaged; that run is done again."]
    assert [p for p in files if p.stat().st_mtime_ns != before[p]] == [files[4]]


def test_trials_that_raise_are_named_and_the_others_kept(tmp_path):
    settings = dataclasses.replace(SETTINGS, inits=("Xavier", "nonsense"), steps=20, rates=(1.0,))
    with pytest.raises(runner.TrialError) as error:
        execute(tmp_path, settings, jobs=2)
    text = str(error.value)
    assert "2 of 4 trials raised" in text
    assert text.count("init=nonsense") == 2
    assert "could not convert string to float: 'nonsense'" in text
    assert "convergence.py" in text  # where it was raised, from the worker's traceback
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_wrong_with_the_data_is_told_once_and_without_a_traceback(tmp_path):
    def refuse(trial, data):
        raise InputError("expected images.")

    data = load("digits")
    experiment = dataclasses.replace(EXPERIMENT, run=refuse)
    with pytest.raises(runner.TrialError) as error:
        runner.execute(experiment, SETTINGS, data, Store(tmp_path, experiment, ""), jobs=None)
    assert str(error.value) == "6 of 6 runs could not be done: expected images."


def test_a_killed_worker_is_an_error_with_a_remedy(tmp_path):
    data = load("digits")
    experiment = dataclasses.replace(EXPERIMENT, run=lab_tiny.die)
    store = Store(tmp_path, experiment, data.fingerprint)
    with pytest.raises(runner.TrialError, match="fewer --jobs"):
        runner.execute(experiment, SETTINGS, data, store, jobs=2)


def test_a_trial_has_one_thread_and_may_diverge():
    def diverge(trial, data):
        warnings.warn("NaN", NonFiniteWarning, stacklevel=1)
        return Run(trial, {"threads": torch.get_num_threads()}, {"own": 1.5})

    trial = EXPERIMENT.plan(SETTINGS, [])[0]
    torch.set_num_threads(2)
    try:
        start = time.perf_counter()
        done = runner._attempt(diverge, trial, None, None)
        took = time.perf_counter() - start
        assert (done.trial, done.measured) == (trial, {"threads": 1})
        assert 0 < done.timing.pop(runner.RUN_S) <= took
        # The scheduler's grain of processor time; its own test has what else it holds.
        assert 0 <= done.timing.pop(runner.CPU_S) <= took + 0.02
        assert done.timing == {"own": 1.5}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


BUSY = "import time\nwhile time.process_time() < 0.6: pass"


def busy(trial, data):
    """Wait for a process that is busy as long as its code says, and sleep as long again."""
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    time.sleep(0.6)
    return Run(trial, {}, {})


def test_processor_time_has_that_of_child_processes_and_no_waiting():
    done = runner._attempt(busy, EXPERIMENT.plan(SETTINGS, [])[0], None, None)
    assert done.timing[runner.RUN_S] >= 1.2
    # Ticks of a hundredth of a second; ending and starting a process take little more.
    assert 0.58 <= done.timing[runner.CPU_S] < 1.1
    assert done.timing[runner.CPU_S] < done.timing[runner.RUN_S] - 0.5


def test_processor_time_is_not_that_of_other_threads():
    over = threading.Event()

    def spin():
        while not over.is_set():
            pass

    other = threading.Thread(target=spin)
    other.start()
    try:
        trial = EXPERIMENT.plan(SETTINGS, [])[0]
        done = runner._attempt(
            lambda trial, _: time.sleep(0.5) or Run(trial, {}, {}), trial, None, None
        )
    finally:
        over.set()
        other.join()
    assert done.timing[runner.CPU_S] < 0.2


class Borrowed(ThreadingBackend):
    """Stands for a cluster's backend: another class, chosen by the caller's parallel_config."""

    used = 0

    def submit(self, func, callback=None):
        type(self).used += 1
        return super().submit(func, callback)


class InSlices(Borrowed):
    """Ray's backend cannot hand results over one by one; nor can this one."""

    used = 0
    supports_return_generator = False


@pytest.mark.parametrize("backend", [Borrowed, InSlices])
def test_the_callers_backend_takes_over(tmp_path, backend):
    short = dataclasses.replace(SETTINGS, steps=20)
    joblib.register_parallel_backend("borrowed", backend)
    with joblib.parallel_config(backend="borrowed", n_jobs=2):
        runs = execute(tmp_path / "borrowed", short)
    assert backend.used == 10
    assert essence(runs) == essence(execute(tmp_path / "own", short, jobs=1))


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_bits(tmp_path):
    distributed = pytest.importorskip("distributed")
    short, data = dataclasses.replace(SETTINGS, steps=20), load("digits")
    experiment = dataclasses.replace(EXPERIMENT, run=lab_tiny.whose)
    store = Store(tmp_path / "dask", experiment, data.fingerprint)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask"),
    ):
        client.run(sys.path.append, str(TESTS))
        workers = set(client.run(os.getpid).values())
        runs = runner.execute(experiment, short, data, store)
    assert {run.timing["process"] for run in runs} == workers
    assert len(workers) == 2
    assert essence(runs) == essence(execute(tmp_path / "own", short, jobs=1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_where_it_was(reference, tmp_path, number):
    out = tmp_path / "out"
    arguments = ["lab", "run", "--profile", "tiny", "--jobs", "2", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        # Ten runs that take seconds at least: none of them may be over before the signal comes.
        env={**os.environ, "PYTHONPATH": lab_tiny.PATH, "LAB_TINY_PAUSE_S": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    runs = out / "runs"
    deadline = time.monotonic() + 60
    while not list(runs.glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGINT:  # as a terminal does: to the workers as well
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, err = process.communicate(timeout=30)
    kept = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 1 <= len(kept) < 10
    assert not (out / "results.json").exists()
    assert _group_is_gone(process.pid)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"{counted(len(kept), 'finished run')} kept in {runs}" in err
        assert f"batchnorm {' '.join(arguments)}" in err
        assert "Traceback" not in err

    log = Log()
    assert essence(execute(runs, jobs=1, progress=log)) == essence(reference)
    assert len(log.advanced) == 10 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert log.notes == []


def _group_is_gone(group):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
