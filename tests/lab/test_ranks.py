import subprocess

import pytest

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
        ranks.together(rank_tasks.print_much_and_hang, 2, timeout_s=0.2)
    assert [process.returncode for process in started] == [-9, -9]


def test_an_interrupt_ends_the_processes(started, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ranks.together(rank_tasks.print_much_and_hang, 2)
    assert [process.returncode for process in started] == [-9, -9]
