"""Running a model over batches as often as it takes to know what comes into its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from graphlib import CycleError, TopologicalSorter
from itertools import islice, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import InputError, SyncError
from batchnorm.moments import Moments
from batchnorm.sync import Synchronizer
from batchnorm.tools.feeding import Step, eager, rewound
from batchnorm.tools.progress import Tell
from batchnorm.tools.recalibration import Part
from batchnorm.validation import MIN_COUNT


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation, none of it compiled, and no process waiting for another."""
    with ExitStack() as stack, eager():
        for module in model.modules():
            # Not eval(), which modules may override to do more, and `untouched` could not undo.
            module.training = False
            if isinstance(module, DistributedDataParallel):
                # It would broadcast the buffers.
                waits = module.require_forward_param_sync
                stack.callback(setattr, module, "require_forward_param_sync", waits)
                module.require_forward_param_sync = False
        yield


class _ReachedError(BaseException):
    """Ends a forward pass; not for `except Exception` within a model."""


class Walk:
    """Runs the batches through the model as often as it takes."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        step: Step,
        max_batches: int | None,
        parts: list[Part],
        method: str,
        sync: Synchronizer | None,
        tell: Tell,
    ) -> None:
        self.model, self.batches, self.step, self.max_batches = model, batches, step, max_batches
        self.parts = parts
        self.index = {part.keeper: index for index, part in enumerate(parts)}
        self.layerwise = method == "layerwise"
        self.sync, self.tell = sync, tell
        self.settled: set[Any] = set()
        self.wanted: set[Any] = set()  # mutant: a type
        self.seen: dict[Any, int] = {}  # mutant: a type
        self.passes = self.total_batches = 0
        self.batches_here: int | None = None
        # Which part comes right before which, in some batch.
        self.before = torch.zeros(len(parts), len(parts), dtype=torch.uint8)
        self.done = 0
        self.expected_passes = len(parts) if self.layerwise else 1

    def scout(self) -> None:
        """All parts, each batch normalised by its own statistics.

        Raises:
            InputError: there is no batch, here or on any process.
        """
        self._run(self.parts)
        self.total_batches = self.batches_here or 0
        if self.sync is not None:
            device = self.parts[0].device
            counted = torch.tensor([self.total_batches], device=device)
            self.total_batches = int(self.sync.gather(counted).sum())
            self.before = self.sync.gather(self.before.to(device)).amax(0).cpu()
        if not self.total_batches:
            raise InputError(
                "expected at least one batch, got none; an iterator that has been used is empty: "
                "pass a list or a DataLoader"
            )

    def layer_by_layer(self) -> None:
        """Each part again, when all before it have their statistics.

        Raises:
            InputError: there is no such order, or the passes differ.
        """
        levels = self._levels()
        self.expected_passes = len(levels)
        for number, parts in enumerate(levels):
            if number:  # before the first there are none: they have what they need
                self._run(parts)
            self._settle(parts)

    def see(self, keeper: Any, compute: Callable[[], Moments]) -> None:
        """Called by each layer, before it computes anything."""
        layer = self.parts[self.index[keeper]].layer
        if layer.training:
            raise InputError(
                "expected a layer in evaluation, as recalibrate put it there, got one in train(): "
                "the step, or the model's forward, calls train(); leave that out, or freeze the "
                "layer"
            )
        if keeper in self.settled:
            return
        moments = compute()
        count = float(moments.count)
        if count == 0:  # nothing is no call
            return
        self.seen[keeper] = self.seen.get(keeper, 0) + 1
        part = self.parts[self.index[keeper]]
        if keeper in self.wanted:
            part.batches += self.seen[keeper] == 1
            part.take(moments)
            if self.passes and part.calls == 1:
                raise _ReachedError
        if count < MIN_COUNT and not self.layerwise:
            raise InputError(
                "expected more than 1 value per channel to normalise by the batch's statistics, "
                f"got a total weight of {count:g}. Use larger batches "
                '(DataLoader(drop_last=True)), or method="layerwise", which does not normalise by '
                "batches"
            )
        keeper.running_mean.copy_(moments.mean)
        keeper.running_var.copy_(moments.m2 / count)

    def _run(self, parts: list[Part]) -> None:
        for part in parts:
            part.clear()
        self.wanted = {part.keeper for part in parts}
        try:
            self._pass()
        except Exception:
            if self.sync is not None:
                # The others wait for this process, and would wait until they give up.
                with suppress(Exception):
                    self._pool(self.sync, parts, failed=True)
            raise
        self.passes += 1
        for part in parts:
            part.merge()
        if self.sync is not None:
            self._pool(self.sync, parts)

    def _pass(self) -> None:
        number = 0
        with rewound():
            for batch in islice(self.batches, self.max_batches):
                self.seen = {}
                with suppress(_ReachedError):
                    self.step(self.model, batch)
                self._note()
                number += 1
                self._advance()
        if self.batches_here not in (None, number):
            raise InputError(
                f"expected the same batches in each pass, got {self.batches_here}, then {number}"
            )
        self.batches_here = number

    def _pool(self, sync: Synchronizer, parts: list[Part], *, failed: bool = False) -> None:
        """Merge what all processes have.

        Raises:
            SyncError: one of them has failed.
        """
        packed = [part.packed().to(parts[0].device) for part in parts]
        failures, *everyones = sync.gather(
            torch.cat([packed[0].new_tensor([failed]), *packed])
        ).split([1, *map(len, packed)], 1)
        ranks = ", ".join(str(rank) for rank, of_one in enumerate(failures) if of_one.any())
        if ranks:
            raise SyncError(
                "expected every process to go through its batches, got an error on some, which "
                f"they have raised (ranks in the group: {ranks}); nothing has been changed"
            )
        for part, rows in zip(parts, everyones, strict=True):
            part.unpack(rows)

    def _note(self) -> None:
        """The calls of a batch, in their order."""
        for keeper, times in self.seen.items():
            part = self.parts[self.index[keeper]]
            part.calls = max(part.calls, times)
        for one, other in pairwise(self.seen):
            self.before[self.index[one], self.index[other]] = 1

    def _levels(self) -> list[list[Part]]:
        """Parts whose batches have passed everything that comes before them.

        No batch has two of one level, for it would have passed one before the other.
        """
        sorter: TopologicalSorter[int] = TopologicalSorter()
        for index, part in enumerate(self.parts):
            if part.batches:
                sorter.add(index, *self.before[:, index].nonzero().flatten().tolist())
        try:
            sorter.prepare()
        except CycleError as error:
            names = ", ".join(repr(self.parts[index].name) for index in reversed(error.args[1]))
            raise InputError(
                f"expected batches that pass the layers in one order, got a circle: {names}; "
                'use method="batch"'
            ) from error
        levels = []
        while sorter.is_active():
            ready = sorter.get_ready()
            levels.append([self.parts[index] for index in sorted(ready)])
            sorter.done(*ready)
        return levels

    def _settle(self, parts: list[Part]) -> None:
        for part in parts:
            mean, var, _ = part.new()
            part.keeper.running_mean.copy_(mean)
            part.keeper.running_var.copy_(var)
            self.settled.add(part.keeper)

    def _advance(self) -> None:
        self.done += 1
        number = self.batches_here
        if number is None:
            try:
                number = len(self.batches)  # type: ignore[arg-type]
            except TypeError:
                self.tell(self.done, None)
                return
            if self.max_batches is not None:
                number = min(number, self.max_batches)
        self.tell(self.done, number * self.expected_passes)
