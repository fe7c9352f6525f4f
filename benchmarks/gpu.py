"""A session on a machine with a GPU: is everything right there, is it fast, in at most 8 minutes.

    make gpu                                                 or: PYTHONPATH=src python3 …/gpu.py
    PYTHONPATH=src python3 benchmarks/gpu.py --rehearse      every part, on the CPU, on tiny tensors
    PYTHONPATH=src python3 benchmarks/gpu.py --page          the page anew, from the file of results

Needs a python with torch and triton, and for the kernels' tests pytest and NumPy. It says what it
leaves out where those or compute-sanitizer are missing, and changes no setting of the GPU. The
parts are processes of their own with a time limit each, so that one that crashes or hangs costs no
other's results; the file is written after each. The exit status is 1 if anything was wrong, or the
kernels' tests, the suite's results or the small calls were not finished, whatever the speed; left
out is not finished.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit(
        f"expected a python with torch and triton, found {sys.executable} without torch. Name one "
        "that has them, such as: make gpu PYTHON=.venv/bin/python"
    )

from batchnorm.bench import gpu, worker
from batchnorm.bench.cases import GPU_SUITES
from batchnorm.bench.device import CHECKED, COLD, PROFILED, REPLAYED, WARM
from batchnorm.bench.gpu import DIED, OK, SKIPPED, STOPPED, WRONG, Part
from batchnorm.bench.gpu_page import page
from batchnorm.bench.peers import AUTOTUNE, COMPILE, EAGER, NATIVE
from batchnorm.bench.worker import Request
from batchnorm.kernels import triton

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
TESTS = Path("tests/kernels/triton")

SEED = 0

#: Seconds of a whole session: twenty less than 8 minutes, for importing torch and ending.
TOTAL_S = 460

#: compute-sanitizer's tools, and its exit status when they have found something.
TOOLS, FOUND = ("memcheck", "racecheck", "synccheck"), 9

#: What the tools say of something that they have found, warnings left out.
REPORT = re.compile(
    "=+ (Invalid|Misaligned|Barrier error|Divergent|Error: .*[Rr]ace|Error: .*hazard)"
)

#: What the kernels' tests import besides torch and Triton.
TESTS_NEED = ("pytest", "numpy")

#: In the folder of copies: all that the parts said, and all that they found, as they found it.
LOGS = ("gpu.log", "gpu.jsonl")

#: Lines of a part that failed, to be printed.
LAST = 40


@dataclass(frozen=True)
class Job:
    """A part to run: its command, and what its output and status say.

    Attributes:
        share: seconds that it may take; what those before it left is added.
        judge: (status or None if time was up, lines) to how it ended and what to say.
        environment: what is added to it.
        missing: why it cannot be run.
        proves: see `Part`.
    """

    name: str
    command: Sequence[str]
    share: float
    judge: Callable[[int | None, list[str]], tuple[str, str]]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    proves: bool = False


Stage = Sequence[Sequence[Job]]
"""Lanes that run beside each other; a lane's jobs, one after the other, share its time."""


