"""How much memory a call takes: what is held when it returns, and the most at any time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """Bytes over what was held before the call.

    Attributes:
        held: when it has returned, with what it returned.
        peak: the most at any time.
    """

    held: int
    peak: int


def allocations(call: Callable[[], object], device: str = "cpu") -> Allocations:
    """What torch's allocator gave and took back during a call, exactly.

    On a CPU the profiler sees each allocation; a GPU's allocator counts by itself. What libraries
    take for themselves (a convolution's workspace from the system's allocator) is in neither.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        del result
        return Allocations(after - before, torch.cuda.max_memory_allocated() - before)
    # torch 2.11 would warn that events are of one cycle; there is one.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        result = call()
    del result
    held = peak = 0
    # The profiler's own summary ascribes most of them to operations; these are in time's order.
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return Allocations(held, peak)
