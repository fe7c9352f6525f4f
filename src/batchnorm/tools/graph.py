"""What a graph keeps for its backward pass, where a layer's input or output can be made again.

torch calls a hook with each tensor that an operation saves, and keeps what the hook returns. A
layer tells, by its call, which two tensors are tied. Where another operation saves its output, then
one of the two is dropped: see `save_memory`.

All references run as the graph's own do, from an operation to those before it: nothing here
outlives a graph, and nothing waits for the garbage collector.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812 - as everybody does

from batchnorm.autograd_memory import Make, call_of, input_again, output_again
from batchnorm.kernels import calls

#: The activations that are made again where they follow a layer as operations of their own: what
#: torch calls their nodes. Each is a function of its input alone, the same bits each time.
_AFTER: dict[str, Callable[[Any], Make]] = {
    "ReluBackward0": lambda _: torch.relu_,
    "LeakyReluBackward0": lambda node: partial(
        F.leaky_relu, negative_slope=node._saved_negative_slope
    ),
    "LeakyReluBackward1": lambda node: partial(  # in place
        F.leaky_relu, negative_slope=node._saved_negative_slope
    ),
    "SiluBackward0": lambda _: F.silu,
    "GeluBackward0": lambda node: partial(F.gelu, approximate=node._saved_approximate),
    "HardtanhBackward0": lambda node: partial(
        F.hardtanh, min_val=node._saved_min_val, max_val=node._saved_max_val
    ),
    "HardswishBackward0": lambda _: F.hardswish,
    # Some that work in place save one.
    "CloneBackward0": lambda _: lambda y: y,
}

#: Of an input and an output: what makes the input from outputs, and how many bytes that keeps; or
#: why it cannot be made.
_Invert = Callable[[Tensor, Tensor], tuple[Make, int] | str]  # mutant: a type

_PLAIN = (Tensor, torch.nn.Parameter)
#: Under this name a layer's node holds its tie.
_TIE = "_batchnorm_tie"

#: Why nothing is saved, until there is another reason.
UNSEEN = "no call of it was seen: those in compiled code and by forward_together are not"
_UNRECORDED = "no call of it has recorded gradients"
_KEPT_ANYWAY = "its input is kept anyway"
_UNSAVED = "no other operation has saved its output"
_FUNCTION = "its output does not come from its kernels, but from a function after them"


class Account:
    """What is said of a layer in a block.

    Args:
        name: the layer's.
        layers: gets the bytes that each layer saves.
        reasons: gets why it saves nothing.
    """

    def __init__(self, name: str, layers: dict[str, int], reasons: dict[str, str]) -> None:
        self.name, self.layers, self.reasons = name, layers, reasons

    def saves(self, number: int) -> None:
        """So many bytes."""
        self.layers[self.name] += number
        if self.reasons.get(self.name) == _UNSAVED:
            del self.reasons[self.name]

    def fails(self, reason: str) -> None:
        """It saves nothing, at least in this call."""
        self.reasons[self.name] = reason

    def missed(self, reason: str) -> None:
        """No call of it could have saved anything, as far as is known."""
        if self.reasons.get(self.name) == UNSEEN:
            self.fails(reason)

    def may_save(self) -> None:
        """It does if another operation saves its output."""
        if self.reasons.get(self.name, UNSEEN) in (UNSEEN, _UNRECORDED):
            self.fails(_UNSAVED)


class _Recipe:
    """A tensor that is made when the backward pass asks for it, once for all who will ask."""

    def __init__(
        self, make: Make, sources: list[_Kept | _Recipe], account: Account, number: int
    ) -> None:
        self.make, self.sources, self.account, self.bytes = make, sources, account, number
        self.askers = self.left = 0
        self.made: Tensor | None = None

    def get(self) -> Tensor:
        made = self.made
        if made is None:
            made = self.make(*(source.get() for source in self.sources))
        # Who keeps the graph will ask again.
        self.left = (self.left or self.askers) - 1
        self.made = made if self.left > 0 else None
        return made


class _Kept:
    """What a graph holds in place of a tensor that an operation has saved.

    Attributes:
        tensor: itself, or None where there is a recipe.
        recipe: how to make it.
        view: size, strides and offset, if it may be a view of what the recipe makes.
        askers: how many operations have saved it.
        is_source: whether another tensor is made from it.
        beside: all of its storage, where that is asked for.
    """

    beside: weakref.WeakSet[_Kept]

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an operation that saves its own result would hold itself.
        self.tensor: Tensor | None = tensor.detach()
        self.recipe: _Recipe | None = None
        self.view: tuple[Any, ...] | None = None  # mutant: a type
        self.askers, self.is_source = 0, False
        self.version, self.geometry, self.dtype = tensor._version, _geometry(tensor), tensor.dtype
        # Its number is no other storage's as long as this is held.
        self.storage = StorageWeakRef(tensor.untyped_storage())

    def get(self) -> Tensor:
        if self.recipe is not None:
            made = self.recipe.get()
            return made if self.view is None else made.as_strided(*self.view)
        tensor: Any = self.tensor
        if tensor._version != self.version:
            # torch asks this only of what no hook has packed.
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {tensor.dtype} {tuple(tensor.shape)} is at version "
                f"{tensor._version}; expected version {self.version}"
            )
        return tensor  # type: ignore[no-any-return]

    def drop(self, recipe: _Recipe, view: tuple[Any, ...] | None = None) -> None:
        """Hold only how to make it."""
        self.tensor, self.recipe, self.view = None, recipe, view
        recipe.askers += self.askers


class _Tie:
    """A layer's output and the input that it is made of, as long as their node lives."""

    def __init__(self, account: Account, source: _Kept, y: Tensor) -> None:
        self.account, self.source = account, weakref.ref(source)
        self.storage, self.version = StorageWeakRef(y.untyped_storage()), y._version
        # Without its memory, but with its version, which outlives y.
        self.y = y.detach()
        self.y.data = y.new_empty(0)
        self.geometry, self.dtype = _geometry(y), y.dtype
        self.recipe: Callable[[], _Recipe | None] = lambda: None
        #: What was added, if anything: itself, or what it is tied by.
        self.residual: Callable[[], _Kept | _Tie | None] | None = None  # mutant: a type
        #: How to make y, or where to ask how to make the input.
        self.make: Make | None = None
        self.invert: _Invert | None = None  # mutant: a type
        #: Of an activation's output, tied to the same input.
        self.after: list[_Tie] = []

    def of(self, tensor: Tensor) -> bool:
        """Whether this is the output, or a view of it, as the layer made it."""
        return tensor._version == self.version and tensor.dtype is self.dtype


