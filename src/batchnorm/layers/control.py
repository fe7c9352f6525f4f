"""What else decides about a layer's statistics: its options, and the tools that act on a model."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import torch

from batchnorm.errors import ArgumentError
from batchnorm.layers.statistics import StatisticsBank, WideStatistics
from batchnorm.moments import Moments
from batchnorm.pooled import History, Population, shared
from batchnorm.renorm import Renorm, check_renorm
from batchnorm.running import Running
from batchnorm.sync import WORLD, Group, Synchronizer, check_group, is_world, resolve
from batchnorm.validation import check_virtual_batch_size

#: Forward passes of a layer with renorm, within activation checkpointing, that may come before the
#: backward pass of the first: micro-batches of a step, calls of a shared layer. Each keeps 4C
#: numbers.
MOST_FORWARDS = 256


Collect = Callable[[Any, Any, Moments], None]
"""Takes the moments of a batch of a layer, in place of the running statistics of the layer itself
or of one of its banks, which is the second argument."""

Together = Callable[[Any, Any], Callable[[Moments], Moments] | None]
"""Gives what turns a micro-batch's moments into those of all that pass the layer together, which
the layer itself or one of its banks, the second argument, will take in."""


class Controlled(WideStatistics):
    """The part of a layer that tools act on, and copies of it do not take over.

    Attributes:
        virtual_batch_size: samples in a group, or None.
        renorm: Batch Renormalization, or None.
        process_group: who shares the statistics.
        banks: more sets of statistics, by name; there is none before the first bank.
    """

    virtual_batch_size: int | None
    renorm: Renorm | None
    process_group: Group
    banks: torch.nn.ModuleDict
    _sync: Synchronizer | None
    _frozen: bool
    _bank: str | None
    _collect: Collect | None
    _together: Together | None
    _history: History | None

    def _set_free(self) -> None:
        """As if no tool had ever acted on it."""
        self._frozen = False
        self._sync = self._bank = self._collect = self._together = self._history = None

    def check_bank(self, name: str, *, affine: bool = False) -> None:
        """Refuse a bank that cannot be, before any is made.

        Raises:
            ArgumentError: the name cannot be used, the layer keeps no running statistics, or there
                is such a bank, but with γ and β shared where its own are asked for or the reverse.
        """
        if (
            not isinstance(name, str)
            or not name.isidentifier()
            or hasattr(torch.nn.ModuleDict(), name)
        ):
            raise ArgumentError(
                f"expected the name of a bank to be a word such as 'fake', got {name!r}"
            )
        if self.running_mean is None or (affine and self.weight is None):
            raise ArgumentError(
                "expected a layer with running statistics (and with γ and β, for a bank that has "
                f"its own), got {self}"
            )
        existing = self._modules.get("banks")
        if existing is not None and name in existing:  # type: ignore[operator]
            has = existing.get_submodule(name).weight is not None
            if has != affine:
                raise ArgumentError(f"expected bank {name!r} as it is, affine={has}, got {affine}")

    def add_bank(self, name: str, *, affine: bool = False) -> None:
        """Make a bank of statistics, a copy of the layer's own; nothing if there is one already.

        Raises:
            ArgumentError: as `check_bank`.
        """
        self.check_bank(name, affine=affine)
        if "banks" not in self._modules:
            self.banks = torch.nn.ModuleDict()
        if name not in self.banks:
            self.banks[name] = StatisticsBank(self, affine).train(self.training)

    def _population(self, reference: Running) -> Population:
        check_virtual_batch_size(self.virtual_batch_size)
        check_renorm(self.renorm)
        history = None
        # Compiled code is recomputed within itself, and would be compiled again for the new list.
        if self.renorm is not None and not torch.compiler.is_compiling():
            if self._history is None:
                self._history = deque(maxlen=MOST_FORWARDS)
            history = self._history
        sync = self._synchronizer()
        return Population(self.virtual_batch_size, self.renorm, sync, reference, history)

    def shared(self, moments: Moments) -> Moments:
        """Moments of the elements of all processes that share this layer's statistics."""
        return shared(moments, self._synchronizer())

    def _synchronizer(self) -> Synchronizer | None:
        """Of the group that `process_group` now stands for."""
        check_group(self.process_group)
        group = resolve(self.process_group)
        if group is None:
            return None
        if self._sync is None or not self._sync.serves(group):
            self._sync = Synchronizer(group)
        return self._sync

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in state_dict:
            # "banks.NAME.running_mean", of a bank that there may not be yet.
            if key.startswith(f"{prefix}banks.") and key.endswith(".running_mean"):
                name = key.removeprefix(f"{prefix}banks.").removesuffix(".running_mean")
                own = f"{prefix}banks.{name}.weight" in state_dict
                try:
                    self.add_bank(name, affine=own)
                except ArgumentError as error:  # told with all else that does not fit
                    args[-1].append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Processes are shared, not copied; what goes on around this layer does not concern a copy.
        memo[id(self.process_group)] = self.process_group
        for passing in (self._sync, self._history, self._collect, self._together):
            memo[id(passing)] = None
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__ | {"_bank": None}, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {
            "_sync": None,
            "_bank": None,
            "_collect": None,
            "_together": None,
            "_history": None,
        }
        if self.process_group is not None and self.process_group != WORLD:
            if not is_world(self.process_group):
                raise ArgumentError(
                    f"expected process_group={WORLD!r} or None in a layer to be pickled, got a "
                    "group that belongs to this program: save the state_dict, or set it to None"
                )
            state["process_group"] = WORLD
        return state
