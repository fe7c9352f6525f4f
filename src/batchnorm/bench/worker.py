"""Measures a suite in one process, and tells what it finds line by line as JSON.

A process of its own, because the allocator is set up by environment variables before it starts, and
because processes differ; `merge` puts together what several have found. `runner` starts it:
`python -m batchnorm.bench.worker REQUEST`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from batchnorm.bench import cases, check, contest, device, estimate, peers
from batchnorm.bench.cases import FLOORS, FUSIONS, PASSES, SIZE_FUSION, SIZE_PASSES, Case
from batchnorm.bench.environment import environment
from batchnorm.bench.measure import Times
from batchnorm.bench.merge import CASE
from batchnorm.bench.peers import COPY, EAGER, OURS, PEERS, Contender, Problem

Event = dict[str, Any]
"""`event` says what it is: environment, kernels, step (which comes first), row, size or note; on a
GPU profile, checked or failed too."""

#: The allocator as it is, and where freed memory stays in the process. On a GPU, whose memory torch
#: keeps, what is in its cache takes the allocator's place: `device.STATES`.
DEFAULT, NO_FAULTS = "default", "no page faults"

#: Page faults in a call, as a part of the pages (of 4 KB) in a tensor, that still count as none.
FEW_FAULTS = 0.1
PAGE = 4096


@dataclass(frozen=True)
class Request:
    """What to measure; the allocator is a label here, and has been set up before.

    On a GPU it is one of `device.STATES`, `device.CHECKED` or `device.PROFILED`; and so on the CPU
    in a rehearsal.

    Attributes:
        peers: who takes part beside us, where `peers.takes_part` has it so.
        go_on: tell of what raises, and measure the next.
        checked: a file of events of `device.CHECKED`, JSON by line, found by the same code with the
            same seed: what it has is not compared again.
        share: (k, n) is the k-th of n processes that share the cases; k from 0.
        part: which of the processes this is. The first one compares the results with float64; the
            others compute the same again.
    """

    suite: str
    text: str
    device: str
    threads: int | None
    allocator: str
    seed: int
    part: int = 0
    peers: Sequence[str] = PEERS
    passes: Sequence[str] = PASSES
    fusions: Sequence[str] = FUSIONS
    go_on: bool = False
    share: tuple[int, int] = (0, 1)
    checked: str = ""


def work(request: Request) -> Iterator[Event]:
    """Measure, and yield what is found as it is found."""
    suite = cases.find(request.suite, request.text)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    yield {"event": "environment", **environment(request.device, request.seed)}
    first, step = request.share
    for case in suite.cases[first::step]:
        if not (number := device.sets(request.allocator, case.bytes, request.device)):
            continue
        problem = Problem.of(case, request.device, request.seed)
        problems = [problem, *(problem.copy() for _ in range(number - 1))]
        for fusion in request.fusions:
            try:
                yield from _fusion(request, suite, case, fusion, problems)
            except Exception as error:
                if not request.go_on:
                    raise
                yield _raised(request, f"{case.title}, {fusion}", error)
                device.release(request.device)
        del problem, problems
        device.release(request.device)
    for case in suite.sizes:
        if number := device.sets(request.allocator, case.bytes, request.device):
            yield from _size(request, suite, case, number)


def _raised(request: Request, what: str, error: Exception) -> Event:
    """Who raised what: a failure of ours, unless it is certain that we have nothing to do with it.

    The device tells of its errors late, and then they are anybody's.
    """
    notes = getattr(error, "__notes__", ())
    who = next((peer for peer in request.peers if peers.raised_by(peer) in notes), OURS)
    why = f"{type(error).__name__}: {str(error).strip()}"[:400]
    if isinstance(error, torch.OutOfMemoryError):
        if request.allocator != device.CHECKED:
            return _note(f"Not measured, for want of memory: {what}.")
    elif who != OURS and not isinstance(error, torch.AcceleratorError):
        return _note(f"Not measured, for {who} raised {why}: {what}.")
    return {"event": "failed", "what": what, "why": why if who == OURS else f"{who}: {why}"}


def _fusion(
    request: Request, suite: cases.Suite, case: Case, fusion: str, problems: list[Problem]
) -> Iterator[Event]:
    problem = problems[0]
    others = [
        peers.MAKERS[name](case, fusion, request.device)
        for name in request.peers
        if peers.takes_part(name, case, compiles=case in suite.compiled)
    ]
    ours = peers.ours(case, fusion, request.device)
    if request.allocator == device.CHECKED:
        yield from _checked(request, case, fusion, ours, problem)
        return
    if not others:
        return
    contenders = [ours, *others]
    if request.part == 0:
        yield {"event": "kernels", "native": contest.natively(contenders[0], problem)}
    for mode in request.passes:
        yield {"event": "step", "what": f"{case.title}, {mode}, {fusion}"}
        for failure in contest.prepare(contenders, problem, mode):
            yield _note(failure)
        known = {**_known(case, mode, fusion), "allocator": request.allocator}
        if request.allocator == device.PROFILED:
            for contender in contenders:
                found = contest.kernels(contender, problem, mode, request.device)
                yield {"event": "profile", **known, "contender": contender.name, "kernels": found}
        else:
            for event in _measured(request, suite, case, fusion, mode, contenders, problems):
                yield {**event, **known} if event["event"] == "row" else event


def _known(case: Case, mode: str, fusion: str) -> Event:
    return {
        "case": case.name,
        "dtype": case.dtype_name,
        "layout": case.layout,
        "pass": mode,
        "fusion": fusion,
    }


@lru_cache
def _judged(path: str) -> dict[tuple[str, ...], check.Verdict]:
    """What another process of this session has compared, by what `_known` says of it."""
    if not path or not Path(path).exists():
        return {}
    events = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    return {
        tuple(event[key] for key in (*CASE, "pass", "fusion")): check.Verdict(
            # JSON has no NaN.
            math.nan if event["error"] is None else event["error"],
            event["error_bound"],
            event["error_where"],
        )
        for event in events
    }


def _checked(
    request: Request, case: Case, fusion: str, ours: Contender, problem: Problem
) -> Iterator[Event]:
    """Compare with float64 only; what is compiled for that is compiled for the other processes."""
    for mode in request.passes:
        yield {"event": "step", "what": f"{case.title}, {mode}, {fusion}"}
        seen = check.observe(ours, problem, mode)
        verdict = check.judge(seen, problem, mode, fusion)
        yield {"event": "checked", **_known(case, mode, fusion), **_error(verdict)}
        if not verdict.right:
            error = f"error {verdict.error:.1e} in {verdict.where}, {verdict.bound:.1e} allowed"
            yield {"event": "failed", "what": f"{case.title}, {mode}, {fusion}", "why": error}


def _measured(
    request: Request,
    suite: cases.Suite,
    case: Case,
    fusion: str,
    mode: str,
    contenders: list[Contender],
    problems: list[Problem],
) -> Iterator[Event]:
    """Yield what comparing and timing says of each peer."""
    problem = problems[0]
    verdicts = {}
    if judged := _judged(request.checked).get(tuple(_known(case, mode, fusion).values())):
        verdicts[OURS] = judged
    elif request.part == 0:
        for contender in contenders:
            with contender.settings():
                seen = check.observe(contender, problem, mode)
            verdicts[contender.name] = check.judge(seen, problem, mode, fusion)
            del seen
    times = None
    if not verdicts or verdicts[OURS].right:
        times, excuses = _times(request, suite, problems, contenders, mode)
        for excuse in excuses:
            yield _note(excuse)
        allowed = max(1, FEW_FAULTS * case.bytes / PAGE)
        if request.allocator == NO_FAULTS and _faults(times) > allowed:
            yield _note(f"There were still page faults: {NO_FAULTS}, {case.title}.")
    for contender in contenders[1:]:
        peer = contender.name
        if times is None or {OURS, peer} <= times.keys():
            found = {**_errors(peer, verdicts), **_found(mode, fusion, peer, times)}
            if request.device == "cuda":
                found["cudnn"] = contest.calls_cudnn(contender, problem, mode)
            yield {"event": "row", "peer": peer, **found}


def _times(
    request: Request,
    suite: cases.Suite,
    problems: list[Problem],
    contenders: list[Contender],
    mode: str,
) -> tuple[dict[str, Times], list[str]]:
    return contest.times(
        contenders,
        problems,
        mode,
        rounds=suite.rounds,
        seed=request.seed + request.part,  # the same data, other orders
        state=request.allocator,
        on=request.device,
    )


def _note(text: str) -> Event:
    return {"event": "note", "text": text}


def _errors(peer: str, verdicts: dict[str, check.Verdict]) -> Event:
    """Return what the comparison has shown, or nothing where there was none."""
    if not verdicts:
        return {}
    theirs = verdicts[peer].error if peer in verdicts else None
    return {**_error(verdicts[OURS]), "peer_error": theirs}


def _error(verdict: check.Verdict) -> Event:
    return {
        "error": verdict.error,
        "error_bound": verdict.bound,
        "error_where": verdict.where,
    }


def _found(mode: str, fusion: str, peer: str, times: dict[str, Times] | None) -> Event:
    """Return the ratios round by round, and medians; without times, our result was wrong."""
    if times is None:
        return {"status": "wrong result"}
    ours, copy = times[OURS].seconds, times[COPY].seconds
    # (floor / our time) / (bytes of a copy / its time), round by round too.
    share = statistics.median(estimate.ratios(copy, ours))
    return {
        "status": "ok",
        "ratios": estimate.ratios(times[peer].seconds, ours),
        "bandwidth_fraction": FLOORS[mode, fusion] / cases.COPY * share,
        "ours_us": times[OURS].us,
        "peer_us": times[peer].us,
        "copy_us": times[COPY].us,
        "faults": _faults(times),
    }


def _faults(times: dict[str, Times]) -> float:
    """Page faults in a call of ours: the evidence for what the allocator is said to do."""
    return statistics.median(times[OURS].faults)


def _size(request: Request, suite: cases.Suite, case: Case, number: int) -> Iterator[Event]:
    problem = Problem.of(case, request.device, request.seed)
    problems = [problem, *(problem.copy() for _ in range(number - 1))]
    contenders = [make(case, SIZE_FUSION, request.device) for make in (peers.ours, peers.eager)]
    for mode in SIZE_PASSES:
        yield {"event": "step", "what": f"{case.title}, {mode}, {SIZE_FUSION}"}
        right = True
        if request.part == 0:
            seen = check.observe(contenders[0], problem, mode)
            right = check.judge(seen, problem, mode, SIZE_FUSION).right
            del seen
        times = _times(request, suite, problems, contenders, mode)[0] if right else None
        yield {
            "event": "size",
            "case": case.name,
            "bytes": case.bytes,
            "pass": mode,
            "allocator": request.allocator,
            "status": "ok" if right else "wrong result",
            "us": times and {name: times[name].us for name in (OURS, EAGER, COPY)},
        }


def line(event: Event) -> str:
    """Return the event as a line of JSON, which has neither NaN nor infinity: null instead."""
    return json.dumps(json.loads(json.dumps(event), parse_constant=lambda _: None)) + "\n"


def main() -> None:
    """Measure what the argument asks for; write events to what was standard output."""
    # Only events may go there: compilers and libraries print where they like.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for event in work(Request(**json.loads(sys.argv[1]))):
            out.write(line(event))
            out.flush()


def command(request: Request) -> list[str]:
    """Return what starts `main` in a process of its own."""
    return [sys.executable, "-m", __name__, json.dumps(asdict(request))]


if __name__ == "__main__":
    main()
