"""Which modules of a model the tools act on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.recurrent import BatchNormLSTM


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """All batch norm layers with their names: ours, torch's, and what derives from them.

    Raises:
        ArgumentError: there are none, or `model` is no module.
    """
    check_module(model)
    found = [
        (name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)
    ]
    if not found:
        raise ArgumentError(_none(model))
    yield from found


def check_module(model: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _none(model: nn.Module) -> str:
    if isinstance(model, torch.jit.ScriptModule):
        return (
            "expected a torch.nn.Module, got one that torch.jit has compiled, into which nothing "
            "here looks; use the model that it was made of"
        )
    return (
        "expected a model with batch norm layers (batchnorm.BatchNorm, torch.nn.BatchNorm…), "
        f"got a {type(model).__name__} with none"
    )


def keepers(layer: _BatchNorm) -> list[Any]:
    """A layer and its banks, if it has any: what keeps running statistics, γ and β."""
    # Not layer.modules(): an activation, too, may be a module with a weight or with statistics.
    banks: Any = layer._modules.get("banks") if isinstance(layer, BatchNorm) else None
    return [layer, *(banks.values() if banks is not None else ())]


def named_keepers(name: str, layer: Any) -> list[tuple[str, Any]]:
    """A layer and its banks, with their names in the model."""
    banks = keepers(layer)[1:]
    names = [f"{name}.banks.{key}".strip(".") for key in layer.banks] if banks else []
    return [(name, layer), *zip(names, banks, strict=True)]


def stepwise(model: nn.Module) -> set[nn.Module]:
    """The layers within recurrent networks, which have a bank for each step."""
    recurrent = (module for module in model.modules() if isinstance(module, BatchNormLSTM))
    return {norm for module in recurrent for norms in module.norms for norm in norms.children()}


def own_batch_norms(model: nn.Module) -> list[tuple[str, BatchNorm]]:
    """All layers of our class, for what only they can do.

    Raises:
        ArgumentError: there are none, or others beside them, which would silently not take part.
    """
    found = []
    for name, layer in batch_norms(model):
        if not isinstance(layer, BatchNorm):
            raise ArgumentError(
                f"expected every batch norm layer to be a batchnorm.BatchNorm, got "
                f"{type(layer).__name__} at {name!r}; convert(model) first"
            )
        found.append((name, layer))
    return found


#: What a frozen batch norm keeps as buffers.
_FROZEN = ("weight", "bias", "running_mean", "running_var")


def is_fixed(module: nn.Module) -> bool:
    """Whether it is a batch norm of a class that never trains.

    As torchvision's `FrozenBatchNorm2d`, transformers' `DetrFrozenBatchNorm2d` and their like. They
    share no class, only what they keep.
    """
    return (
        not isinstance(module, _BatchNorm)
        and "batchnorm" in type(module).__name__.lower()
        and all(isinstance(module._buffers.get(name), Tensor) for name in _FROZEN)
        and not module._parameters
    )


def every_batch_norm(model: nn.Module) -> list[tuple[str, Any]]:
    """All batch norm layers with their names, those that never train too: see `is_fixed`.

    Raises:
        ArgumentError: there are none, or `model` is no module.
    """
    check_module(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or is_fixed(module)
    ]
    if not found:
        raise ArgumentError(_none(model))
    return found
