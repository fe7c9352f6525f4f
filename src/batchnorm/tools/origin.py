"""What a converted layer was, the rules of what can be converted, and the change of one layer.

A layer changes by its class: the module stays the same object, as it does where torch's own lazy
layers turn into others. So whatever refers to it goes on doing so: parents, hooks and their
handles, optimizers, other attributes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.sync import WORLD
from batchnorm.tools.freeze import KEPT, freeze_statistics, is_frozen, unfreeze_statistics
from batchnorm.tools.layers import is_fixed
from batchnorm.tools.lazy import LAZY, LazyBatchNorm

#: Ranks of the inputs of torch's layers.
RANKS: dict[type, tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
EVERY_RANK = (2, 3, 4, 5)

#: Stands for eps=0, which torch allows and torchvision's detectors have: added to a variance above
#: 1e-31, it changes nothing in float32.
TINY = torch.finfo(torch.float32).tiny

#: Where a converted layer remembers.
ORIGIN = "_origin"

_AFFINE = ("weight", "bias")
_FIXED = (*_AFFINE, "running_mean", "running_var")
_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")

_PLAIN = vars(nn.BatchNorm1d(1, device="meta"))
_OURS = vars(BatchNorm(1, device="meta"))
#: What a layer of ours keeps that torch's do not.
OWN = tuple(name for name in _OURS if name not in _PLAIN)

#: What a derived class may define without computing anything else.
_HARMLESS = {
    *vars(type("Empty", (), {})), "__init__", "__annotations__", "__constants__", "__repr__",
    "extra_repr", "_check_input_dim", "__firstlineno__", "__static_attributes__", "__parameters__",
    "__orig_bases__", "__slots__", "__abstractmethods__", "_abc_impl", "__annotate__",
    "__annotate_func__",  # mutant: of later Pythons
}  # fmt: skip
_KNOWN = {cls for kind in (*RANKS, *LAZY) for cls in kind.__mro__}


@dataclass(frozen=True)
class Origin:
    """What a layer was before it was converted.

    Attributes:
        kind: its class.
        ranks: of the inputs that it accepted.
        fused: the activation that takes the part of a child.
        child: the name of the child that is the activation.
        children: the names of all, in order.
        removed: those whose part is taken, or that had none.
        attributes: the names of those that it had.
        buffers: their names, in order.
        group: of processes, if it shared its statistics.
        options: the names of those that `convert` has set.
    """

    kind: type[nn.Module]
    ranks: tuple[int, ...]
    fused: str | None
    child: str | None
    children: tuple[str, ...]
    removed: dict[str, nn.Module | None]
    attributes: frozenset[str]
    buffers: tuple[str, ...]
    group: Any
    options: frozenset[str] = frozenset()

    @property
    def fixed(self) -> bool:
        """Whether it was of a class that never trains."""
        return not issubclass(self.kind, _BatchNorm)

    def activation(self, layer: nn.Module) -> Any:
        """Of the converted layer."""
        return self.fused if self.child is None else layer._modules[self.child]

    @property
    def synchronises(self) -> bool:
        """Whether it shared its statistics with other processes."""
        return issubclass(self.kind, nn.SyncBatchNorm)


def origin_of(layer: Any) -> Origin:
    """What a layer is, if `BatchNorm` can stand for it.

    Raises:
        ArgumentError: it cannot; the message says why, not which layer.
    """
    kind = type(layer)
    fixed = is_fixed(layer)
    if parametrize.is_parametrized(layer):
        raise ArgumentError(
            "it is parametrized; torch.nn.utils.parametrize.remove_parametrizations first"
        )
    foreign = [cls for cls in kind.__mro__ if cls not in _KNOWN]
    names = {
        name
        for cls in foreign
        for name, value in vars(cls).items()
        if not isinstance(value, (classmethod, staticmethod))
    } - _HARMLESS
    own_forward = "forward" in names
    names -= {"forward", "_load_from_state_dict", "_version"} if fixed else {"forward"}
    if names:
        raise ArgumentError(f"BatchNorm would lose its class's own {_listed(names)}")
    if "forward" in vars(layer):
        raise ArgumentError("its forward was replaced, and would go on doing what it did")
    if vars(layer).get("_collect") is not None:
        raise ArgumentError("accumulate_statistics is at work; convert outside of the block")
    fused, child = _activation(layer, foreign) if own_forward else (None, None)
    kept = set(layer._modules) if not own_forward else {child}
    _check_names(layer, child)
    return Origin(
        kind,
        # Of fewer axes they would make an outer product with γ.
        (4,) if fixed else RANKS.get(kind, EVERY_RANK),
        fused,
        child,
        tuple(layer._modules),
        {name: module for name, module in layer._modules.items() if name not in kept},
        frozenset(vars(layer)),
        tuple(layer._buffers),
        layer.process_group if isinstance(layer, nn.SyncBatchNorm) else None,
    )


def _activation(layer: Any, foreign: list[type]) -> tuple[str | None, str | None]:
    """What a forward of its own may do after normalising: its one child that does something.

    Returns:
        Its name among the fused activations; or else the child's.
    """
    children = {name: child for name, child in layer._modules.items() if child is not None}
    active = [
        name
        for name, child in children.items()
        if type(child) is not nn.Identity or _is_hooked(child)
    ]
    if len(active) > 1:
        raise ArgumentError(
            f"its class's own forward has {_listed({*active})} to call, BatchNorm one activation"
        )
    if not (children or is_fixed(layer)):
        raise ArgumentError("BatchNorm would lose its class's own forward")
    # What changes nothing now may do so later, when the layer has no such forward any more.
    state = {*layer._parameters, *layer._buffers} - {*_FIXED, "num_batches_tracked"}
    attributes = set(vars(layer)) - set(_PLAIN) - {"process_group"}
    forwards = [inspect.unwrap(vars(cls)["forward"]) for cls in foreign if "forward" in vars(cls)]
    if more := state | (attributes & {name for it in forwards for name in it.__code__.co_names}):
        raise ArgumentError(f"its class's own forward may use {_listed(more)}")
    if not active:
        return None, None
    (name,) = active
    child = children[name]
    if type(child) is nn.ReLU and not _is_hooked(child):
        return "relu", None
    if type(child) is nn.LeakyReLU and child.negative_slope == 0.01 and not _is_hooked(child):
        return "leaky_relu", None
    return None, name


def _is_hooked(module: nn.Module) -> bool:
    return any(name.endswith("_hooks") and value for name, value in vars(module).items())


def _check_names(layer: Any, child: str | None) -> None:
    """Refuse a layer with attributes that would mean something in ours."""
    # Tools leave None where they have been at work.
    taken = {name for name, value in vars(layer).items() if value is not None}
    taken |= set(layer._modules) - {child}
    taken -= {"process_group"} if isinstance(layer, nn.SyncBatchNorm) else set()
    properties = {name for name in dir(BatchNorm) if not hasattr(type(layer), name)}
    if clash := taken & ({*OWN, "banks"} | properties):
        raise ArgumentError(
            f"it has an attribute {_listed(clash)} of its own, which means something else in "
            "BatchNorm; give it another name"
        )


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def become_ours(layer: Any, origin: Origin) -> None:
    """Turn a layer into a `BatchNorm`."""
    frozen = origin.fixed or is_frozen(layer)
    if origin.fixed:
        _let_train(layer)
    else:
        unfreeze_statistics(layer)
    layer.__class__ = LazyBatchNorm if issubclass(origin.kind, LAZY) else BatchNorm
    state = vars(layer)
    for name in OWN:
        if state.get(name) is None:
            state[name] = _OURS[name]
    if origin.synchronises and layer.process_group is None:
        layer.process_group = WORLD
    if layer.eps == 0:
        layer.eps = TINY
    for name in origin.removed:
        del layer._modules[name]
    # Not by `setattr`, which would register a child once more, under another name.
    state["activation"] = origin.activation(layer)
    layer._frozen = frozen
    state[ORIGIN] = origin
    layer._widen_statistics()


def _let_train(layer: Any) -> None:
    """Give a layer that never trains what it takes, frozen."""
    for name in _AFFINE:
        layer._parameters[name] = nn.Parameter(layer._buffers.pop(name), requires_grad=False)
    mean = layer._buffers["running_mean"]
    if "num_batches_tracked" not in layer._buffers:
        layer._buffers["num_batches_tracked"] = torch.zeros_like(mean[0], dtype=torch.long)
        layer.register_load_state_dict_pre_hook(_supply_counter)
    defaults = vars(BatchNorm(len(mean), device="meta"))
    for name in _SETTINGS:
        vars(layer).setdefault(name, defaults[name])
    vars(layer)[KEPT] = dict.fromkeys(_AFFINE, True)  # `unfreeze` lets them train


def _supply_counter(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """State dicts of what never trains have none, and torch supplies it to its own old ones only.

    That is by their version, which may be another one's: of Detectron2's frozen layer it is 3.
    """
    if prefix + "running_mean" in state_dict:
        state_dict.setdefault(prefix + "num_batches_tracked", layer.num_batches_tracked)


def become_theirs(layer: Any, kind: type[nn.Module], origin: Origin | None) -> None:
    """Turn a `BatchNorm` into a layer of another class: the one that it was, or torch's."""
    frozen, group, state = layer._frozen, layer.process_group, vars(layer)
    for name in (*OWN, ORIGIN):
        state.pop(name, None)
    hooks = layer._load_state_dict_pre_hooks
    for key in [key for key, it in hooks.items() if getattr(it, "hook", None) is _supply_counter]:
        del hooks[key]
    layer.__class__ = kind
    if layer.eps == TINY:
        layer.eps = 0.0
    if issubclass(kind, nn.SyncBatchNorm):
        if origin is not None and "process_group" in origin.options:
            group = origin.group
        layer.process_group = None if group == WORLD else group
    _narrow(layer)
    if origin is not None:
        for child in origin.removed.values():
            if child is not None:
                child.train(layer.training)  # modes may have changed without it
        children = {**layer._modules, **origin.removed}
        names = [name for name in origin.children if name in children]
        layer._modules = {name: children[name] for name in (*names, *children)}
    if origin is not None and not issubclass(kind, _BatchNorm):
        tensors = {name: parameter.detach() for name, parameter in layer._parameters.items()}
        tensors |= layer._buffers
        layer._parameters = {}
        layer._buffers = {name: tensors[name] for name in origin.buffers}
        for name in {*_SETTINGS, KEPT} - origin.attributes:
            state.pop(name, None)
    elif frozen:
        freeze_statistics(layer)


def _narrow(layer: Any) -> None:
    """torch's kernels take running statistics of the dtype of γ and β only, where that is half.

    Without γ and β they take float32 with any input, and nothing says what the input will be.
    """
    given = layer.bias if layer.weight is None else layer.weight
    dtype = None if given is None else given.dtype
    if dtype in (torch.float16, torch.bfloat16):
        for name in ("running_mean", "running_var"):
            buffer = layer._buffers[name]
            layer._buffers[name] = None if buffer is None else buffer.to(dtype)