class Session:
    """Runs stages, and keeps what they find where it can be read any time."""

    def __init__(
        self,
        paths: Sequence[Path],
        out: Path | None,
        *,
        rehearsal: bool,
        checked: Path | None = None,
    ) -> None:
        self.paths, self.out, self.rehearsal, self.checked = paths, out, rehearsal, checked
        self.events: list[dict[str, Any]] = []
        self.parts: list[Part] = []
        self.start = time.monotonic()
        self._living: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._interrupted = False
        self._waiting: list[Job] = []

    def run(self, stages: Sequence[Stage]) -> None:
        """Run them; none takes what the ones after it need."""
        self._waiting = [job for stage in stages for lane in stage for job in lane]
        shares = [max(sum(job.share for job in lane) for lane in stage) for stage in stages]
        for index, stage in enumerate(stages):
            end = self.start + TOTAL_S - sum(shares[index + 1 :])
            try:
                with ThreadPoolExecutor(len(stage)) as pool:
                    try:
                        list(pool.map(self._lane, stage, [end] * len(stage)))
                    except BaseException:
                        self._interrupted = True
                        for process in tuple(self._living):
                            _kill(process)  # or the pool would wait for them
                        raise
            finally:
                self.write()

    def _lane(self, jobs: Sequence[Job], end: float) -> None:
        for index, job in enumerate(jobs):
            if self._interrupted:
                return
            later = sum(other.share for other in jobs[index + 1 :])
            started = time.monotonic()
            status, says, lines = SKIPPED, job.missing, []
            if not job.missing:
                code, lines = self._process(job, max(1.0, end - later - started))
                status, says = job.judge(code, lines)
            part = Part(job.name, status, time.monotonic() - started, says, job.proves)
            with self._lock:
                self._waiting.remove(job)
                self.parts.append(part)
                say(f"[{time.monotonic() - self.start:3.0f} s] {part.name}: {part.status} {says}")
                if status in (WRONG, DIED):
                    say(*lines[-LAST:])
                self._log(LOGS[0], f"==== {job.name}: {status}", *lines)

    def _process(self, job: Job, limit: float) -> tuple[int | None, list[str]]:
        """Run a job's process; return its status, None if time was up, and what it said."""
        lines: list[str] = []
        stopped = threading.Event()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(  # noqa: S603 - this interpreter, or compute-sanitizer
                job.command,
                cwd=ROOT,
                env={**os.environ, **job.environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # what it starts is stopped with it
            )
            self._living.add(process)
            if self._interrupted:  # meanwhile
                _kill(process)

            def stop() -> None:
                stopped.set()
                _kill(process)

            timer = threading.Timer(limit, stop)
            timer.start()
            try:
                for line in process.stdout or ():
                    self._hear(line, lines)
                status = process.wait()
            finally:
                timer.cancel()
                _kill(process)
                self._living.discard(process)
                if process.stdout:
                    process.stdout.close()
            errors.seek(0)
            said = errors.read().splitlines()
        # Last words last: of what was stopped, where it was; else of what went wrong.
        if stopped.is_set() or self._interrupted:
            return None, [*said, *lines]
        return status, [*lines, *said]

    def _hear(self, line: str, lines: list[str]) -> None:
        """Keep an event, or words; a process that is killed may leave half a line."""
        try:
            event = json.loads(line) if line.startswith('{"event": ') else None
        except ValueError:
            event = None
        if event is None:
            lines.append(line.rstrip())
            return
        if event["event"] == "step":
            lines.append(event["what"])
            return
        with self._lock:
            self.events.append(event)
            self._log(LOGS[1], line.rstrip())
            if self.checked and event["event"] == "checked":
                with self.checked.open("a", encoding="utf-8") as file:
                    file.write(line)

    def _log(self, name: str, *lines: str) -> None:
        if self.out:
            with (self.out / name).open("a", encoding="utf-8") as file:
                file.write("\n".join([*lines, ""]))

    def content(self) -> dict[str, Any]:
        """Return what was found until now."""
        waiting = [
            Part(job.name, STOPPED, 0.0, "before it began", job.proves) for job in self._waiting
        ]
        return gpu.summarise(self.events, [*self.parts, *waiting], rehearsal=self.rehearsal)

    def write(self) -> None:
        """Write the results and the page; a reader finds the old ones or the new ones."""
        content = self.content()
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            for place, text in (
                (path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"),
                (path.with_suffix(".md"), page(content)),
            ):
                new = place.with_name(place.name + ".new")
                new.write_text(text, encoding="utf-8")
                new.replace(place)


def say(*lines: str) -> None:
    """Print them now."""
    sys.stdout.write("\n".join([*lines, ""]))
    sys.stdout.flush()


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)


def measured(status: int | None, lines: list[str]) -> tuple[str, str]:
    """How a process of the suite has ended."""
    last = next((line for line in reversed(lines) if line), "nothing was said")
    if status is None:
        return STOPPED, f"at {last}"
    return (OK, "") if status == 0 else (DIED, f"status {status}, last: {last}")


def checked(status: int | None, lines: list[str]) -> tuple[str, str]:
    """How a process that compares results has ended; it says what it compares."""
    ended, says = measured(status, lines)
    return (DIED, "it has compared nothing") if ended == OK and not lines else (ended, says)


def tested(status: int | None, lines: list[str]) -> tuple[str, str]:
    """How pytest has ended; -v says each test's outcome in a line with a percentage."""
    outcomes = [
        found.group(1)
        for line in lines
        if "%]" in line and (found := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line))
    ]
    failed = sum(outcome in ("FAILED", "ERROR") for outcome in outcomes)
    says = f"{outcomes.count('PASSED')} passed, {failed} failed"
    if skipped := outcomes.count("SKIPPED"):
        says += f", {skipped} skipped"
    if failed:
        return WRONG, says
    if status is None:
        return STOPPED, f"{says} until time was up"
    if status or "PASSED" not in outcomes:
        return DIED, f"pytest ended with status {status}, {says}"
    return OK, says


