"""Contenders called on the same problem: once each, timed in turn, or watched by torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from batchnorm.bench import device, measure
from batchnorm.bench.measure import Call, Times
from batchnorm.bench.peers import COPY, OURS, Contender, Problem


def prepare(contenders: list[Contender], problem: Problem, mode: str) -> list[str]:
    """Call everyone once; who cannot be compiled leaves, and it says why."""
    failures = []
    for contender in tuple(contenders):
        contender.reset(problem, training=mode != "inference")
        try:
            with torch.set_grad_enabled(mode != "inference"), contender.settings():
                contender.step(problem, mode)()
        except Exception as error:
            if contender.name == OURS:
                raise
            # Whatever a compiler raises, for one: the others can be measured without it.
            contenders.remove(contender)
            first = next(iter(str(error).splitlines()), "")
            failures.append(f"Without {contender.name}, {type(error).__name__}: {first}")
    return failures


def times(
    contenders: list[Contender],
    problems: list[Problem],
    mode: str,
    *,
    rounds: int,
    seed: int,
    state: str,
    on: str,
) -> tuple[dict[str, Times], list[str]]:
    """Time the contenders, and a copy of the same bytes among them; and say who cannot be timed.

    Args:
        contenders: who takes turns.
        problems: the same in several places of memory, which take turns in each loop.
        mode: the pass.
        rounds: how many.
        seed: of the orders.
        state: `device.REPLAYED`, or anything else.
        on: the device.
    """
    steps: dict[str, list[Call]] = {COPY: [_copy(problem) for problem in problems]}
    settings: dict[str, Callable[[], AbstractContextManager[Any]]] = {COPY: nullcontext}
    for contender in contenders:
        contender.reset(problems[0], training=mode != "inference")
        steps[contender.name] = [contender.step(problem, mode) for problem in problems]
        settings[contender.name] = contender.settings
    calls: dict[str, Call] = {
        name: device.Rotation(several) if len(several) > 1 else several[0]
        for name, several in steps.items()
    }
    excuses = []
    with torch.set_grad_enabled(mode != "inference"):
        if state == device.REPLAYED:
            for name, call in tuple(calls.items()):
                try:
                    with settings[name]():
                        calls[name] = device.captured(call, on)
                except Exception as error:  # whatever forbids it: the others can be replayed
                    del calls[name]
                    first = next(iter(str(error).splitlines()), "")
                    excuses.append(f"{name} cannot be captured, {type(error).__name__}: {first}")
        for name, several in steps.items():
            if len(several) > 1:
                with settings[name]():
                    for _ in several:  # the memory of every result is asked for before it is timed
                        calls[name]()
        found = measure.rounds(
            calls,
            rounds,
            seed=seed,
            loop_s=device.LOOP_S if on == "cuda" else measure.LOOP_S,
            stopwatch=device.stopwatch(on),
            around=lambda name: settings[name](),
        )
    if state == device.REPLAYED:
        found = {name: of_all.of_one(device.REPLAYS) for name, of_all in found.items()}
    return found, excuses


def _copy(problem: Problem) -> Call:
    source = problem.x.detach()
    target = source.clone()
    return lambda: target.copy_(source)


def natively(contender: Contender, problem: Problem) -> bool:
    """Whether our C++ operators do the work, as torch's own record of a call has it."""
    contender.reset(problem, training=True)
    names = device.operators(contender.step(problem, "forward"))
    return any(name.startswith("batchnorm::") for name in names)


def calls_cudnn(contender: Contender, problem: Problem, mode: str) -> bool:
    """Whether torch gives this to cuDNN, as its own record of a call has it."""
    contender.reset(problem, training=mode != "inference")
    with torch.set_grad_enabled(mode != "inference"), contender.settings():
        names = device.operators(contender.step(problem, mode))
    return any("cudnn_batch_norm" in name for name in names)


def kernels(contender: Contender, problem: Problem, mode: str, on: str) -> list[dict[str, Any]]:
    """Return what a call runs on the device; see `device.kernels`."""
    contender.reset(problem, training=mode != "inference")
    with torch.set_grad_enabled(mode != "inference"), contender.settings():
        return device.kernels(contender.step(problem, mode), on)
