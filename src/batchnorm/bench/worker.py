"""Measures a suite in one process, and tells what it finds line by line as JSON.

A process of its own, because the allocator is set up by environment variables before it starts, and
because processes differ; `merge` puts together what several have found. `runner` starts it:
`python -m batchnorm.bench.worker REQUEST`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.bench import cases, check, estimate, measure, peers
from batchnorm.bench.cases import FLOORS, FUSIONS, PASSES, SIZE_FUSION, SIZE_PASSES, Case
from batchnorm.bench.environment import environment
from batchnorm.bench.measure import Times
from batchnorm.bench.peers import COMPILE, COPY, EAGER, OURS, PEERS, Contender, Problem

Event = dict[str, Any]
"""`event` says what it is: environment, kernels, step (which comes first), row, size or note."""

#: The allocator as it is.
DEFAULT = "default"

#: Page faults in a call, as a part of the pages (of 4 KB) in a tensor, that still count as none.
FEW_FAULTS = 0.1
PAGE = 4096


@dataclass(frozen=True)
class Request:
    """What to measure; the allocator is a label here, and has been set up before.

    Attributes:
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


def work(request: Request) -> Iterator[Event]:
    """Measure, and yield what is found as it is found."""
    suite = cases.find(request.suite, request.text)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    yield {"event": "environment", **environment(request.device, request.seed)}
    for case in suite.cases:
        problem = Problem.of(case, request.device, request.seed)
        for fusion in FUSIONS:
            yield from _fusion(request, suite, case, fusion, problem)
    for case in suite.sizes:
        yield from _size(request, suite, case)


def _fusion(
    request: Request, suite: cases.Suite, case: Case, fusion: str, problem: Problem
) -> Iterator[Event]:
    contenders = [make(case, fusion, request.device) for make in (peers.ours, peers.eager)]
    if case in suite.compiled:
        contenders.append(peers.compiled(case, fusion, request.device))
    if request.part == 0:
        yield {"event": "kernels", "native": natively(contenders[0], problem)}
    for mode in PASSES:
        yield {"event": "step", "what": f"{case.title}, {mode}, {fusion}"}
        failures = _prepared(contenders, problem, mode)
        for failure in failures:
            yield _note(failure)
        verdicts = {}
        if request.part == 0:
            for contender in contenders:
                seen = check.observe(contender, problem, mode)
                verdicts[contender.name] = check.judge(seen, problem, mode, fusion)
                del seen
        known = {
            "case": case.name,
            "dtype": case.dtype_name,
            "layout": case.layout,
            "pass": mode,
            "fusion": fusion,
            "allocator": request.allocator,
        }
        times = None
        if not verdicts or verdicts[OURS].right:
            times = _times(request, suite, problem, contenders, mode)
            allowed = max(1, FEW_FAULTS * case.bytes / PAGE)
            if request.allocator != DEFAULT and _faults(times) > allowed:
                yield _note(f"There were still page faults: {request.allocator}, {case.title}.")
        for peer in PEERS:
            if any(contender.name == peer for contender in contenders):
                found = {**_errors(peer, verdicts), **_found(mode, fusion, peer, times)}
                yield {"event": "row", **known, "peer": peer, **found}


def natively(contender: Contender, problem: Problem) -> bool:
    """Whether our C++ operators do the work, as torch's own record of a call has it."""
    contender.reset(problem, training=True)
    with torch.autograd.profiler.profile(use_kineto=False) as record:
        contender.step(problem, "forward")()
    return any(event.name.startswith("batchnorm::") for event in record.function_events)


def _prepared(contenders: list[Contender], problem: Problem, mode: str) -> list[str]:
    """Call everyone once; who cannot be compiled leaves, and it says why."""
    failures = []
    for contender in tuple(contenders):
        contender.reset(problem, training=mode != "inference")
        try:
            with torch.set_grad_enabled(mode != "inference"):
                contender.step(problem, mode)()
        except Exception as error:
            if contender.name != COMPILE:
                raise
            # Whatever the compiler raises: the others can be measured without it.
            contenders.remove(contender)
            first = next(iter(str(error).splitlines()), "")
            failures.append(f"Without torch.compile, {type(error).__name__}: {first}")
    return failures


def _note(text: str) -> Event:
    return {"event": "note", "text": text}


def _times(
    request: Request,
    suite: cases.Suite,
    problem: Problem,
    contenders: list[Contender],
    mode: str,
) -> dict[str, Times]:
    """Time the contenders, and a copy of the same bytes among them."""
    source = problem.x.detach()
    target = source.clone()
    calls: dict[str, measure.Call] = {COPY: lambda: target.copy_(source)}
    for contender in contenders:
        contender.reset(problem, training=mode != "inference")
        calls[contender.name] = contender.step(problem, mode)
    synchronize = torch.cuda.synchronize if request.device == "cuda" else lambda: None
    seed = request.seed + request.part  # the same data, other orders
    with torch.set_grad_enabled(mode != "inference"):
        return measure.rounds(calls, suite.rounds, seed=seed, synchronize=synchronize)


def _errors(peer: str, verdicts: dict[str, check.Verdict]) -> Event:
    """Return what the comparison has shown, or nothing where there was none."""
    if not verdicts:
        return {}
    return {
        "error": verdicts[OURS].error,
        "error_bound": verdicts[OURS].bound,
        "error_where": verdicts[OURS].where,
        "peer_error": verdicts[peer].error,
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


def _size(request: Request, suite: cases.Suite, case: Case) -> Iterator[Event]:
    problem = Problem.of(case, request.device, request.seed)
    contenders = [make(case, SIZE_FUSION, request.device) for make in (peers.ours, peers.eager)]
    for mode in SIZE_PASSES:
        yield {"event": "step", "what": f"{case.title}, {mode}, {SIZE_FUSION}"}
        right = True
        if request.part == 0:
            seen = check.observe(contenders[0], problem, mode)
            right = check.judge(seen, problem, mode, SIZE_FUSION).right
            del seen
        times = _times(request, suite, problem, contenders, mode) if right else None
        yield {
            "event": "size",
            "case": case.name,
            "bytes": case.bytes,
            "pass": mode,
            "allocator": request.allocator,
            "status": "ok" if right else "wrong result",
            "us": times and {name: times[name].us for name in (OURS, EAGER, COPY)},
        }


def main() -> None:
    """Measure what the argument asks for; write events to what was standard output."""
    # Only events may go there: compilers and libraries print where they like.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for event in work(Request(**json.loads(sys.argv[1]))):
            out.write(json.dumps(event) + "\n")
            out.flush()


def command(request: Request) -> list[str]:
    """Return what starts `main` in a process of its own."""
    return [sys.executable, "-m", __name__, json.dumps(asdict(request))]


if __name__ == "__main__":
    main()
