"""Activation checkpointing does forward passes again, and must find what was so the first time.

By then the running statistics have moved, and a block that named a bank may have ended.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.kernels import calls

#: Forward passes of a layer that may come before the backward pass of the first: micro-batches of a
#: step, calls of a shared layer. Each keeps 4C numbers.
MOST_FORWARDS = 256

_Fact = TypeVar("_Fact")


@dataclass(eq=False)
class _Pass(Generic[_Fact]):
    mean: Tensor
    var: Tensor
    reentrant: bool
    fact: _Fact
    done_again: bool = False


class Recall(Generic[_Fact]):
    """A fact about each of a layer's last forward passes, by the moments of what came in.

    The same batch gives the same bits. It may have come in earlier steps too, and twice in this
    one, which goes back through the last pass first.
    """

    def __init__(self) -> None:
        self.passes: deque[_Pass[_Fact]] = deque(maxlen=MOST_FORWARDS)

    def keep(self, mean: Tensor, var: Tensor, fact: _Fact) -> None:
        """Of a pass that may be done again: see `select.recomputed_later`."""
        self.passes.append(_Pass(mean, var, not torch.is_grad_enabled(), fact))

    def find(self, mean: Tensor, var: Tensor) -> list[_Fact]:
        """Of the passes that this may be again, the likeliest first; nothing if there is none.

        Raises:
            InputError: there is none, and there have been more passes than are kept.
        """
        alike = [
            entry
            for entry in reversed(self.passes)
            if torch.equal(entry.mean, mean) and torch.equal(entry.var, var)
        ]
        # One kind of checkpointing saves nothing at first; the other watches what is saved, both
        # times. One within the other, or other hooks around, may look like either.
        reentrant = not calls.checkpoints()
        alike = [entry for entry in alike if entry.reentrant == reentrant] or alike
        if not alike and len(self.passes) == self.passes.maxlen:
            raise InputError(
                "expected to find the statistics of a forward pass that activation checkpointing "
                f"does again, got more than {self.passes.maxlen} forward passes of this layer "
                "since then, which is all that a layer with renorm or banks remembers: call "
                "backward sooner, or leave this layer out of the checkpoint"
            )
        if alike:
            # Now behind all others: a graph that is kept may ask for it once more.
            first = alike[0]
            self.passes.remove(first)
            self.passes.appendleft(first)
            again = first.done_again
            alike = [entry for entry in alike if entry.done_again == again]
            first.done_again = True
        return [entry.fact for entry in alike]
