"""Freezing: fine-tune a model without its batch norm layers changing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.layers import batch_norms, keepers

#: Under this name a layer keeps what `unfreeze` is to give back.
KEPT = "_before_freezing"

_AFFINE = re.compile(r"(weight|bias)(_orig)?|parametrizations\.(weight|bias)\..*")


def freeze(model: nn.Module, *, statistics: bool = True, affine: bool = True) -> None:
    """Freeze the batch norm layers of a model, whatever `train()` and `eval()` are called later.

    A frozen layer normalises by its running statistics, as in evaluation, also in training, and
    does not update them; γ and β get no gradient. `unfreeze` gives everything back: momentum,
    counters and `requires_grad` are kept. Frozen layers stay so when the model is copied, pickled
    or moved; a state dict does not know of it. (Freezing layers of torch's own lets torch.compile
    forget what it has compiled, once: it would not see them frozen.)

    Args:
        model: with any batch norm layers, ours or torch's.
        statistics: freeze the running statistics.
        affine: freeze γ and β, and those of banks. Their `grad` is set to None, so that an
            optimizer that has them already leaves them alone, weight decay included.

    Raises:
        ArgumentError: there are no batch norm layers, or one has no running statistics to normalise
            by. Nothing has been changed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, freeze, unfreeze
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8))
        >>> freeze(model)
        >>> _ = model.train()(torch.randn(16, 4))
        >>> model[1].num_batches_tracked, model[1].weight.requires_grad
        (tensor(0), False)
        >>> unfreeze(model)
    """
    layers = list(batch_norms(model))
    for name, layer in layers:
        if statistics and (layer.running_mean is None or layer.running_var is None):
            where = f"layer {name!r}, {layer}" if name else layer
            raise ArgumentError(
                f"expected running statistics to freeze in {where}, got none "
                "(track_running_stats=False); with statistics=False only γ and β are frozen"
            )
    hooked = statistics and any(
        not isinstance(layer, BatchNorm) and not is_frozen(layer) for _, layer in layers
    )
    for _, layer in layers:
        if statistics:
            freeze_statistics(layer)
        if affine:
            _remember(layer)
    if hooked and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code does not see hooks that come later
    # Afterwards: layers may share a parameter.
    for _, layer in layers if affine else ():
        _freeze_affine(layer)


def unfreeze(model: nn.Module, *, statistics: bool = True, affine: bool = True) -> None:
    """Undo `freeze`; layers that are not frozen, and what did not train before, stay as they are.

    Args:
        model: with any batch norm layers.
        statistics: the running statistics.
        affine: γ and β.

    Raises:
        ArgumentError: there are no batch norm layers.
    """
    before: list[tuple[bool, nn.Parameter]] = []
    for _, layer in batch_norms(model):
        if statistics:
            unfreeze_statistics(layer)
        if affine:
            before += _forget(layer)
    # What trained comes last: one of the layers that share it may have been frozen after another.
    for trained, parameter in sorted(before, key=lambda it: it[0]):
        parameter.requires_grad = trained


def is_frozen(layer: nn.Module) -> bool:
    """Whether `freeze` keeps this layer's running statistics as they are."""
    if isinstance(layer, BatchNorm):
        return layer._frozen
    return _evaluate in layer._forward_pre_hooks.values()


def affine_of(keeper: nn.Module) -> dict[str, nn.Parameter]:
    """γ and β by name, or what torch's pruning and parametrizations make them of."""
    own = keeper.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in own if _AFFINE.fullmatch(name)}


def _remember(layer: _BatchNorm) -> None:
    for keeper in keepers(layer):
        kept = keeper.__dict__.setdefault(KEPT, {})
        for name, parameter in affine_of(keeper).items():
            kept.setdefault(name, parameter.requires_grad)


def _freeze_affine(layer: _BatchNorm) -> None:
    for keeper in keepers(layer):
        for parameter in affine_of(keeper).values():
            parameter.requires_grad = False  # a lazy layer's has no `requires_grad_` yet
            parameter.grad = None


def _forget(layer: _BatchNorm) -> Iterator[tuple[bool, nn.Parameter]]:
    kept = layer.__dict__.get(KEPT, {})
    for keeper in keepers(layer):
        # A bank that was made of a frozen layer has copies of frozen parameters.
        before = keeper.__dict__.pop(KEPT, kept)
        for name, parameter in affine_of(keeper).items():
            yield before.get(name, parameter.requires_grad), parameter


def freeze_statistics(layer: nn.Module) -> None:
    """Freeze the running statistics of one layer; nothing if they are."""
    if isinstance(layer, BatchNorm):
        layer._frozen = True
    elif not is_frozen(layer):
        # torch's layers ask `training` only: it is False while they run, and what it was after.
        layer.register_forward_pre_hook(_evaluate, prepend=True)
        layer.register_forward_hook(_restore, always_call=True)


def unfreeze_statistics(layer: nn.Module) -> None:
    """Undo `freeze_statistics`."""
    if isinstance(layer, BatchNorm):
        layer._frozen = False
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_evaluate, _restore)]:
            del hooks[key]
            layer._forward_hooks_always_called.pop(key, None)


def _evaluate(layer: nn.Module, _: Any) -> None:
    layer.__dict__["_was_training"] = layer.training
    layer.training = False


def _restore(layer: nn.Module, _: Any, __: Any) -> None:
    layer.training = layer.__dict__.pop("_was_training", layer.training)


#: The hooks of frozen layers of torch's own: evaluation is the same with them and without.
HOOKS = (_evaluate, _restore)
