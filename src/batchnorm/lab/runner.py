"""Does an experiment's trials in parallel processes, and files each one when it is finished."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from typing import Any

import joblib
import torch

from batchnorm.errors import BatchNormError, NonFiniteWarning
from batchnorm.lab.data import Dataset
from batchnorm.lab.experiments import Experiment, Run, Settings, Trial
from batchnorm.lab.orphans import die_with
from batchnorm.lab.store import Store

# A backend that cannot hand results over one by one (Ray's) gets the trials in slices of this many
# for each worker: few enough to lose little when stopped, enough to keep workers from waiting.
SLICE = 4

# The entry of a run's timing that says how many seconds the whole of it took.
RUN_S = "run_s"

# The entry that says how many seconds of processor time it took, with the processes that it started
# (where runs are threads of one process: that any of them started).
CPU_S = "cpu_s"


def core_seconds(timing: Mapping[str, float]) -> float:
    """Return how long one core takes for a run; by the clock, where processor time was not kept."""
    return timing.get(CPU_S, timing.get(RUN_S, 0.0))


class TrialError(BatchNormError):
    """Trials raised, and the message names them; or a worker died. All other runs are kept."""


class Progress:
    """What a watcher is told; this one stays silent."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Announce a stage of `total` runs, of which `done` were finished earlier."""

    def advance(self, name: str) -> None:
        """Tell that a run of this stage is finished and filed."""

    def note(self, message: str) -> None:
        """Tell something the user should know."""


@dataclass(frozen=True)
class _Failure:
    trial: Trial
    report: str
    ours: str = ""  # the message, if it says all


def execute(
    experiment: Experiment[Any, Any],
    settings: Settings,
    data: Dataset,
    store: Store,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    each: Callable[[Run[Any]], None] | None = None,
) -> list[Run[Any]]:
    """Do what the experiment plans, skip what is already done, and return every run in plan order.

    Args:
        experiment: What to run.
        settings: The experiment's own settings.
        data: What to train on.
        store: Where finished runs are, and go.
        jobs: How many local processes; -1 for one a core. None leaves it to the surrounding
            `joblib.parallel_config`, which may name a Dask or Ray cluster (without one: no
            parallelism).
        progress: Who is told.
        each: Is given every run once, as soon as it is there, be it from an earlier time.

    Raises:
        TrialError: Some trials raised (the others were done first), or a worker was killed.
    """
    progress = progress or Progress()
    finished: dict[Any, Run[Any]] = {}
    while True:
        wanted = experiment.plan(settings, list(finished.values()))
        new = [trial for trial in wanted if trial not in finished]
        if not new:
            return [finished[trial] for trial in wanted]
        filed = {trial: store.load(trial, progress.note) for trial in new}
        known = finished | {trial: run for trial, run in filed.items() if run}
        todo = [trial for trial in new if trial not in known]
        left = Counter(trial.stage for trial in todo)
        for run in filter(None, filed.values()):
            if each:
                each(run)
        for stage, total in Counter(trial.stage for trial in new).items():
            progress.stage(stage, total, total - left[stage])
        failures = []
        try:
            with contextlib.closing(_results(experiment.run, todo, data, jobs)) as results:
                for result in results:
                    if isinstance(result, _Failure):
                        failures.append(result)
                    else:
                        known[result.trial] = store.save(result)
                        if each:
                            each(known[result.trial])
                    progress.advance(result.trial.stage)
        except BrokenProcessPool as error:
            raise TrialError(
                "A worker process was killed, as happens when memory runs out. The finished runs "
                "are kept. Give the same command again, with fewer --jobs if memory was the cause."
            ) from error
        if failures:
            raise TrialError(_describe(failures, len(todo)))
        finished = {trial: known[trial] for trial in wanted}


def _results(
    run: Callable[[Any, Dataset], Run[Any]], todo: Sequence[Any], data: Dataset, jobs: int | None
) -> Generator[Run[Any] | _Failure]:
    """Yield results as they come, in any order; closing it early stops the workers."""
    local = (
        contextlib.nullcontext()
        if jobs is None
        else joblib.parallel_config(backend="loky", n_jobs=jobs)
    )
    parent = None if jobs is None else os.getpid()
    with local:
        backend, workers = joblib.parallel.get_active_backend()
        streams = backend.supports_return_generator
        size = max(1, len(todo) if streams else SLICE * backend.effective_n_jobs(workers))
        for start in range(0, len(todo), size):
            # One trial a task: a batch of several would be filed only when the last is done.
            parallel = joblib.Parallel(
                return_as="generator_unordered" if streams else "list", batch_size=1
            )
            # A list comes when all is done, far too long to hold an interrupt back.
            with _interrupts_held() if streams else contextlib.nullcontext():
                results = parallel(
                    joblib.delayed(_attempt)(run, trial, data, parent)
                    for trial in todo[start : start + size]
                )
            yield from results


def _attempt(
    run: Callable[[Any, Dataset], Run[Any]], trial: Any, data: Dataset, parent: int | None
) -> Run[Any] | _Failure:
    """Run in a worker: one thread, for equal results everywhere and no fight over the cores.

    How long it took goes into the run's timing, as RUN_S and CPU_S.
    """
    if parent not in (None, os.getpid()):
        die_with(parent)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # A sweep goes on until it diverges; that is a result, not an accident.
            warnings.simplefilter("ignore", NonFiniteWarning)
            start, busy = time.perf_counter(), _processor_s()
            done = run(trial, data)
            took = {RUN_S: time.perf_counter() - start, CPU_S: _processor_s() - busy}
            return replace(done, timing={**done.timing, **took})
    except BatchNormError as error:
        return _Failure(trial, traceback.format_exc(), str(error))
    except Exception:
        return _Failure(trial, traceback.format_exc())
    finally:
        torch.set_num_threads(threads)


def _processor_s() -> float:
    """Processor time of this thread, and of processes that have been started and have ended."""
    ended = os.times()
    return time.thread_time() + ended.children_user + ended.children_system


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while workers are started, so that they inherit a mask that ignores it.

    A terminal sends Ctrl-C to the workers too. They would die in the middle of a traceback; the
    parent, which is to stop them in good order, gets it as soon as the mask is lifted.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe(failures: Sequence[_Failure], total: int) -> str:
    reasons = {failure.ours for failure in failures}
    if len(reasons) == 1 and all(reasons):
        # What is wrong with the data or the settings is wrong with every trial.
        return f"{len(failures)} of {total} runs could not be done: {reasons.pop()}"
    trials = "\n".join(
        f"  {', '.join(f'{key}={value}' for key, value in asdict(failure.trial).items())}\n"
        f"    {failure.report.strip().splitlines()[-1]}"
        for failure in failures
    )
    return (
        f"{len(failures)} of {total} trials raised an error; the others are done and kept, and the "
        f"same command tries these again:\n{trials}\n"
        f"The first one in full:\n{failures[0].report}"
    )