class Keeper:
    """The hook that packs what operations save, and what layers tell of their calls.

    Args:
        keep_input: of a layer's two tensors, keep the input; else the output.

    Attributes:
        inexact: whether inputs are made again with an error: see `calls.inexact`.
        checkpoints: see `calls.checkpoints`.
    """

    checkpoints = False

    def __init__(self, keep_input: bool) -> None:
        self.inexact = not keep_input
        # By the number of the output's storage; by `_key`; by the number of the storage.
        self.ties: weakref.WeakValueDictionary[int, _Tie] = weakref.WeakValueDictionary()
        self.kept: weakref.WeakValueDictionary[Any, _Kept] = weakref.WeakValueDictionary()
        self.beside: weakref.WeakValueDictionary[int, weakref.WeakSet[_Kept]]
        self.beside = weakref.WeakValueDictionary()

    def __call__(self, tensor: Tensor) -> Any:
        """Pack a tensor that an operation saves."""
        if not _is_plain(tensor):
            return tensor.detach()
        kept = self._keep(tensor)
        if self.inexact:
            self._take_back(kept, tensor)
        if kept.recipe is None:
            tie = self._tie_of(tensor)
            if tie is not None:
                self._settle(tie, kept, tensor)
        kept.askers += 1
        if kept.recipe is not None:
            kept.recipe.askers += 1
        return kept

    def passed(
        self,
        account: Account,
        layer: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
    ) -> None:
        """A layer has been called: tie its input and its output."""
        if y.grad_fn is None:
            account.missed(_UNRECORDED)
            return
        source = self.kept.get(_key(x)) if _is_plain(x) else None
        added = None if residual is None else self._residual(residual)
        reason, call = None, None
        if (blind := self._blind()) is not None:
            reason = blind
        elif layer.renorm is not None and layer.training:
            reason = "it has renorm"
        elif callable(layer.activation):
            reason = _FUNCTION
        elif source is not None and source.recipe is not None:
            reason = "its input is made again itself"
        elif residual is not None and self.inexact:
            reason = "its input cannot be told from an output with a residual added"
        elif residual is not None and added is None:
            reason = "nothing keeps the residual, or it is made again itself"
        elif source is None or (call := call_of(y, x, bias)) is None:
            reason = _FUNCTION
        if reason is not None or source is None or call is None:
            account.fails(str(reason))
            return
        tie = _Tie(account, source, y)
        if self.inexact:
            tie.invert = partial(input_again, call)
        else:
            tie.make, tie.residual = output_again(call), added
        setattr(y.grad_fn, _TIE, tie)
        self.ties[tie.storage.cdata] = tie
        account.may_save()
        kept = self.kept.get(_key(y))
        if kept is not None:  # by the layer itself, to tell the activation's side
            self._settle(tie, kept, y)

    def _blind(self) -> str | None:
        """Why this does not see what is saved now."""
        top = calls.hooks()
        if top is None:
            return "no hooks see what its call saves: those of a block are its thread's alone"
        if isinstance(top[0], Keeper) and top[0] is not self:
            return (
                "another save_memory block sees what its call saves (one within, of other `keep`)"
            )
        if top[0] is not self:
            return "other hooks see what its call saves (checkpointing has some)"
        return None

    def _keep(self, tensor: Tensor) -> _Kept:
        key = _key(tensor)
        kept = self.kept.get(key)
        if kept is None:
            kept = self.kept[key] = _Kept(tensor)
            if self.inexact:
                kept.beside = self.beside.setdefault(kept.storage.cdata, weakref.WeakSet())
                kept.beside.add(kept)
        return kept

    def _take_back(self, kept: _Kept, tensor: Tensor) -> None:
        """Keep an input after all that lies where another operation has saved something, too."""
        for other in kept.beside:
            same = other.version == kept.version and other.dtype is kept.dtype
            if other.recipe is not None and same:
                other.recipe.account.saves(-other.recipe.bytes)
                other.recipe.account.fails(_KEPT_ANYWAY)
                other.tensor, other.recipe = tensor.detach().as_strided(*other.geometry), None

    def _residual(self, residual: Tensor) -> Callable[[], _Kept | _Tie | None] | None:
        """Where a residual is to be had again without keeping it for that; None: nowhere."""
        if self.inexact or not _is_plain(residual):
            return None
        kept = self.kept.get(_key(residual))
        if kept is not None:
            return None if kept.recipe is not None else weakref.ref(kept)
        tie = self.ties.get(residual.untyped_storage()._cdata)
        # Not through more than one: else what one of many blocks asks for makes all before it.
        alone = tie is not None and tie.of(residual) and tie.residual is None
        whole = tie is not None and _geometry(residual) == tie.geometry
        return weakref.ref(tie) if tie is not None and alone and whole else None

    def _tie_of(self, tensor: Tensor) -> _Tie | None:
        """What a tensor is tied by, if it can be made from a layer's input or the reverse."""
        tie = self.ties.get(tensor.untyped_storage()._cdata)
        if tie is not None and tie.of(tensor):
            return tie
        return None if self.inexact else self._tie_after(tensor)

    def _tie_after(self, tensor: Tensor) -> _Tie | None:
        """The same of an activation that is an operation of its own."""
        node: Any = tensor.grad_fn
        after = None if node is None else _AFTER.get(node.name())
        before = None if after is None else node.next_functions[0][0]
        tie: _Tie | None = getattr(before, _TIE, None)
        source = None if tie is None else tie.source()
        if (
            after is None
            or tie is None
            or tie.make is None
            or source is None
            or self.ties.get(tie.storage.cdata) is not tie  # another block's
            or _geometry(tensor) != tie.geometry
        ):
            return None
        if tensor.untyped_storage()._cdata == tie.storage.cdata:
            unchanged = tensor._version == tie.version + 1  # but by the activation, in place
        else:
            unchanged = tensor._version == 0 and tie.y._version == tie.version
        if not unchanged:
            return None
        activate, make = after(node), tie.make
        own = _Tie(tie.account, source, tensor)
        own.make, own.residual = lambda *sources: activate(make(*sources)), tie.residual
        tie.after.append(own)
        self.ties[own.storage.cdata] = own
        return own

    def _settle(self, tie: _Tie, kept: _Kept, tensor: Tensor) -> None:
        """Drop one of two tensors that are tied, now that a view of the output has been saved."""
        source = tie.source()
        if source is None:
            return
        if tie.make is not None:
            recipe = tie.recipe()
            if recipe is None:
                recipe = self._recipe(tie)
                if recipe is None:
                    return
                recipe.account.saves(recipe.bytes)
            kept.drop(recipe, _geometry(tensor))
        elif tie.invert is not None and source.tensor is not None:
            others = any(k is not source and k.tensor is not None for k in source.beside)
            if source.askers > 1 or source.is_source or others:
                tie.account.fails(_KEPT_ANYWAY)
                return
            if source.tensor.untyped_storage().nbytes() > source.tensor.nbytes:
                tie.account.fails("its input is a part of a larger tensor")
                return
            y = tensor.detach().as_strided(*tie.geometry)
            found, tie.invert = tie.invert(source.tensor, y), None
            if isinstance(found, str):
                tie.account.fails(found)
                return
            make, besides = found
            kept = self._keep(y)
            kept.is_source = True
            recipe = _Recipe(make, [kept], tie.account, source.tensor.nbytes - besides)
            source.drop(recipe)
            recipe.account.saves(recipe.bytes)

    def _recipe(self, tie: _Tie) -> _Recipe | None:
        """How to make an output; None: what it is made of has gone."""
        source: _Kept | None = tie.source()
        if source is None or tie.make is None:
            return None
        sources: list[_Kept | _Recipe] = [source]
        if tie.residual is not None:
            added = tie.residual()
            residual = added.recipe() or self._recipe(added) if isinstance(added, _Tie) else added
            if residual is None:
                return None
            residual.askers += 1
            sources.append(residual)
        number = tie.dtype.itemsize * tie.geometry[0].numel()
        recipe = _Recipe(tie.make, sources, tie.account, number)
        tie.recipe = weakref.ref(recipe)
        return recipe


def unpack(kept: Any) -> Tensor:
    """What an operation has saved."""
    return kept.get() if isinstance(kept, _Kept) else kept


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has strides, and is what lies in a storage that can be looked at."""
    plain = type(tensor) in _PLAIN and tensor.layout is torch.strided
    return plain and not (tensor.is_nested or tensor.is_conj() or tensor.is_neg())


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _key(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor._version, tensor.dtype, *_geometry(tensor)
