import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lab_tiny
import rank_tasks
from batchnorm.errors import SyncError
from batchnorm.lab import ranks


@pytest.fixture
def started(monkeypatch):
    """Every process that is started."""
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return processes


def test_ranks_talk_to_each_other_and_their_results_come_in_order(started):
    assert ranks.together(rank_tasks.add_up, 2, 10) == [(0, 2, 21, 1), (1, 2, 21, 1)]
    assert [process.returncode for process in started] == [0, 0]


def test_a_failure_is_told_with_its_cause():
    with pytest.raises(
        SyncError, match=r"(?s)expected every process to finish.*ValueError: the cau"
    ):
        ranks.together(rank_tasks.fail, 1)


def test_a_process_that_is_killed_does_not_leave_the_others_waiting(started):
    with pytest.raises(SyncError, match=r"Rank 0 ended with status -9:\n\(nothing was printed\)"):
        ranks.together(rank_tasks.die, 2, 0)
    assert [process.returncode for process in started] == [-9, -9]


def test_processes_that_hang_are_ended_when_their_time_is_over(started):
    with pytest.raises(SyncError, match=r"within 0.2 s, got none from rank 0, 1; .* --jobs"):
        ranks.together(rank_tasks.hang, 2, timeout_s=0.2)
    assert [process.returncode for process in started] == [-9, -9]


def test_what_ranks_print_does_not_stop_them():
    assert ranks.together(rank_tasks.print_much, 2, timeout_s=60) == [0, 1]


@pytest.mark.slow
def test_ranks_end_with_a_parent_that_is_killed(tmp_path):
    code = """
import pathlib, sys, rank_tasks
from batchnorm.lab import ranks
ranks.together(rank_tasks.hang, 2, pathlib.Path(sys.argv[1]))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": lab_tiny.PATH},
    )
    files = [tmp_path / f"rank{rank}" for rank in range(2)]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    parent.kill()
    parent.wait()
    children = [int(file.read_text()) for file in files]
    until(lambda: not any(map(alive, children)))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        # One that nobody has waited for is dead all the same.
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_interrupt_ends_the_processes(started, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ranks.together(rank_tasks.hang, 2)
    assert [process.returncode for process in started] == [-9, -9]
