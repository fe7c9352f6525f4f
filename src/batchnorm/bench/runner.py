"""Runs a suite, in several processes for each way to allocate memory."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from batchnorm.bench import cases, load, results, worker
from batchnorm.bench.device import COLD, WARM
from batchnorm.bench.worker import DEFAULT, NO_FAULTS, Event, Request
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
        NO_FAULTS: MappingProxyType(
            {
                "MALLOC_MMAP_THRESHOLD_": "4294967296",
                "MALLOC_TRIM_THRESHOLD_": "8589934592",
                "MALLOC_TOP_PAD_": "268435456",
            }
        ),
    }
)

#: Seconds for which others are watched before the measuring.
WATCH_S = 1.0

#: What may be turned off with `BATCHNORM_DISABLE`.
_DISABLE, _BACKENDS = "BATCHNORM_DISABLE", ("native", "triton")


class MeasuringError(BatchNormError):
    """A process that measures has died; the message has its last words."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while measuring.

    Attributes:
        content: what `run` would have returned, of what was measured until then and marked as not
            complete; None if that is nothing.
    """

    def __init__(self, content: dict[str, Any] | None) -> None:
        super().__init__()
        self.content = content


class Progress:
    """What a watcher is told; this one stays silent."""

    def start(self, suite: str, total: int, minutes: float | None) -> None:
        """Tell how many steps there will be, and what they take on two quiet cores, if there."""

    def step(self, what: str) -> None:
        """Tell what is measured next."""

    def note(self, text: str) -> None:
        """Tell what the watcher had better know now."""


def run(
    suite: str = "quick",
    *,
    device: str | None = None,
    threads: int | None = None,
    text: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a suite, in several processes for each way to allocate memory.

    Args:
        suite: its name: quick takes about a minute, full half an hour.
        device: cpu or cuda; what the suite is for if None.
        threads: of torch; its own choice if None.
        text: only the cases that have it in their titles.
        progress: is told what is going on.

    Returns:
        What `results.summarise` says.

    Raises:
        ArgumentError: there is no such suite, case, device or backend to disable; or the suite is
            for a GPU and the device is none.
        MeasuringError: a measuring process died.
        Interrupted: Ctrl-C; it has what was measured until then.
    """
    chosen = cases.find(suite, text)
    device = device or chosen.device
    _check_device(device, suite, chosen)
    _check_disabled()
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads must be at least 1; got {threads}.")
    progress = progress or Progress()
    names = allocators(device)
    command = ["batchnorm", "bench", "--suite", suite, "--device", device]
    command += ["--threads", str(threads)] if threads is not None else []
    command += ["--filter", text] if text else []
    disabled = os.environ.get(_DISABLE)
    prefix = f"{_DISABLE}={shlex.quote(disabled)} " if disabled else ""
    summarise = partial(results.summarise, suite, command=prefix + shlex.join(command), filter=text)
    minutes = chosen.minutes if device == "cpu" else None
    progress.start(suite, chosen.processes * len(names) * chosen.steps, minutes)
    events: list[Event] = []
    try:
        # Processes of one allocator are not neighbours in time: what slows the machine down for a
        # while then meets both allocators, and not all processes.
        requests = [
            Request(suite, text, device, threads, name, SEED, part)
            for part in range(chosen.processes)
            for name in names
        ]
        for event in _watched(requests, progress):
            if event["event"] == "step":
                progress.step(event["what"])
            else:
                events.append(event)
    except KeyboardInterrupt:
        some = any(event["event"] in ("row", "size") for event in events)
        content = summarise(events, complete=False) if some else None
        raise Interrupted(content) from None
    return summarise(events)


def _watched(requests: list[Request], progress: Progress) -> Iterator[Event]:
    """Yield what each process finds, and how much of the machine others use meanwhile."""
    before = load.others(WATCH_S)
    yield {"event": "load", "when": "before", "others": before}
    if before is not None and load.busy(before):
        progress.note(
            f"Other processes use {before:.0%} of the processors' time now. Times are compared in "
            "pairs, which bears that to a degree; measure when the machine is quiet."
        )
    most = 0.0
    for request in requests:
        start = load.Used.now()
        for event in measured(request):
            if event["event"] == "step":
                event["what"] += f", {request.allocator}, process {request.part + 1}"
            yield event
        others = start.others(load.Used.now()) if start else None
        most = max(most, others or 0.0)
        yield {"event": "load", "when": "during", "others": others}
    if load.busy(most):
        yield {
            "event": "note",
            "text": f"The machine was busy: other processes used up to {most:.0%} of the "
            "processors' time while a process measured. Measure again when it is quiet.",
        }


def allocators(device: str) -> tuple[str, ...]:
    """Return the ways to allocate that can be had; other libraries than glibc have no such names.

    Memory on a GPU comes from torch, which keeps it; what differs there is what its cache holds.
    """
    if device == "cuda":
        return COLD, WARM
    return tuple(ALLOCATORS) if platform.libc_ver()[0] == "glibc" else (DEFAULT,)


def child_environment(allocator: str, present: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of the process that measures with this allocator."""
    ours = {name for settings in ALLOCATORS.values() for name in settings} | {"GLIBC_TUNABLES"}
    return {
        # What the user has set would make the default something else.
        **{name: value for name, value in present.items() if name not in ours},
        # Inductor's pool of compilers would wait beside what is measured.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **ALLOCATORS.get(allocator, {}),
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
        if status == -signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C goes to both of us, and may reach it first
        if status != 0:
            said.seek(0)
            words = said.read().strip().splitlines() or ["nothing"]
            raise MeasuringError(
                f"The process that measured with the allocator mode {request.allocator!r} ended "
                f"with status {status}{' (out of memory?)' if status == -9 else ''}. Its last "
                f"words: {words[-1]}"
            )


def _check_disabled() -> None:
    """Refuse what would be passed over, and then measure what the user thinks is turned off."""
    for name in filter(None, os.environ.get(_DISABLE, "").split(",")):
        if name not in _BACKENDS:
            raise ArgumentError(
                f"{_DISABLE} names {name!r}, which cannot be turned off. Expected: "
                f"{', '.join(_BACKENDS)}."
            )


def _check_device(device: str, suite: str, chosen: cases.Suite) -> None:
    if device not in DEVICES:
        raise ArgumentError(
            f"There is no device called {device!r}. Expected one of: {', '.join(DEVICES)}."
        )
    if chosen.device == "cuda" != device:
        raise ArgumentError(
            f"The {suite} suite's tensors are of sizes for a GPU; got device {device!r}. Leave "
            f"--device out, or take one of the CPU's suites: {', '.join(cases.SUITES)}."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            "expected a CUDA device, found none. Measure the CPU with --suite quick --device cpu, "
            "or install a torch that is built for this machine's GPU."
        )
