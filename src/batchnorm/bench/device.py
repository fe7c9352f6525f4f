"""What a GPU asks of those who measure: its own clock, tensors out of its cache, calls replayed.

All of it works on the CPU too, where it proves nothing: so that it can be run without a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from batchnorm.bench.measure import Call, Stopwatch

#: What a call finds in the GPU's last cache: none of its tensors, or all of them. And the second
#: without Python: calls recorded as a CUDA graph, which the GPU then launches by itself.
COLD, WARM, REPLAYED = "cold L2", "warm L2", "warm L2, replayed"

STATES = (COLD, WARM, REPLAYED)

#: Not times, but whether we are right; or which kernels run.
CHECKED, PROFILED = "checks", "kernels"

#: How many times as large as the cache the tensors are that calls take turns with: of those used
#: last, a quarter may still lie there when everything has been read once.
COVER = 4

#: So many sets of tensors take turns at the most: with more, launches and not bytes are measured.
MOST_SETS = 256

#: A call is warm where so many tensors of its size fit: x, the residual, y, their three gradients,
#: and two that a peer keeps in between.
TENSORS = 8

#: Calls in a graph: to launch it takes as long as one or two kernels.
REPLAYS = 10

#: Seconds that a call is repeated for in a round on a GPU: ten thousand ticks of its clock.
LOOP_S = 5e-3

#: What the CPU is given for a cache, small enough for the rehearsal's tensors to be out of it.
_REHEARSED_L2 = 1 << 10


def l2_bytes(device: str) -> int:
    """Return the size of the last cache before the device's memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return _REHEARSED_L2


def sets(state: str, tensor_bytes: int, device: str) -> int:
    """Return how many sets of such tensors must take turns for this state; 0 if it cannot be had.

    >>> sets(COLD, 1 << 10, "cpu"), sets(WARM, 1 << 10, "cpu"), sets(WARM, 1 << 7, "cpu")
    (4, 0, 1)
    """
    cache = l2_bytes(device)
    if state == COLD:
        number = max(2, math.ceil(COVER * cache / tensor_bytes))
        return number if number <= MOST_SETS else 0
    return 1 if state not in STATES or TENSORS * tensor_bytes <= cache else 0


class Rotation:
    """Calls the steps in turn. Each result lives until its step's next turn.

    So results rotate through memory as the arguments do: a place that is written anew at each call
    would stay in the cache.
    """

    def __init__(self, steps: Sequence[Call]) -> None:
        self.steps = steps
        self.results: list[object] = [None] * len(steps)
        self.turn = 0

    def __call__(self) -> None:
        """Take the next step."""
        turn = self.turn = (self.turn + 1) % len(self.steps)
        self.results[turn] = None
        self.results[turn] = self.steps[turn]()


def stopwatch(device: str) -> Stopwatch | None:
    """Return what times calls on the device; None: a clock does."""
    return _events if device == "cuda" else None


def _events(call: Call, loops: int) -> float:
    """Seconds of so many calls, by events in the stream.

    One call goes before the start: while the GPU is at it, the next ones are launched, so that it
    never waits for the first launch. It waits for later ones where launching takes longer than the
    work, and that is then measured, for a program would wait too.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(loops):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def captured(call: Call, device: str) -> Call:
    """Return what does `REPLAYS` calls with one launch.

    Raises:
        RuntimeError: what it does cannot be captured, such as waiting for the device.
    """
    if device != "cuda":
        return lambda: [call() for _ in range(REPLAYS)]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as CUDA graphs want it: a few calls on another stream first
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            call()
    return graph.replay


def operators(call: Call) -> set[str]:
    """Return the names of torch's operators that a call goes through."""
    with torch.autograd.profiler.profile(use_kineto=False) as record:
        call()
    return {event.name for event in record.function_events}


def kernels(call: Call, device: str, calls: int = 3) -> list[dict[str, Any]]:
    """Return what runs on the device in a call: name, how often, microseconds of one call."""
    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    call()
    wait()
    # torch 2.11 would warn that events are of one cycle; there is one.
    with profile(activities=[activity], acc_events=True) as record:
        for _ in range(calls):
            call()
        wait()
    times: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in record.events() or ():
        if (event.device_type.name == "CUDA") == on_gpu:
            times[event.name] += event.time_range.elapsed_us()
            count[event.name] += 1
    return [
        {"name": name, "times": count[name] / calls, "us": us / calls}
        for name, us in times.most_common()
    ]


def release(device: str) -> None:
    """Give unused memory back, so that the next sizes find a whole piece of it."""
    if device == "cuda":
        torch.cuda.empty_cache()
