"""Converting: the batch norm layers of a model become `BatchNorm`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.layers import check_module, every_batch_norm
from batchnorm.tools.lazy import LAZY
from batchnorm.tools.origin import ORIGIN, Origin, become_ours, origin_of
from batchnorm.tools.same import difference

#: Settings that options must go together with; what never trains may be without.
_DEFAULTS: dict[str, Any] = {
    "eps": 1e-5, "momentum": 0.1, "track_running_stats": True, "process_group": None
}  # fmt: skip

M = TypeVar("M", bound=nn.Module)  # mutant: for type checkers

#: What belongs to a layer's tensors.
_SHAPE = {
    "num_features", "features", "affine", "bias", "track_running_stats", "device", "dtype"
}  # fmt: skip


def convert(model: M, **options: Any) -> M:
    """Turn every batch norm layer of a model into a `BatchNorm`, in place.

    It takes torch's layers (BatchNorm1d/2d/3d, SyncBatchNorm, lazy ones), what derives from them
    without computing anything else, batch norm with an activation (timm's `BatchNormAct2d`), and
    those that never train (torchvision's `FrozenBatchNorm2d`, transformers' own), which become
    frozen layers: `unfreeze` lets them train. What is computed stays the same; each layer is tried
    with made-up numbers, on a copy, before anything is changed.

    The modules stay the same objects, with another class. So parameters and buffers are the same
    (an optimizer goes on working), layers that are used in several places still are, and hooks,
    modes, `requires_grad` and further attributes are kept. State dicts fit both ways. Only half
    precision running statistics become new buffers, in float32, and γ and β of what never trains
    parameters: so convert before DistributedDataParallel. Two things of a layer's own have another
    name afterwards: SyncBatchNorm's process_group None is `"world"`, and an eps of 0 the
    smallest normal number.

    Args:
        model: with any batch norm layers; or one such layer.
        options: of `BatchNorm`, for every layer, those that are `BatchNorm` already included:
            virtual_batch_size, renorm, process_group, activation (a module is one for all),
            channel_dim, eps, momentum.

    Returns:
        The model.

    Raises:
        ArgumentError: there are no batch norm layers, an option is impossible, or a layer does
            something else that would be lost; the message names each. Nothing has been changed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> weight = model[1].weight
        >>> convert(model, virtual_batch_size=32)[1]
        BatchNorm(8, eps=1e-05, momentum=0.1, ..., virtual_batch_size=32)
        >>> model[1].weight is weight
        True
    """
    _check_options(options)
    _check_not_scripted(model)
    layers = every_batch_norm(model)
    origins: list[Origin | None] = []
    refused = []
    for name, layer in layers:
        try:
            origins.append(_origin(layer, options))
        except ArgumentError as error:
            refused.append(f"{type(layer).__name__} at {name or 'the top'!r}: {error}")
    if refused:
        raise ArgumentError(
            "expected batch norm layers that BatchNorm can stand for, got "
            + "; ".join(refused)
            + ". Put a BatchNorm there by hand, or convert the parts of the model beside it"
        )
    for (_, layer), origin in zip(layers, origins, strict=True):
        if origin is not None:
            become_ours(layer, origin)
        for name, value in options.items():
            setattr(layer, name, value)
        before = vars(layer).get(ORIGIN)
        if before is not None:
            setattr(layer, ORIGIN, replace(before, options=before.options | set(options)))
    return model


def _check_options(options: dict[str, Any]) -> None:
    known = set(inspect.signature(BatchNorm).parameters) - _SHAPE
    if unknown := sorted(set(options) - known):
        raise ArgumentError(
            f"expected options of BatchNorm among {', '.join(sorted(known))}, got "
            f"{', '.join(unknown)}: a converted layer keeps its tensors"
        )
    BatchNorm(1, device="meta", **options)


def _check_not_scripted(model: nn.Module) -> None:
    """Refuse layers that are no layers any more, and would stay what they are."""
    check_module(model)
    scripted = [
        f"{module.original_name} at {name or 'the top'!r}"
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name
    ]
    if scripted:
        raise ArgumentError(
            "expected layers that torch.jit.script has not compiled, got "
            f"{', '.join(scripted)}; convert before that"
        )


def _origin(layer: Any, options: dict[str, Any]) -> Origin | None:
    """What a layer is; None if it is one of ours.

    Raises:
        ArgumentError: it cannot be converted.
    """
    origin = None if isinstance(layer, BatchNorm) else origin_of(layer)
    if origin is not None and not issubclass(origin.kind, LAZY):
        # SyncBatchNorm would wait for other processes; and with eps=0 torch refuses to train.
        training = not origin.synchronises and getattr(layer, "eps", None) != 0
        change = partial(become_ours, origin=origin)
        ranks, reason = difference(layer, change, origin.ranks, training=training)
        if reason is not None:
            raise ArgumentError(f"as a BatchNorm, {reason}")
        origin = replace(origin, ranks=ranks)
    settings = {name: getattr(layer, name, default) for name, default in _DEFAULTS.items()}
    settings["eps"] = settings["eps"] or _DEFAULTS["eps"]
    BatchNorm(1, device="meta", **settings | options)
    own = vars(layer).get(ORIGIN, origin)
    if own is not None and "activation" in options and (own.fused or own.child):
        raise ArgumentError("it has an activation already, which the option would replace")
    return origin
