"""Runs a suite, once for each way to allocate memory, and puts the findings together."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from batchnorm.bench import cases, results, worker
from batchnorm.bench.worker import DEFAULT, Event, Request
from batchnorm.errors import ArgumentError, BatchNormError

DEVICES = ("cpu", "cuda")

#: Inputs and the order of contenders are drawn from it.
SEED = 0

#: What each way to allocate adds to the environment. glibc gives large blocks back to the system at
#: once and asks for them anew at the next call, a page fault for each 4 KB; with these it keeps
#: them: nothing is mapped singly below 4 GB, nothing given back below 8 GB, and what is asked for
#: is asked for in pieces of 256 MB.
ALLOCATORS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        DEFAULT: MappingProxyType({}),
        "no page faults": MappingProxyType(
            {
                "MALLOC_MMAP_THRESHOLD_": "4294967296",
                "MALLOC_TRIM_THRESHOLD_": "8589934592",
                "MALLOC_TOP_PAD_": "268435456",
            }
        ),
    }
)

#: Other processes' share of the cores, above which a note says so.
BUSY = 0.25


class MeasuringError(BatchNormError):
    """A process that measures has died; the message has its last words."""


class Progress:
    """What a watcher is told; this one stays silent."""

    def start(self, total: int) -> None:
        """Tell how many steps there will be."""

    def step(self, what: str) -> None:
        """Tell what is measured next."""


def run(
    suite: str = "quick",
    *,
    device: str = "cpu",
    threads: int | None = None,
    text: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a suite, in a process for each way to allocate memory.

    Args:
        suite: its name: quick takes a minute, full 15.
        device: cpu or cuda.
        threads: of torch; its own choice if None.
        text: only the cases that have it in their titles.
        progress: is told what is going on.

    Returns:
        What `results.summarise` says.

    Raises:
        ArgumentError: there is no such suite, case or device.
        MeasuringError: the measuring process died.
    """
    chosen = cases.find(suite, text)
    _check_device(device)
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads must be at least 1; got {threads}.")
    progress = progress or Progress()
    names = allocators(device)
    progress.start(len(names) * worker.steps(chosen))
    events: list[Event] = [{"event": "note", "text": words} for words in _busy()]
    for name in names:
        request = Request(suite, text, device, threads, name, SEED)
        for event in measured(request):
            if event["event"] == "step":
                progress.step(f"{event['what']}, {name}" if len(names) > 1 else event["what"])
            else:
                events.append(event)
    command = ["batchnorm", "bench", "--suite", suite, "--device", device]
    command += ["--threads", str(threads)] if threads is not None else []
    command += ["--filter", text] if text else []
    return results.summarise(suite, events, command=shlex.join(command))


def allocators(device: str) -> tuple[str, ...]:
    """Return the ways to allocate that can be had; other libraries than glibc have no such names.

    Memory on a GPU comes from torch, which keeps it.
    """
    glibc = platform.libc_ver()[0] == "glibc"
    return tuple(ALLOCATORS) if device == "cpu" and glibc else (DEFAULT,)


def child_environment(allocator: str, present: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of the process that measures with this allocator."""
    ours = {name for settings in ALLOCATORS.values() for name in settings}
    return {
        # What the user has set would make the default something else.
        **{name: value for name, value in present.items() if name not in ours},
        # Inductor's pool of compilers would wait beside what is measured.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **ALLOCATORS[allocator],
    }


def measured(request: Request) -> Iterator[Event]:
    """Yield the events of a process that measures this.

    Raises:
        MeasuringError: it died.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(  # noqa: S603 - this interpreter, this package
            worker.command(request),
            env=child_environment(request.allocator),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                yield json.loads(line)
            status = process.wait()
        finally:
            process.kill()  # nothing, if it has ended
        if status != 0:
            said.seek(0)
            words = said.read().strip().splitlines() or ["nothing"]
            raise MeasuringError(
                f"The process that measured with the allocator mode {request.allocator!r} ended "
                f"with status {status}{' (out of memory?)' if status == -9 else ''}. Its last "
                f"words: {words[-1]}"
            )


def _busy() -> list[str]:
    """Say that other processes are running, if they are: paired times bear it to a degree."""
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    if load <= BUSY * cores:
        return []
    return [
        f"The machine was busy at the start: load {load:.1f} on {cores} cores. Measure again when "
        "it is quiet."
    ]


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise ArgumentError(
            f"There is no device called {device!r}. Expected one of: {', '.join(DEVICES)}."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            "expected a CUDA device, found none. Measure the CPU with --device cpu, or install a "
            "torch that is built for this machine's GPU."
        )
