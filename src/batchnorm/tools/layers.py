"""Which modules of a model the tools act on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """All batch norm layers with their names: ours, torch's, and what derives from them.

    Raises:
        ArgumentError: there are none, or `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"expected a torch.nn.Module, got {type(model).__name__}")
    found = [
        (name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)
    ]
    if not found:
        raise ArgumentError(
            "expected a model with batch norm layers (batchnorm.BatchNorm, torch.nn.BatchNorm…), "
            f"got a {type(model).__name__} with none"
        )
    yield from found


def keepers(layer: _BatchNorm) -> list[Any]:
    """A layer and its banks, if it has any: what keeps running statistics, γ and β."""
    # Not layer.modules(): an activation, too, may be a module with a weight or with statistics.
    banks: Any = layer._modules.get("banks") if isinstance(layer, BatchNorm) else None
    return [layer, *(banks.values() if banks is not None else ())]


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
                f"{type(layer).__name__} at {name!r}; put BatchNorm there (its state dict fits)"
            )
        found.append((name, layer))
    return found
