"""Parameter groups: weight decay on what it is meant for."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from batchnorm.errors import ArgumentError
from batchnorm.tools.freeze import affine_of
from batchnorm.tools.layers import check_module, is_fixed, keepers

#: torch's normalization layers, and what derives from them: batch and instance norm, and the rest.
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_BIAS = re.compile(r"(.*_)?bias|bias_.*")


def param_groups(
    model: nn.Module, weight_decay: float, *, biases: bool = False
) -> list[dict[str, Any]]:
    """A model's parameters for an optimizer: γ and β of its normalization layers without decay.

    The layer before a batch norm may have weights of any size: what comes out is the same. Decay
    makes them small, which makes their gradients large, and so acts on the learning rate; γ and β
    decide what comes out, and decay pulls it toward 0.

    Args:
        model: with normalization layers: `BatchNorm` (and its banks), torch's batch, layer, group,
            instance and RMS norms, and what derives from them. What a class of its own computes
            is not known: of another library's RMS norm, the scale decays.
        weight_decay: of everything else, as the optimizer takes it.
        biases: leave out the biases of other layers, too.

    Returns:
        Two groups, with and without decay. Every parameter is in one of them, once, in the order
        of `model.parameters()`; frozen ones too, so that `unfreeze` needs no other optimizer.

    Raises:
        ArgumentError: there are no normalization layers, or the decay is no number ≥ 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, param_groups
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8))
        >>> optimizer = torch.optim.SGD(param_groups(model, weight_decay=1e-4), lr=0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(2, 0.0001), (2, 0.0)]
    """
    check_module(model)
    number = isinstance(weight_decay, Real) and not isinstance(weight_decay, bool)
    if not number or not 0 <= weight_decay < math.inf:
        raise ArgumentError(f"expected weight_decay to be a number >= 0, got {weight_decay!r}")
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    if not norms and not any(map(is_fixed, model.modules())):
        raise ArgumentError(
            "expected a model with normalization layers (batchnorm.BatchNorm, torch.nn.BatchNorm…, "
            f"LayerNorm, GroupNorm, …), got a {type(model).__name__} with none"
        )
    apart = {
        id(parameter)
        for norm in norms
        for keeper in (keepers(norm) if isinstance(norm, _BatchNorm) else [norm])
        for parameter in affine_of(keeper).values()
    }
    if biases:
        apart |= {id(p) for name, p in model.named_parameters() if _is_bias(name)}
    every = list(model.parameters())
    return [
        {"params": [p for p in every if id(p) not in apart], "weight_decay": weight_decay},
        {"params": [p for p in every if id(p) in apart], "weight_decay": 0.0},
    ]


def _is_bias(name: str) -> bool:
    """By its name, as torch gives them: `bias`, `in_proj_bias`, `bias_ih_l0`."""
    return _BIAS.fullmatch(name.rpartition(".")[2]) is not None