def called(status: int | None, lines: list[str]) -> tuple[str, str]:
    """How `small_calls.py` has ended, alone or under a tool."""
    calls = sum(line.startswith(("right: ", "WRONG: ")) for line in lines)
    wrong = [line for line in lines if line.startswith("WRONG: ")]
    summary = next((line for line in lines if " SUMMARY: " in line), "")
    says = ", ".join(filter(None, (f"{calls} calls", summary.strip("= "))))
    if wrong:
        return WRONG, f"{len(wrong)} of {says}; first {wrong[0]}"
    if status is None:
        found = any(REPORT.match(line) for line in lines)
        return (WRONG if found else STOPPED), f"{says} until time was up"
    if any("Internal Sanitizer Error" in line for line in lines):
        return DIED, f"Internal Sanitizer Error, {says}"
    if status == FOUND:
        # racecheck warns of what may be meant so, as it is between the threads of a warp.
        return (OK if "(0 errors, " in summary else WRONG), says
    if any("Device not supported" in line for line in lines):
        return SKIPPED, "compute-sanitizer does not support this device"
    return (OK, says) if status == 0 and calls else (DIED, f"status {status}, {says}")


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def ours_only(sanitizer: str) -> list[str]:
    """Options that keep a tool from torch's kernels: their names are mangled, Triton's are not.

    Excluding those, not choosing ours, for then a name that did not match would check nothing. The
    option has had two names, and is left out where the tool lists neither.
    """
    said = subprocess.run(  # noqa: S603 - compute-sanitizer
        [sanitizer, "--help"], capture_output=True, text=True, timeout=20, check=False
    ).stdout
    names = ("--kernel-name-exclude", "--kernel-regex-exclude")
    return next(([name, "kns=_Z"] for name in names if name in said), [])


