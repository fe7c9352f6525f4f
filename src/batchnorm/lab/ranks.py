"""A function in several new processes at once, with torch.distributed (gloo) among them.

`together(function, world, *arguments)` starts `python -m batchnorm.lab.ranks` once for each rank:
programs of their own, because those who call it are workers themselves, with threads, which may
not be forked, and perhaps daemons, which may not have children of multiprocessing's. They meet
through a file in a temporary folder, so no port is needed that another run may have.
"""

from __future__ import annotations

import datetime as dt
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from batchnorm.errors import SyncError
from batchnorm.lab.orphans import die_with

#: Seconds between two looks at the processes.
PAUSE_S = 0.02

#: Characters of a failed process's last words that an error repeats.
LAST_WORDS = 2000


def together(
    function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 600
) -> list[Any]:
    """Call `function(rank, world, *arguments)` on each of `world` ranks; return what they return.

    Args:
        function: a module's top-level function.
        world: how many processes. Each has one thread.
        arguments: what can be pickled.
        timeout_s: for all of it, the start of the processes included.

    Raises:
        SyncError: a process failed, died or was not done in time. The others have been ended:
            no process outlives the call.
    """
    if not distributed.is_available():
        raise SyncError(
            "expected a torch with torch.distributed, got one built without it; install another"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").write_bytes(pickle.dumps((os.getpid(), function, timeout_s, arguments)))
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world):
                # Into a file: a pipe that nobody reads fills up, and its writer waits.
                with (folder / f"output{rank}").open("wb") as output:
                    processes.append(
                        subprocess.Popen(  # noqa: S603 - nothing here comes from outside
                            [sys.executable, "-m", __name__, name, str(rank), str(world)],
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        results = [(folder / f"result{rank}").read_bytes() for rank in range(world)]
    return [pickle.loads(result) for result in results]  # noqa: S301 - written by ourselves


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    ends_at = time.monotonic() + timeout_s
    while True:
        statuses = [process.poll() for process in processes]
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed:
            # One that fails takes others down; of several that have ended, any may be the cause.
            words = "\n".join(
                f"Rank {rank} ended with status {statuses[rank]}:\n{_last_words(folder, rank)}"
                for rank in failed
            )
            raise SyncError(f"expected every process to finish, all of {len(processes)}.\n{words}")
        if all(status == 0 for status in statuses):
            return
        if time.monotonic() > ends_at:
            late = [rank for rank, status in enumerate(statuses) if status is None]
            raise SyncError(
                f"expected {len(processes)} processes to finish within {timeout_s:g} s, got none "
                f"from rank {', '.join(map(str, late))}; on a machine so busy, use fewer --jobs. "
                f"Rank {late[0]}'s output:\n{_last_words(folder, late[0])}"
            )
        time.sleep(PAUSE_S)


def _last_words(folder: Path, rank: int) -> str:
    words = (folder / f"output{rank}").read_text(encoding="utf-8", errors="replace")
    return words[-LAST_WORDS:].strip() or "(nothing was printed)"


def _main(name: str, rank: int, world: int) -> None:
    """Be one of the processes."""
    folder = Path(name)
    parent, function, timeout_s, arguments = pickle.loads(  # noqa: S301 - written by the parent
        (folder / "task").read_bytes()
    )
    die_with(parent)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        (folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=dt.timedelta(seconds=timeout_s),
    )
    result = pickle.dumps(function(rank, world, *arguments))
    (folder / f"result{rank}").write_bytes(result)
    # Who leaves first takes its connections along: not before all are done.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    status = 1
    try:
        _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # gloo's threads may abort an interpreter that ends (torch 2.13): so it does not.
        os._exit(status)
