"""Which layers folding knows, by what they compute and not by their class's name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.freeze import HOOKS as FREEZING

#: What a class must have unchanged to compute what its base does.
_METHODS = ("__call__", "_call_impl", "forward", "_forward", "_conv_forward", "_output_padding")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (BatchNorm, nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: The ranks of input that torch's layers accept; others accept any.
_RANKS: dict[Any, tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}

#: A weight in any other dtype (complex, quantized, 8 bits) is not a plain matrix of reals.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Kind(NamedTuple):
    """What a layer computes.

    Attributes:
        name: "conv", "transposed", "linear" or "norm".
        axis: of the channels, in the input and in the output.
        groups: of channels that do not see each other.
    """

    name: str
    axis: int
    groups: int = 1


def _is(module: nn.Module, classes: tuple[Any, ...]) -> bool:
    """Whether it computes as one of them does: the class itself, or one that changes nothing."""
    for base in classes:
        if isinstance(module, base):
            kept = (
                getattr(type(module), name, None) is getattr(base, name, None) for name in _METHODS
            )
            return all(kept) and not any(name in module.__dict__ for name in _METHODS)
    return False


def kind(module: Any) -> Kind | None:
    """What a layer computes, or None for one that folding does not know."""
    if _is(module, _CONVOLUTIONS + _TRANSPOSED):
        axis = -1 - len(module.kernel_size)
        name = "transposed" if isinstance(module, _TRANSPOSED) else "conv"
        return Kind(name, axis, module.groups)
    if _is(module, (nn.Linear,)):
        return Kind("linear", -1)
    if _is(module, _NORMS):
        return Kind("norm", getattr(module, "channel_dim", 1))
    return None


def known(module: Any) -> Kind:
    """What a layer computes that folding is sure to know."""
    found = kind(module)
    if found is None:
        raise TypeError(f"no layer that folding knows: {type(module).__name__}")
    return found


def only_rank(module: nn.Module) -> int | None:
    """The rank of input that a batch norm layer accepts, if it is a single one."""
    ranks = next((_RANKS[base] for base in _RANKS if isinstance(module, base)), ())
    return ranks[0] if len(ranks) == 1 else None


def passes(module: nn.Module) -> bool:
    """Whether it gives out, in evaluation, what comes in."""
    if hooked(module) is not None:
        return False
    torchs = type(module).__module__ == nn.Dropout.__module__
    dropout = torchs and isinstance(module, nn.modules.dropout._DropoutNd)
    return _is(module, (nn.Identity,)) or (dropout and not module.training)


def hooked(module: nn.Module) -> str | None:
    """Why a layer is not what its class says, or None."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(hook not in FREEZING for hook in hooks):
        return "has hooks"
    if parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize.remove_parametrizations undoes it)"
    return None


def unfit(module: nn.Module) -> str | None:
    """Why the numbers that a layer keeps cannot be folded, or None."""
    if (reason := hooked(module)) is not None:
        return reason
    tensors = [*module._parameters.values(), *module._buffers.values()]
    for tensor in tensors:
        if tensor is None or not tensor.dim():  # the counter
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in _DTYPES:
            return f"keeps {type(tensor).__name__}s of {tensor.dtype}, no ordinary numbers"
        if not bool(tensor.isfinite().all()):
            return "keeps numbers that are not finite"
    return None


def not_normalizing_by_constants(module: nn.Module) -> str | None:
    """Why a batch norm layer is no affine map in evaluation, or None."""
    if not isinstance(module, _BatchNorm):
        return (
            f"is a {type(module).__name__}, whose formula is not known: convert(model) makes it a "
            "BatchNorm"
        )
    if kind(module) is None:
        return (
            f"is a {type(module).__name__}, a class with a forward of its own: convert(model) may "
            "know it"
        )
    if module.running_mean is None or module.running_var is None:
        return "normalises by the batch in evaluation, too (track_running_stats=False)"
    if (reason := unfit(module)) is not None:
        return reason
    if not bool((module.running_var + module.eps > 0).all()):
        return "has a negative running variance"
    return None