def correctness(*, rehearse: bool) -> Stage:
    """The kernels' tests, the suite's results, small calls alone and under compute-sanitizer."""
    tests = ROOT / (Path("tests/kernels/test_reference.py") if rehearse else TESTS)
    absent = [name for name in TESTS_NEED if importlib.util.find_spec(name) is None]
    excuse = f"to run them: pip install {' '.join(absent)}" if absent else ""
    if not tests.exists():
        excuse = f"there is no {tests.relative_to(ROOT)}"
    suite, device = ("rehearsal", "cpu") if rehearse else ("gpu", "cuda")
    # Most of the time goes into compiling kernels, and a process compiles one at a time: of 16
    # cores 8 for the suite, which has the most to compile, 6 for the tests, the rest for the rest.
    cores = os.cpu_count() or 1
    processes = max(1, min(8, cores // 2, len(GPU_SUITES[suite].cases)))
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", str(max(1, min(6, cores * 3 // 8)))]
    small = [sys.executable, str(ROOT / "benchmarks" / "small_calls.py")]
    small += ["--device", "cpu", "--rehearse"] if rehearse else ["--device", "cuda"]
    sanitizer = _sanitizer()
    # The errors that libraries ask for, to see what a device can, are no errors.
    options = ["--error-exitcode", str(FOUND), "--report-api-errors", "no", "--print-limit", "20"]
    options += ours_only(sanitizer) if sanitizer and not rehearse else []
    checks = [
        Job(
            tool,
            [sanitizer or "", "--tool", tool, *options, *small],
            share,
            called,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # or it would not see where a tensor ends
            missing="" if sanitizer and not rehearse else "there is no compute-sanitizer",
        )
        for tool, share in zip(TOOLS, (40, 25, 25), strict=True)
    ]
    shares = [
        Request(suite, "", device, None, CHECKED, SEED, go_on=True, share=(k, processes))
        for k in range(processes)
    ]
    return (
        [Job("tests", [*pytest, str(tests)], 135, tested, missing=excuse, proves=True)],
        # What these compile, the measurements find in Triton's cache.
        *(
            [Job(f"suite, {k + 1}/{processes}", worker.command(share), 135, checked, proves=True)]
            for k, share in enumerate(shares)
        ),
        # The first fills Triton's cache for the others.
        [Job("small calls", small, 45, called, proves=True), *checks],
    )


def speed(*, rehearse: bool, checked: Path) -> list[Stage]:
    """What is measured, the most wanted first; what the file has is not compared again."""
    suite, device = ("rehearsal", "cpu") if rehearse else ("gpu", "cuda")

    def job(name: str, share: float, state: str, peers: Sequence[str], **only: Any) -> Stage:
        request = Request(
            suite,
            only.pop("text", ""),
            device,
            None,
            state,
            SEED,
            peers=peers,
            go_on=True,
            checked=str(checked),
            **only,
        )
        return ([Job(name, worker.command(request), share, measured)],)

    resnet = [sys.executable, str(ROOT / "benchmarks" / "resnet50.py"), "--device", device]
    resnet += ["--rehearse"] if rehearse else []
    training = ("forward", "forward+backward")
    widest = ("bn", "bn+add+relu")
    one = "" if rehearse else "256x256x56x56 bfloat16 channels-last"
    return [
        job("cold", 95, COLD, (EAGER, NATIVE)),
        ([Job("ResNet-50", resnet, 45, measured)],),
        job("compile", 80, COLD, (COMPILE,), passes=training, fusions=widest),
        job("warm", 25, WARM, (EAGER, NATIVE)),
        job("replayed", 20, REPLAYED, (EAGER, NATIVE), fusions=widest),
        job(
            "kernels",
            20,
            PROFILED,
            (EAGER, NATIVE),
            passes=("forward+backward", "inference"),
            fusions=("bn+add+relu",),
        ),
        job("autotune", 35, COLD, (AUTOTUNE,), text=one, passes=training, fusions=widest[1:]),
    ]


def unfit(*, rehearse: bool) -> str | None:
    """Why a session would not be about our kernels, on a GPU or interpreted, or None."""
    if rehearse:
        why = triton.ABSENT
        return why and f"expected Triton, whose interpreter runs our kernels, found none: {why}."
    if not torch.cuda.is_available():
        found = f"found torch {torch.__version__} without"
        return f"expected a CUDA GPU and a torch built for it, {found}."
    for name in ("BATCHNORM_DISABLE", "TRITON_INTERPRET"):
        if value := os.environ.get(name):
            return f"expected {name} not to be set, found {name}={value}: unset it."
    why = triton.missing()
    return why and f"expected Triton kernels that can serve, found none: {why}."


def main() -> None:
    """Run a session; the short table comes last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help=f"results; {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, help="a folder for copies, and logs")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; needs no GPU")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    given = parser.parse_args()
    path = given.json or RESULTS
    if given.page:
        content = json.loads(path.read_text("utf-8")) if path.exists() else None
        path.with_suffix(".md").write_text(page(content), encoding="utf-8")
        return
    if hindrance := unfit(rehearse=given.rehearse):
        instead = "rehearsed" if given.rehearse else "measured; --rehearse tries it on the CPU"
        sys.exit(f"{hindrance} Nothing was {instead}.")
    if given.rehearse:
        # The CPU's own kernels out of the way, Triton's on the CPU; and no threads for tensors so
        # small that they would only wait for each other.
        os.environ |= {"TRITON_INTERPRET": "1", "BATCHNORM_DISABLE": "native"}
        os.environ["OMP_NUM_THREADS"] = "1"
    paths = [] if given.rehearse and not given.json else [path]
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        paths.append(given.out / ("rehearsal.json" if given.rehearse else RESULTS.name))
        for name in LOGS:
            (given.out / name).unlink(missing_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended from outside."))
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder, "checked.jsonl")
        session = Session(paths, given.out, rehearsal=given.rehearse, checked=checked)
        rehearse = given.rehearse
        session.run([correctness(rehearse=rehearse), *speed(rehearse=rehearse, checked=checked)])
    content = session.content()
    say("", *gpu.table(content))
    sys.exit(bool(content["wrong"] or content["unproven"]))


if __name__ == "__main__":
    main()
