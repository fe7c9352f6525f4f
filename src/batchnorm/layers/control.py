"""What else decides about a layer's statistics: its options, and the tools that act on a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, InputError
from batchnorm.kernels import calls, select
from batchnorm.layers.statistics import StatisticsBank, WideStatistics
from batchnorm.moments import Moments
from batchnorm.pooled import Corrections, Population, shared
from batchnorm.recall import Recall
from batchnorm.renorm import Renorm, check_renorm
from batchnorm.running import Running
from batchnorm.sync import WORLD, Group, Synchronizer, check_group, is_world, resolve
from batchnorm.validation import Settings, check_tensors, check_virtual_batch_size

#: What a layer holds only while something goes on around it: no copy of it does.
_PASSING = ("_sync", "_bank", "_collect", "_together", "_corrections", "_banked", "_watched")

Collect = Callable[[Any, Any, Moments], None]
"""Takes the moments of a batch of a layer, in place of the running statistics of the layer itself
or of one of its banks, which is the second argument."""

Together = Callable[[Any, Any], Callable[[Moments], Moments] | None]
"""Gives what turns a micro-batch's moments into those of all that pass the layer together, which
the layer itself or one of its banks, the second argument, will take in."""

Watched = Callable[[Any, Tensor, Tensor | None, Tensor | None, Tensor], None]
"""Is told of each call: the layer, its input, β, the residual, the output."""


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
    _corrections: dict[Any, Corrections] | None
    _banked: Recall[str | None] | None
    _watched: Watched | None

    def _set_free(self) -> None:
        """As if no tool had ever acted on it."""
        self._frozen = False
        self.__dict__.update(dict.fromkeys(_PASSING))

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
                "expected the name of a bank to be a word such as 'fake' (and none that "
                f"torch.nn.ModuleDict has a use for), got {name!r}"
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

    def _keeper(self, x: Tensor, mask: Tensor | None, settings: Settings) -> Any:
        """The bank in use, or the layer itself.

        Raises:
            InputError: activation checkpointing does a pass again that may be one of several.
        """
        name = self._bank
        if torch.compiler.is_compiling():  # compiled code is recomputed within itself
            return self if name is None else self.banks[name]
        again = select.recomputing()
        # In this order: a layer may have hundreds of banks.
        if (again or select.recomputed_later()) and self._depends_on_bank():
            *_, channel_dim, _ = settings
            check_tensors(x, None, None, None, None, True, mask, None, channel_dim)
            with torch.no_grad():
                moments = select.moments(x.detach(), mask, channel_dim)
            if self._banked is None:
                self._banked = Recall()
            if not again:
                self._banked.keep(moments.mean, moments.m2, name)
            elif names := self._banked.find(moments.mean, moments.m2):
                if len(set(names)) > 1:
                    used = ", ".join(sorted({bank or "the layer's own" for bank in names}))
                    raise InputError(
                        "expected to know the bank of a pass that activation checkpointing does "
                        f"again, got the same data with several ({used}): call backward after "
                        "each, or leave this layer out of the checkpoint"
                    )
                name = names[0]
        return self if name is None else self.banks[name]

    def _depends_on_bank(self) -> bool:
        """Whether the output does, in a pass that is perhaps checkpointed."""
        # Evaluation without gradients is not: it is not to cost more.
        return (self.training or calls.checkpoints()) and (
            self._frozen
            or not self.training
            or self.renorm is not None
            or any(bank.weight is not None for bank in self.banks.values())
        )

    def _population(self, reference: Running, keeper: Any) -> Population:
        check_virtual_batch_size(self.virtual_batch_size)
        check_renorm(self.renorm)
        corrections = None
        # Compiled code is recomputed within itself, and would be compiled again for the new list.
        if self.renorm is not None and not torch.compiler.is_compiling():
            if self._corrections is None:
                self._corrections = {}
            corrections = self._corrections.setdefault(keeper, Recall())
        sync = self._synchronizer()
        return Population(self.virtual_batch_size, self.renorm, sync, reference, corrections)

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
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__ | dict.fromkeys(_PASSING), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | dict.fromkeys(_PASSING)
        if self.process_group is not None and self.process_group != WORLD:
            if not is_world(self.process_group):
                raise ArgumentError(
                    f"expected process_group={WORLD!r} or None in a layer to be pickled, got a "
                    "group that belongs to this program: save the state_dict, or set it to None"
                )
            state["process_group"] = WORLD
        return state
