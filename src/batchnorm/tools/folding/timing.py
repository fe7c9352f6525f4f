"""How much faster a folded model is."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from batchnorm.tools.folding.example import Example
from batchnorm.tools.folding.rewrite import rewrite
from batchnorm.tools.folding.steps import Step

#: Pairs of runs. Of 31 values, the 10th from either end hold the true median between them with
#: 97 % confidence: each lies below it like a coin, and 9 or fewer of 31 coins fall so in 1.5 %.
ROUNDS = 31
_RANK = 9

#: A run repeats the model for so long: the clock and what Python does between are 1e-6 s.
_LEAST_S = 0.005


def speedup(
    model: nn.Module, steps: Sequence[Step], example: Example
) -> tuple[float, tuple[float, float]]:
    """Time of a model / time of its folded form: the median of paired runs, and its interval."""
    before, after = copy.deepcopy(model), rewrite(copy.deepcopy(model), steps)
    once = min(_seconds(before, example, 1) for _ in range(3))
    repeat = max(1, round(_LEAST_S / max(once, 1e-9)))
    _seconds(after, example, repeat)
    ratios = []
    for index in range(ROUNDS):
        # Each goes first in turn.
        pair = (before, after) if index % 2 else (after, before)
        times = {id(one): _seconds(one, example, repeat) for one in pair}
        ratios.append(times[id(before)] / times[id(after)])
    ratios.sort()
    return statistics.median(ratios), (ratios[_RANK], ratios[-1 - _RANK])


def _seconds(model: nn.Module, example: Example, repeat: int) -> float:
    with torch.no_grad():
        _wait()
        start = time.perf_counter()
        for _ in range(repeat):
            model(*example.args, **example.kwargs)
        _wait()
        return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
